"""Acceptance at a temperature, against an engine that really samples, and the walk against every course that it could take."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.shards import Sample, prompts, write_shard
from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3
from tided.engine.embedded.drafter import Drafter
from tided.engine.embedded.sampling import SamplingParams
from tided.engine.embedded.scheduler import Output, Request, Scheduler
from tided.engine.embedded.target import Target
from tided.model.drafts import SamplingScore
from tided.model.engines import RequestStats
from tided.policies.faults import ratio
from tided.training.data import Piece, Run, pack, read_shard
from tided.training.evaluate import evaluate, walk
from tided.training.loop import pack_loss
from tided.training.losses import CandidateSampler, Frozen, whole_head
from tided.training.options import Precision, TrainOptions
from tided.training.sampling import evaluate_sampling, expected_walk

GAMMA = 3
TOKENS = 40
HOT = 1.0


class Memory:
    """A tap that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def begin(self, request_id: str, prompt_ids: Sequence[int], opt_out: bool) -> None:
        self.rows[request_id] = []

    def record(self, segments: Sequence[tuple[str, int, int]], ids: Sequence[int], rows: Tensor) -> None:
        for (request_id, _, _), part in zip(segments, rows.split([rows for _, _, rows in segments]), strict=True):
            self.rows[request_id].append(part.clone())

    def end(self, request_id: str, finish: str, tail: Sequence[int]) -> None:
        pass


class World:
    """A tiny target, a draft that is right at times, and answers at two temperatures as the embedded engine gave them with it."""

    def __init__(self, root: Path) -> None:
        self.target_dir = make_target(root / "target")
        source = checkpoint.load(make_draft(self.target_dir, root / "draft", draft_vocab=VOCAB - 16))
        self.draft = Eagle3.of(source)
        self.frozen = Frozen.read(self.target_dir, source, "cpu")
        self.head = whole_head(self.target_dir, "cpu")
        self.served: dict[float, list[RequestStats]] = {}
        self._train(read_shard(write_shard(root / "train.safetensors", self._serve(HOT, 24, seed=9)), 48))
        self.runs: dict[float, list[Run]] = {}
        for temperature in (0.0, HOT):
            samples = self._serve(temperature, 96, seed=round(10 * temperature))
            self.runs[temperature] = read_shard(write_shard(root / f"{temperature}.safetensors", samples), 48)

    def _train(self, runs: list[Run]) -> None:
        optimizer = torch.optim.AdamW(self.draft.parameters(), lr=3e-3)
        everything = CandidateSampler(runs, self.frozen, VOCAB).draw()
        packed = pack([Piece(run, run.queries(0)) for run in runs])
        options = TrainOptions(precision=Precision.FP32, unroll_steps=GAMMA)
        for _ in range(60):
            head = self.draft.lm_head.weight[everything.ids]
            pack_loss(self.draft, head, packed, self.frozen, everything, options).backward()
            optimizer.step()
            optimizer.zero_grad()

    def _serve(self, temperature: float, requests: int, seed: int) -> list[Sample]:
        target = Target(self.target_dir, dtype=torch.float32, max_context=128, gamma_max=GAMMA)
        tap = Memory()
        scheduler = Scheduler(target, Drafter(self.draft, target), tap, gammas=(GAMMA,))
        told: dict[str, list[Output]] = {}
        asked = {str(i): prompt for i, prompt in enumerate(prompts(requests, VOCAB, seed=seed))}
        for i, (name, prompt) in enumerate(asked.items()):
            params = SamplingParams(temperature, seed=i)
            told[name] = []
            scheduler.submit(Request(name, tuple(prompt), TOKENS, told[name].append, params, ignore_eos=True))
        while scheduler.running or scheduler.waiting:
            scheduler.step()
        self.served[temperature] = list(scheduler.take_counts()[1])
        samples: list[Sample] = []
        for name, prompt in asked.items():
            ids = [*prompt, *(token for output in told[name] for token in output.tokens)]
            samples.append(Sample(torch.cat(tap.rows[name]).numpy(), np.array(ids, np.int64), len(prompt)))
        return samples

    def scores(self, runs: Sequence[Run], **shares: float) -> dict[float, SamplingScore]:
        """By temperature; `shares` are named by ten times that ("t10")."""
        mix = [(int(name[1:]) / 10, share) for name, share in shares.items()]
        found = evaluate_sampling(self.draft, runs, self.frozen, self.head, GAMMA, mix, autocast=False)
        return {score.temperature: score for score in found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def length_of(score: SamplingScore) -> float:
    return 1 + sum(score.accepted) / sum(score.steps)


def served_length(stats: Sequence[RequestStats]) -> tuple[float, float]:
    """What was accepted as it happened, and its standard error."""
    mean, error = ratio([float(item.accepted) for item in stats], [float(item.spec_steps) for item in stats])
    return 1 + mean, error


def test_the_score_is_what_an_engine_accepts_that_samples(world: World) -> None:
    """The same answers, walked in expectation and as it happened."""
    (score,) = world.scores(world.runs[HOT], t10=1.0).values()
    length, error = served_length(world.served[HOT])
    assert {item.temperature for item in world.served[HOT]} == {HOT}
    assert 1.3 < length < 3.5, "a draft that is never right, or never wrong, shows nothing"
    assert error < 0.05
    assert length_of(score) == pytest.approx(length, abs=2.5 * error)
    # Greedy drafting accepts the likeliest token as often as the target samples it.
    likeliest = evaluate(world.draft, world.runs[HOT], world.frozen, GAMMA, autocast=False).conditional
    assert score.likeliest == pytest.approx(likeliest, abs=0.06)


def test_mixed_runs_are_told_apart_by_their_tokens(world: World) -> None:
    mixed = [*world.runs[HOT], *world.runs[0.0]]
    random.Random(0).shuffle(mixed)
    found = world.scores(mixed, t00=0.5, t10=0.5)
    for temperature in (0.0, HOT):
        length, error = served_length(world.served[temperature])
        assert length_of(found[temperature]) == pytest.approx(length, abs=2.5 * error)
    greedy = evaluate(world.draft, world.runs[0.0], world.frozen, GAMMA, autocast=False)
    assert found[0.0].conditional == pytest.approx(greedy.conditional, abs=0.03)
    assert found[0.0].conditional == found[0.0].likeliest


def test_greedy_requests_alone_are_scored_as_the_gate_scores_them(world: World) -> None:
    """By their tokens; the target's head is not asked."""
    greedy = evaluate(world.draft, world.runs[0.0], world.frozen, GAMMA, autocast=False)
    nothing = torch.full_like(world.head, float("nan"))
    (found,) = evaluate_sampling(
        world.draft, world.runs[0.0], world.frozen, nothing, GAMMA, [(0.0, 1.0)], autocast=False
    )
    assert found.conditional == pytest.approx(greedy.conditional)
    assert len(found.steps) == len(greedy.groups)


def test_a_run_of_likeliest_tokens_counts_by_the_shares(world: World) -> None:
    """It may be either: where all requests are sampled it is a sampled one."""
    (run,) = world.runs[0.0][:1]
    short = replace(run, states=run.states[: run.prompt_tokens + 2], ids=run.ids[: run.prompt_tokens + 4])
    even = world.scores([short], t00=0.5, t10=0.5)
    rare = world.scores([short], t00=0.01, t10=0.99)
    assert even[0.0].steps[0] > rare[0.0].steps[0] > 0
    total = sum(score.steps[0] for score in rare.values())
    assert total == pytest.approx(len(short.queries(1)), rel=0.5)


def test_without_the_last_state_nothing_is_scored(world: World) -> None:
    bare = [replace(run, states=run.states[:, :3]) for run in world.runs[HOT]]
    assert world.scores(bare, t00=0.5, t10=0.5) == {}


def every_course(kept: list[list[float]], given: list[list[float]], start: int = 0) -> np.ndarray:
    """[2, gamma] expected counts from `start` on, by following each way in which the drafted tokens may be kept or not."""
    n, gamma = len(kept), len(kept[0])
    counts = np.zeros((2, gamma))
    if start >= n:
        return counts
    depth = min(gamma, n - start)
    for outcome in product((True, False), repeat=depth):
        chance = float(np.prod([kept[start][k] if yes else 1 - kept[start][k] for k, yes in enumerate(outcome)]))
        accepted = outcome.index(False) if False in outcome else depth
        judged = min(accepted + 1, depth)
        mine = np.zeros((2, gamma))
        mine[0, :judged] = 1
        mine[1, :judged] = given[start][:judged]
        counts += chance * (mine + every_course(kept, given, start + accepted + 1))
    return counts


@pytest.mark.parametrize(("length", "gamma"), [(1, 1), (1, 3), (5, 2), (4, 3)])
def test_the_walk_is_the_mean_of_every_course(length: int, gamma: int) -> None:
    draw = np.random.default_rng(length)
    kept, given = draw.random((length, gamma)), draw.random((length, gamma))
    found = expected_walk(torch.from_numpy(kept), torch.from_numpy(given))
    np.testing.assert_allclose(found.numpy(), every_course(kept.tolist(), given.tolist()))


def test_the_walk_over_certain_tokens_is_the_walk() -> None:
    right = [2, 0, 3, 1, 0, 0]
    kept = torch.tensor([[float(k < count) for k in range(3)] for count in right])
    assert expected_walk(kept, kept).tolist() == walk(right, 3).tolist()
