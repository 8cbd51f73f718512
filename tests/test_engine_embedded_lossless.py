"""The embedded engine says what the target alone would say, whatever is drafted, and shows its true states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import make_draft, make_target
from tided.draft.eagle3 import Eagle3
from tided.engine.embedded.drafter import Context, Drafter
from tided.engine.embedded.sampling import Proposal, SamplingParams
from tided.engine.embedded.scheduler import (
    Output,
    Request,
    Scheduler,
    _groups,  # pyright: ignore[reportPrivateUsage]
)
from tided.engine.embedded.target import Target

TIE = 1e-3


@dataclass
class Collected:
    tokens: list[int] = field(default_factory=lambda: list[int]())
    last: Output | None = None

    def __call__(self, output: Output) -> None:
        self.tokens += output.tokens
        if output.finish:
            self.last = output


@dataclass
class RecordingTap:
    """Keeps what the scheduler hands over."""

    rows: dict[str, dict[int, tuple[int, torch.Tensor]]] = field(default_factory=dict)
    ends: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    opted_out: set[str] = field(default_factory=lambda: set[str]())

    def begin(self, request_id: str, prompt_ids: Sequence[int], opt_out: bool) -> None:
        self.rows[request_id] = {}
        if opt_out:
            self.opted_out.add(request_id)

    def record(self, segments: Sequence[tuple[str, int, int]], ids: Sequence[int], rows: torch.Tensor) -> None:
        assert sum(count for _, _, count in segments) == len(ids) == rows.shape[0]
        at = 0
        for request_id, position, count in segments:
            for j in range(count):
                assert position + j not in self.rows[request_id]
                self.rows[request_id][position + j] = (ids[at + j], rows[at + j].clone())
            at += count

    def end(self, request_id: str, finish: str, tail: Sequence[int]) -> None:
        self.ends[request_id] = (finish, list(tail))


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(target_dir, tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def reference(target_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()


def scheduler_for(
    target_dir: Path, draft_dir: Path | None, gammas: tuple[int, ...], tap: RecordingTap | None = None
) -> Scheduler:
    target = Target(target_dir, dtype=torch.float32, max_batch=4, max_context=96, gamma_max=4)
    drafter = Drafter(Eagle3.load(draft_dir), target) if draft_dir is not None else None
    return Scheduler(target, drafter, tap, gammas=gammas)


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    source = torch.Generator().manual_seed(seed)
    lengths = [3 + 7 * i % 23 for i in range(count)]
    return [tuple(torch.randint(3, 96, (length,), generator=source).tolist()) for length in lengths]


def run(scheduler: Scheduler, requests: list[tuple[int, ...]], max_tokens: int = 24) -> list[Collected]:
    """All requests at once, greedily, to their end."""
    sinks = [Collected() for _ in requests]
    for i, (prompt, sink) in enumerate(zip(requests, sinks, strict=True)):
        scheduler.submit(Request(f"r{i}", prompt, max_tokens - 3 * (i % 3), sink))
    drain(scheduler, sinks)
    return sinks


def drain(scheduler: Scheduler, sinks: list[Collected]) -> None:
    for _ in range(2000):
        if all(sink.last is not None for sink in sinks):
            return
        scheduler.step()
    raise AssertionError("the requests do not end")


def assert_greedy(reference: Any, prompt: tuple[int, ...], tokens: list[int]) -> None:
    """Every token is the reference's argmax after those before it (a tie may go either way)."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logits = reference(ids).logits[0, len(prompt) - 1 : -1]
    gap = logits.max(dim=-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float(gap.max()) <= TIE


@pytest.mark.parametrize("gamma", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_greedy_is_what_transformers_generates(
    target_dir: Path, draft_dir: Path, reference: Any, gamma: int, batch: int
) -> None:
    requests = prompts(batch)
    for prompt, sink in zip(requests, run(scheduler_for(target_dir, draft_dir, (gamma,)), requests), strict=True):
        assert_greedy(reference, prompt, sink.tokens)
        with torch.inference_mode():
            generated = reference.generate(
                torch.tensor([prompt]), max_new_tokens=len(sink.tokens), do_sample=False, pad_token_id=0
            )
        assert sink.tokens == generated[0, len(prompt) :].tolist()


def test_more_requests_than_slots_all_finish(target_dir: Path, draft_dir: Path, reference: Any) -> None:
    requests = prompts(11)
    scheduler = scheduler_for(target_dir, draft_dir, (3, 2, 1, 4))
    for prompt, sink in zip(requests, run(scheduler, requests), strict=True):
        assert_greedy(reference, prompt, sink.tokens)
    steps, finished = scheduler.take_counts()
    assert len(finished) == 11
    assert {(item.batch, item.gamma) for item in steps} <= {(1, 3), (2, 2), (3, 1), (4, 4)}
    assert all(sum(item.accepted) == item.steps * item.batch for item in steps)


def test_schedule_changes_in_the_middle_of_a_request(target_dir: Path, draft_dir: Path, reference: Any) -> None:
    requests, sinks = prompts(3), [Collected() for _ in range(3)]
    scheduler = scheduler_for(target_dir, draft_dir, (0,))
    for i, prompt in enumerate(requests):
        scheduler.submit(Request(f"r{i}", prompt, 40, sinks[i]))
    for gamma in (0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 0, 4):
        scheduler.set_gammas((gamma,))
        scheduler.step()
    drain(scheduler, sinks)
    for prompt, sink in zip(requests, sinks, strict=True):
        assert_greedy(reference, prompt, sink.tokens)


def test_drafting_recovers_after_a_pause(target_dir: Path, draft_dir: Path) -> None:
    """The draft proposes the same whether it ran all the time or caught up at once."""
    steady, paused = (scheduler_for(target_dir, draft_dir, (gamma,)) for gamma in (1, 0))
    prompt = prompts(1)[0]
    sinks = [Collected(), Collected()]
    steady.submit(Request("a", prompt, 60, sinks[0], ignore_eos=True))
    paused.submit(Request("a", prompt, 60, sinks[1], ignore_eos=True))
    while len(sinks[0].tokens) < 30:
        steady.step()
    while len(sinks[1].tokens) < len(sinks[0].tokens):
        paused.step()
    assert sinks[0].tokens == sinks[1].tokens
    proposals = [
        scheduler.drafter.propose([scheduler._running[0].context], 4)[0]  # pyright: ignore
        for scheduler in (steady, paused)
        if scheduler.drafter is not None
    ]
    assert proposals[0] == proposals[1]


def test_states_equal_transformers_and_cover_every_accepted_row(
    target_dir: Path, draft_dir: Path, reference: Any
) -> None:
    for gamma in (0, 3):
        tap = RecordingTap()
        requests = prompts(4)
        scheduler = scheduler_for(target_dir, draft_dir, (gamma,), tap)
        layers = scheduler.target.info.aux_layers
        assert layers == (2, 4, 5)
        for i, (prompt, sink) in enumerate(zip(requests, run(scheduler, requests), strict=True)):
            tokens = [*prompt, *sink.tokens]
            with torch.inference_mode():
                want = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
            rows = tap.rows[f"r{i}"]
            assert sorted(rows) == list(range(len(tokens) - 1))
            assert [rows[position][0] for position in sorted(rows)] == tokens[:-1]
            got = torch.stack([rows[position][1] for position in sorted(rows)])
            for column, layer in enumerate(layers):
                torch.testing.assert_close(got[:, column], want[layer][0, :-1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[:, 3], want[-1][0, :-1], atol=1e-4, rtol=1e-4)
            assert sink.last is not None
            assert tap.ends[f"r{i}"] == (sink.last.finish, tokens[-1:])


def test_a_request_ends_at_eos_unless_told_otherwise(target_dir: Path, draft_dir: Path) -> None:
    scheduler = scheduler_for(target_dir, draft_dir, (4,))
    prompt = prompts(1)[0]
    plain = run(scheduler, [prompt], max_tokens=30)[0].tokens
    scheduler.target.eos = frozenset([plain[9]])
    first = plain.index(plain[9])
    ended = run(scheduler, [prompt], max_tokens=30)[0]
    assert ended.tokens == plain[: first + 1]
    assert ended.last is not None
    assert ended.last.finish == "stop"
    sink = Collected()
    scheduler.submit(Request("again", prompt, 30, sink, ignore_eos=True))
    drain(scheduler, [sink])
    assert sink.tokens == plain


def test_a_request_ends_at_the_context_limit(target_dir: Path, draft_dir: Path, reference: Any) -> None:
    scheduler = scheduler_for(target_dir, draft_dir, (4,))
    scheduler.target.eos = frozenset()
    prompt = prompts(1)[0]
    sink = run(scheduler, [prompt], max_tokens=500)[0]
    assert len(prompt) + len(sink.tokens) == scheduler.target.max_context
    assert_greedy(reference, prompt, sink.tokens)


def test_cancelled_requests_leave_the_others_alone(target_dir: Path, draft_dir: Path, reference: Any) -> None:
    tap = RecordingTap()
    scheduler = scheduler_for(target_dir, draft_dir, (2,), tap)
    requests, sinks = prompts(6), [Collected() for _ in range(6)]
    for i, prompt in enumerate(requests):
        scheduler.submit(Request(f"r{i}", prompt, 30, sinks[i], ignore_eos=True, opt_out=i == 1))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel("r0")
    scheduler.cancel("r5")
    scheduler.cancel("never existed")
    drain(scheduler, sinks)
    finishes = [sink.last.finish for sink in sinks if sink.last is not None]
    assert finishes == ["abort", *["length"] * 4, "abort"]
    assert tap.ends["r0"] == ("abort", sinks[0].tokens[-1:])
    assert tap.opted_out == {"r1"}
    assert sinks[5].tokens == []
    for prompt, sink in zip(requests[:5], sinks[:5], strict=True):
        assert_greedy(reference, prompt, sink.tokens)


def test_prompts_longer_than_a_chunk(
    target_dir: Path, draft_dir: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tided.engine.embedded.scheduler.PREFILL_CHUNK", 8)
    # The first two are padded together, the second of them over a chunk's end; the others are computed alone.
    requests = [prompts(4)[3][:length] for length in (15, 17, 3, 24)]
    tap = RecordingTap()
    for i, sink in enumerate(run(scheduler_for(target_dir, draft_dir, (3,), tap), requests)):
        assert_greedy(reference, requests[i], sink.tokens)
        assert sorted(tap.rows[f"r{i}"]) == list(range(len(requests[i]) + len(sink.tokens) - 1))


def test_prompts_of_similar_length_are_computed_together() -> None:
    assert _groups([]) == []
    assert _groups([40]) == [1]
    assert _groups([40, 45, 42, 100, 90, 10]) == [3, 2, 1]


def test_sampled_and_greedy_requests_share_a_batch(target_dir: Path, draft_dir: Path, reference: Any) -> None:
    requests, sinks = prompts(4), [Collected() for _ in range(4)]
    scheduler = scheduler_for(target_dir, draft_dir, (3,))
    for i, prompt in enumerate(requests):
        params = SamplingParams(temperature=0.8, top_p=0.9, seed=i) if i % 2 else SamplingParams()
        scheduler.submit(Request(f"r{i}", prompt, 20, sinks[i], params))
    drain(scheduler, sinks)
    for prompt, sink in zip(requests[::2], sinks[::2], strict=True):
        assert_greedy(reference, prompt, sink.tokens)


class OracleDrafter(Drafter):
    """Proposes the true continuation, wrong from a place that changes from step to step."""

    truth: dict[tuple[int, ...], list[int]]
    calls = 0

    def propose(self, requests: list[Context], gamma: int) -> tuple[list[list[int]], list[Proposal | None]]:
        self.calls += 1
        drafted: list[list[int]] = []
        for i, request in enumerate(requests):
            prompt = next(known for known in self.truth if tuple(request.tokens[: len(known)]) == known)
            done = len(request.tokens) - len(prompt)
            tokens = (self.truth[prompt][done : done + gamma] + [0] * gamma)[:gamma]
            wrong = (self.calls + i) % (gamma + 1)
            drafted.append(tokens[:wrong] + [(token + 1) % 96 for token in tokens[wrong:]])
        return drafted, [None] * len(requests)


def test_every_number_of_accepted_tokens_rolls_back_cleanly(target_dir: Path, draft_dir: Path) -> None:
    requests = prompts(4)
    plain = [sink.tokens for sink in run(scheduler_for(target_dir, None, (0,)), requests)]
    tap = RecordingTap()
    target = Target(target_dir, dtype=torch.float32, max_batch=4, max_context=96, gamma_max=4)
    drafter = OracleDrafter(Eagle3.load(draft_dir), target)
    drafter.truth = dict(zip(requests, plain, strict=True))
    scheduler = Scheduler(target, drafter, tap, gammas=(4,))
    assert [sink.tokens for sink in run(scheduler, requests)] == plain
    steps, finished = scheduler.take_counts()
    accepted = [sum(item.accepted[k] for item in steps) for k in range(5)]
    assert all(accepted)
    assert sum(item.drafted for item in finished) == 4 * sum(item.batch * item.steps for item in steps)
    for i, prompt in enumerate(requests):
        assert sorted(tap.rows[f"r{i}"]) == list(range(len(prompt) + len(plain[i]) - 1))


def dense_proposal(draft: Eagle3, embed: torch.Tensor, tokens: list[int], aux: torch.Tensor, gamma: int) -> list[int]:
    """EAGLE-3 without a cache: the whole sequence in each pass, as tided.draft.eagle3 describes it."""
    ids, features = torch.tensor(tokens[1:]), draft.fuse(aux)
    out: list[int] = []
    for _ in range(gamma):
        n = len(ids)
        q, k, v = draft.project(embed[ids], features, torch.arange(n))
        groups = draft.config.heads // draft.config.kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) * draft.config.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        pre = draft.finish(features, (scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
        best = int(draft.logits(pre[-1]).argmax())
        out.append(best + int(draft.d2t[best]))
        ids, features = torch.cat((ids, torch.tensor(out[-1:]))), torch.cat((features, pre[-1:]))
    return out


@torch.inference_mode()
def test_the_drafter_computes_what_a_pass_over_everything_would(
    target_dir: Path, draft_dir: Path, reference: Any
) -> None:
    scheduler = scheduler_for(target_dir, draft_dir, (3,))
    drafter = scheduler.drafter
    assert drafter is not None
    requests, sinks = prompts(4), [Collected() for _ in range(4)]
    for i, prompt in enumerate(requests):
        scheduler.submit(Request(f"r{i}", prompt, 60, sinks[i], ignore_eos=True))
    for _ in range(7):
        scheduler.step()
    contexts = [running.context for running in scheduler._running]  # pyright: ignore[reportPrivateUsage]
    proposed, _ = drafter.propose(contexts, 4)
    for context, tokens in zip(contexts, proposed, strict=True):
        hidden = reference(torch.tensor([context.tokens[:-1]]), output_hidden_states=True).hidden_states
        aux = torch.cat([hidden[layer][0] for layer in scheduler.target.info.aux_layers], dim=-1)
        embed = reference.get_input_embeddings().weight
        assert tokens == dense_proposal(drafter.draft, embed, context.tokens, aux, 4)
