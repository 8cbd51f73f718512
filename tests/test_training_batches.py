"""The order of samples, packs under a bound, accumulation, and the thread that works ahead."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.shards import greedy_samples, prompts, write_shard
from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3
from tided.training.batches import AHEAD, Order, prefetched
from tided.training.data import Run, equal_pieces, pack, read_shard
from tided.training.evaluate import evaluate
from tided.training.loop import Objective
from tided.training.losses import CandidateSampler, Frozen
from tided.training.optimizer import Optimizer
from tided.training.options import Precision, TrainOptions, usable
from tided.training.ranks import Ranks
from tided.training.ttt import Unroll

OPTIONS = TrainOptions(batch_tokens=8, packs=2, passes=2, precision=Precision.FP32)


class World:
    """A tiny target's draft and samples: 10 prompts of 9 to 11 tokens, 16 answered tokens each."""

    def __init__(self, root: Path) -> None:
        target = make_target(root / "target")
        source = checkpoint.load(make_draft(target, root / "draft", draft_vocab=VOCAB - 16))
        self.draft = Eagle3.of(source)
        self.frozen = Frozen.read(target, source, "cpu", torch.float32)
        self.runs = read_shard(write_shard(root / "a.safetensors", greedy_samples(target, prompts(10, VOCAB), 16)), 48)
        self.sampler = CandidateSampler(self.runs, self.frozen, 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def labels(order: Order, first: int = 0) -> list[list[int]]:
    """The labels of each batch, sorted; packs that only fill up left out."""
    return [
        sorted(label for one, share in batch.packs if share for label in one.label_ids.tolist())
        for batch in order.batches(first)
    ]


def test_the_order_goes_on_at_any_batch(world: World) -> None:
    order = Order(world.runs[:7], world.runs[7:], OPTIONS)
    every = labels(order)
    assert len(every) > 10
    assert every[: len(every) // 2] != every[len(every) // 2 :], "passes differ in order"
    for first in (1, len(every) // 2, len(every) - 1):
        assert labels(order, first) == every[first:]
    assert sum(map(len, every)) == pytest.approx(order.planned_tokens(), rel=0.1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_each_batch(world: World, ranks: int) -> None:
    options = replace(OPTIONS, packs=6)
    alone = Order(world.runs, [], options)
    shared = [Order(world.runs, [], options, rank, ranks) for rank in range(ranks)]
    for whole, *parts in zip(labels(alone), *map(labels, shared), strict=True):
        assert sorted(label for part in parts for label in part) == whole
    for batches in zip(*(order.batches(0) for order in shared), strict=True):
        assert len({len(batch.packs) for batch in batches}) == 1, "all must step as often"
        assert sum(share for batch in batches for _, share in batch.packs) == pytest.approx(1.0)


def test_accumulated_packs_are_one_larger_pack(world: World) -> None:
    """Packs of 8 tokens, none of them cut out of a chain, against one of 32: the same loss and the same gradients."""
    runs = [
        replace(run, ids=run.ids[: run.prompt_tokens + 8], states=run.states[: run.prompt_tokens + 7])
        for run in world.runs[:4]
    ]
    candidates = world.sampler.draw(3)

    def gradients(options: TrainOptions) -> tuple[float, list[Tensor]]:
        world.draft.zero_grad()
        objective = Objective(world.draft, world.frozen, options, world.sampler.seen)
        (batch,) = Order(runs, [], options).batches(0)
        losses = [objective(one, candidates) * share for one, share in batch.packs]
        assert len(losses) == options.packs
        for loss in losses:
            loss.backward()
        return sum(float(loss.detach()) for loss in losses), [
            value.grad.clone() for value in objective.parameters() if value.grad is not None
        ]

    lengths = {len(run.queries(0)) for run in runs}
    assert len(lengths) == 1
    size = lengths.pop()
    many, mine = gradients(replace(OPTIONS, passes=1, packs=4, batch_tokens=size))
    one, theirs = gradients(replace(OPTIONS, passes=1, packs=1, batch_tokens=4 * size))
    assert many == pytest.approx(one, rel=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_pack_has_a_bound_of_rows(world: World) -> None:
    """Long prompts end a pack early; a run that is longer than the bound loses its oldest rows, and keeps its positions."""
    for rows in (9, 20, 40, 1000):
        packs = [pack(pieces) for pieces in equal_pieces(world.runs, 8, rows)]
        assert max(len(one.positions) for one in packs) <= rows
        assert max(one.tokens for one in packs) <= 8
        asked = [label for one in packs for label in one.label_ids.tolist()]
        assert asked == [int(i) for run in world.runs for i in run.ids[run.prompt_tokens :]]
    (run,) = world.runs[:1]
    whole, *_ = [pack(pieces) for pieces in equal_pieces([run], 8, 1000)]
    bounded, *_ = [pack(pieces) for pieces in equal_pieces([run], 8, len(whole.positions) - 2)]
    assert bounded.positions.tolist() == whole.positions.tolist()[2:]
    torch.testing.assert_close(bounded.aux, whole.aux[2:])
    assert bounded.positions[bounded.query_rows].tolist() == whole.positions[whole.query_rows].tolist()


def test_a_long_prompt_does_not_grow_a_step(world: World) -> None:
    """The rows that attention sees follow the options, not the traffic."""
    run = world.runs[0]
    long = 5000
    states = np.zeros((long + 8, *run.states.shape[1:]), np.uint16)
    longer = Run(states, np.full(long + 9, 5, np.int64), 0, long, run.group)
    seen = [len(pack(pieces).positions) for pieces in equal_pieces([longer, *world.runs], 8, 64)]
    assert max(seen) <= 64


def test_the_thread_works_ahead_within_its_bound() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            if n == AHEAD:
                third.set()
            yield n

    ahead = prefetched(items())
    assert next(ahead) == 0
    assert third.wait(60), "the thread did not go on while the first item was used"
    assert len(made) <= AHEAD + 1
    ahead.close()
    assert len(made) <= AHEAD + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    assert list(prefetched(iter(range(20)))) == list(range(20))


def test_what_the_thread_raises_is_raised_here() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("shard gone")

    ahead = prefetched(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="shard gone"):
        next(ahead)


class NoBF16(TorchDispatchMode):
    """A device that stores and converts BF16, and has no arithmetic in it."""

    ALLOWED = (
        "_to_copy",
        "to",
        "copy_",
        "view",
        "slice",
        "cat",
        "clone",
        "detach",
        "alias",
        "select",
        "flatten",
        "_unsafe_view",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.split("::")[-1]
        if name not in self.ALLOWED:
            for value in [*args, *(kwargs or {}).values()]:
                assert not (isinstance(value, Tensor) and value.dtype == torch.bfloat16), f"{name} computes in BF16"
        return func(*args, **(kwargs or {}))


def test_devices_without_bf16_compute_without_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert usable(Precision.BF16, "cpu") is Precision.FP32
    objective = Objective(world.draft, world.frozen, OPTIONS, world.sampler.seen)
    optimizer = Optimizer(objective, OPTIONS)
    with NoBF16():
        batch = next(Order(world.runs, [], OPTIONS).batches(0))
        for one, share in batch.packs:
            (objective(one, world.sampler.draw()) * share).backward()
        optimizer.step(0.5)
        evaluate(world.draft, world.runs[:2], world.frozen, 3, autocast=False)


def test_devices_with_bf16_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert usable(Precision.BF16, "cpu") is Precision.BF16
    assert usable(Precision.FP32, "cpu") is Precision.FP32


def test_weights_gradients_and_optimizer_stay_in_float32(world: World) -> None:
    options = replace(OPTIONS, precision=Precision.BF16)
    objective = Objective(world.draft, world.frozen, options, world.sampler.seen)
    optimizer = Optimizer(objective, options)
    one = next(Order(world.runs, [], options).batches(0)).packs[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        assert Unroll(world.draft, one, world.frozen.embedding).pre.dtype == torch.float32
    objective(one, world.sampler.draw()).backward()
    assert {value.dtype for value in objective.parameters()} == {torch.float32}
    assert {value.grad.dtype for value in objective.parameters() if value.grad is not None} == {torch.float32}
    optimizer.step(0.5)
    assert {value.dtype for value in optimizer.state().values()} == {torch.float32}


def test_the_head_s_rows_of_tokens_that_occur_are_trained_and_no_others(world: World) -> None:
    options, before = replace(OPTIONS, learning_rate=1e-2), world.draft.lm_head.weight.detach().clone()
    objective = Objective(world.draft, world.frozen, options, world.sampler.seen)
    optimizer = Optimizer(objective, options)
    objective(next(Order(world.runs, [], options).batches(0)).packs[0][0], world.sampler.draw()).backward()
    optimizer.step(0.5)
    objective.settle(Ranks())
    changed = (world.draft.lm_head.weight != before).any(-1).nonzero().squeeze(1)
    assert sorted(changed.tolist()) == sorted(world.sampler.seen.tolist())
    assert 0 < len(changed) < len(before)
    world.draft.lm_head.weight.copy_(before)
    objective.refresh()
    assert torch.equal(objective.head, before[world.sampler.seen])


def test_negatives_are_a_steps_own(world: World) -> None:
    again = CandidateSampler(world.runs, world.frozen, 20)
    assert torch.equal(world.sampler.draw(7).ids, again.draw(7).ids)
    few = CandidateSampler(world.runs[:1], world.frozen, 20)
    assert not torch.equal(few.draw(7).ids, few.draw(8).ids)
    assert not torch.equal(few.draw(7).ids, CandidateSampler(world.runs[:1], world.frozen, 20, seed=1).draw(7).ids)
