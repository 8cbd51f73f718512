"""The unroll and the evaluation against drafting one token at a time, and the packing against itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.shards import Sample, greedy_samples, prompts, write_shard
from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3
from tided.training import ttt
from tided.training.data import Pack, Piece, Run, Span, equal_pieces, pack, read_shard, whole_packs
from tided.training.evaluate import evaluate
from tided.training.loop import pack_loss
from tided.training.losses import CandidateSampler, Frozen, Labels, labels_of, step_loss
from tided.training.options import Precision, SoftLoss, TrainOptions
from tided.training.ttt import Unroll, attend


def whole(runs: Sequence[Run], skip: int = 0) -> Pack:
    return pack([Piece(run, run.queries(skip)) for run in runs])


class World:
    """A tiny target, a draft with random weights, and the target's greedy answers."""

    def __init__(self, root: Path) -> None:
        target = make_target(root / "target")
        self.target_dir = target
        source = checkpoint.load(make_draft(target, root / "draft", draft_vocab=VOCAB - 16))
        self.draft = Eagle3.of(source)
        self.frozen = Frozen.read(target, source, "cpu")
        self.samples = greedy_samples(target, prompts(7, VOCAB), 14)
        self.runs = read_shard(write_shard(root / "a.safetensors", self.samples), 48)
        self.everything = CandidateSampler(self.runs, self.frozen, VOCAB).draw()
        self._train(TrainOptions(precision=Precision.FP32, unroll_steps=2))

    def _train(self, options: TrainOptions) -> None:
        """A few steps on half of the samples: a draft that is right at times and wrong at times."""
        optimizer = torch.optim.AdamW(self.draft.parameters(), lr=3e-3)
        packed = whole(self.runs[:4])
        for _ in range(25):
            head = self.draft.lm_head.weight[self.everything.ids]
            pack_loss(self.draft, head, packed, self.frozen, self.everything, options).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class Incremental:
    """Drafting as an engine does it: a key-value cache, one token at a time."""

    def __init__(self, draft: Eagle3, embedding: Tensor) -> None:
        self.draft, self.embedding = draft, embedding.float()
        self.cache: list[tuple[Tensor, Tensor]] = []

    def step(self, h: Tensor, token: int, position: int) -> Tensor:
        """`pre` [H] of one row, whose keys stay in the cache."""
        emb, at = self.embedding[token].unsqueeze(0), torch.tensor([position])
        q, k, v = self.draft.project(emb, h.unsqueeze(0), at)
        self.cache.append((k[0], v[0]))
        group = q.shape[1] // k.shape[1]
        keys = torch.stack([k for k, _ in self.cache]).repeat_interleave(group, 1)  # [m, heads, D]
        values = torch.stack([v for _, v in self.cache]).repeat_interleave(group, 1)
        weights = torch.softmax(torch.einsum("hd,mhd->hm", q[0], keys) / q.shape[-1] ** 0.5, -1)
        return self.draft.finish(h.unsqueeze(0), torch.einsum("hm,mhd->hd", weights, values).reshape(1, -1))[0]


@torch.inference_mode()
def drafted(world: World, run: Run, gamma: int) -> list[list[int]]:
    """For each start row, the tokens that an engine would draft there."""
    engine = Incremental(world.draft, world.frozen.embedding)
    states = torch.from_numpy(np.array(run.states).view(np.int16)).view(torch.bfloat16).float()
    h = world.draft.fuse(states[:, :3].flatten(1))
    out: list[list[int]] = []
    for row in range(run.queries(1).stop):
        pre = engine.step(h[row], int(run.ids[row + 1]), run.first_position + row)
        mark, tokens = len(engine.cache), []
        for k in range(gamma):
            best = int(world.draft.logits(pre).argmax())
            tokens.append(best + int(world.draft.d2t[best]))
            if k + 1 < gamma:
                pre = engine.step(pre, tokens[-1], run.first_position + row + k + 1)
        del engine.cache[mark:]
        out.append(tokens)
    return out


def test_evaluation_is_incremental_drafting(world: World) -> None:
    gamma = 3
    asked, right = np.zeros((2, gamma), int)
    lengths: dict[str, float] = {}
    for run in world.runs:
        mine = np.zeros((2, gamma), int)
        at_row = drafted(world, run, gamma)
        row = run.queries(1).start
        while row < run.queries(1).stop:
            accepted = 0
            for k in range(min(gamma, len(run.ids) - row - 2)):
                mine[0, k] += 1
                if at_row[row][k] != run.ids[row + 2 + k]:
                    break
                mine[1, k] += 1
                accepted += 1
            row += accepted + 1
        asked, right = asked + mine[0], right + mine[1]
        rates = [mine[1, k] / mine[0, k] if mine[0, k] else 0.0 for k in range(gamma)]
        lengths[run.group.hex()] = 1 + float(np.cumprod(rates).sum())
    evaluation = evaluate(world.draft, world.runs, world.frozen, gamma, autocast=False)
    assert right[0] > 0, "a draft that is never right shows nothing"
    assert right[0] < asked[0]
    np.testing.assert_allclose(evaluation.conditional, right / np.maximum(asked, 1))
    assert dict(zip(evaluation.groups, evaluation.lengths, strict=True)) == pytest.approx(lengths)
    assert sum(evaluation.tokens) == sum(len(run.queries(1)) for run in world.runs)


def test_every_pass_of_the_unroll_is_incremental(world: World) -> None:
    """Teacher-forced passes, wrong ones too, give the `pre` of a cache fed with the same tokens."""
    run = world.runs[2]
    packed = whole([world.runs[0], run])
    unroll = Unroll(world.draft, packed, world.frozen.embedding)
    passes = [(unroll.active, unroll.pre)]
    for k in range(1, 4):
        unroll.advance((packed.left > k).nonzero().squeeze(1))
        passes.append((unroll.active, unroll.pre))
    engine = Incremental(world.draft, world.frozen.embedding)
    states = torch.from_numpy(np.array(run.states).view(np.int16)).view(torch.bfloat16).float()
    h = world.draft.fuse(states[:, :3].flatten(1))
    offset = packed.spans[1].queries.start
    for row in range(run.queries(0).stop):
        pre = engine.step(h[row], int(run.ids[row + 1]), row)
        mark = len(engine.cache)
        for k, (active, outputs) in enumerate(passes):
            query = offset + row - run.queries(0).start
            at = (active == query).nonzero()
            if row not in run.queries(0) or not len(at):
                break
            if k:
                pre = engine.step(pre, int(run.ids[row + 1 + k]), row + k)
            torch.testing.assert_close(outputs[int(at)], pre, rtol=1e-3, atol=1e-4)
        del engine.cache[mark:]


def test_packing_changes_no_figure(world: World) -> None:
    options = TrainOptions(precision=Precision.FP32, hard_weight=0.3)

    def gradients(tokens: int) -> list[Tensor]:
        world.draft.zero_grad()
        total = sum(len(run.queries(0)) for run in world.runs)
        for packed in whole_packs(world.runs, tokens, skip=0):
            head = world.draft.lm_head.weight[world.everything.ids]
            loss = pack_loss(world.draft, head, packed, world.frozen, world.everything, options)
            (loss * (packed.tokens / total)).backward()
        return [parameter.grad.clone() for parameter in world.draft.parameters() if parameter.grad is not None]

    one_by_one, all_at_once = gradients(1), gradients(10_000)
    assert len(one_by_one) == len(list(world.draft.parameters()))
    for a, b in zip(one_by_one, all_at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_attention_in_parts_is_attention(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few scores may be held at once: the memory of a score is bounded, not its result."""
    whole_score = evaluate(world.draft, world.runs, world.frozen, 3, autocast=False)
    rows = 0

    def counted(q: Tensor, *rest: Any) -> Tensor:
        nonlocal rows
        spans: list[Span] = rest[-1]
        rows = max(rows, *(span.queries.stop - span.queries.start for span in spans))
        return attend(q, *rest)

    monkeypatch.setattr(ttt, "attend", counted)
    monkeypatch.setattr(ttt, "_MAX_SCORES", 300)
    assert evaluate(world.draft, world.runs, world.frozen, 3, autocast=False) == whole_score
    assert rows <= 300 // (6 * 9)


def test_packs_hold_no_padding(world: World) -> None:
    packed = whole(world.runs)
    assert packed.tokens == sum(len(run.queries(0)) for run in world.runs)
    assert len(packed.positions) == sum(run.queries(0).stop for run in world.runs)


def test_equal_packs_cut_runs_but_lose_no_query(world: World) -> None:
    """A cut run's second piece gives the same first pass as the whole run: its keys are all there."""
    whole_pre = Unroll(world.draft, whole(world.runs), world.frozen.embedding).pre
    cut = [pack(pieces) for pieces in equal_pieces(world.runs, 16, 1000)]
    assert [packed.tokens for packed in cut[:-1]] == [16] * (len(cut) - 1)
    pre = torch.cat([Unroll(world.draft, packed, world.frozen.embedding).pre for packed in cut])
    torch.testing.assert_close(pre, whole_pre, rtol=1e-3, atol=1e-4)
    for packed in cut:
        assert packed.left.tolist() == [
            n for span in packed.spans for n in range(span.queries.stop - span.queries.start, 0, -1)
        ]


def test_queries_are_the_generated_tokens(world: World) -> None:
    """Training predicts every generated token, evaluation all but the first, which is never drafted."""
    for run, sample in zip(world.runs, world.samples, strict=True):
        predicted = [row + 2 for row in run.queries(0)]
        assert predicted == list(range(sample.prompt_tokens, len(sample.ids)))
        assert [row + 2 for row in run.queries(1)] == predicted[1:]


def test_soft_labels_are_the_targets_distribution(world: World) -> None:
    """The most probable soft label is the token that the greedy target took, where the draft vocabulary has it."""
    packed = whole(world.runs)
    labels = labels_of(packed, world.frozen, world.everything)
    assert labels.soft is not None
    known = labels.ids >= 0
    agree = (labels.soft.argmax(-1) == labels.ids)[known].float().mean()
    assert known.any()
    assert not known.all()
    assert float(agree) > 0.95  # states are BF16: a near tie may turn


def test_soft_loss_has_the_gradient_of_kl() -> None:
    torch.manual_seed(0)
    soft = torch.softmax(torch.randn(5, 7), -1)
    labels = Labels(torch.tensor([0, 1, -1, 2, 3]), soft)
    a = torch.randn(4, 7, requires_grad=True)
    b = a.detach().clone().requires_grad_(True)
    rows = torch.tensor([0, 2, 3, 4])
    step_loss(a, labels, rows, 0.0, SoftLoss.KL).backward()
    usable = torch.tensor([1.0, 0.0, 1.0, 1.0])
    (-(soft[rows] * b.log_softmax(-1)).sum(-1) * usable).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad)
    a.grad = b.grad = None
    step_loss(a, Labels(labels.ids, None), rows, 0.0, SoftLoss.KL).backward()
    torch.nn.functional.cross_entropy(b[[0, 2, 3]], torch.tensor([0, 2, 3]), reduction="sum").backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_the_lk_loss_is_the_log_of_the_acceptance_rate() -> None:
    torch.manual_seed(0)
    soft = torch.softmax(2 * torch.randn(3, 9), -1)
    labels = Labels(torch.tensor([4, -1, 2]), soft)
    a = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    b = a.detach().clone().requires_grad_(True)
    ours = step_loss(a, labels, torch.arange(3), 0.25, SoftLoss.LK)
    usable = torch.tensor([1.0, 0.0, 1.0])
    accepted = torch.minimum(soft, b.softmax(-1)).sum(-1)
    hard = torch.nn.functional.cross_entropy(b, labels.ids.clamp(min=0), reduction="none")
    theirs = ((0.25 * hard - accepted.log()) * usable).sum()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_run_that_begins_in_the_middle(world: World, tmp_path: Path) -> None:
    """After a gap, positions go on where the request was; rows before the first generated token ask nothing."""
    sample = world.samples[0]
    cut = sample.prompt_tokens + 3
    tail = Sample(sample.states[cut:], sample.ids[cut:], sample.prompt_tokens, first_position=cut)
    (run,) = read_shard(write_shard(tmp_path / "tail.safetensors", [tail]), 48)
    packed = whole([run], 1)
    assert packed.positions.tolist() == list(range(cut, cut + len(packed.positions)))
    assert packed.tokens == len(sample.ids) - cut - 2
