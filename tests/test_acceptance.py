"""What a draft must accept, position by position, and that an engine which serves it with a fault is found out and the fault named."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.peer import Array
from tests.loop import train_draft
from tests.shards import Sample, write_shard
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3
from tided.model.engines import RequestStats
from tided.model.jobs import Chain, DraftFault, JobKind, JobSpec
from tided.model.verification import CheckOutcome
from tided.services.acceptance import CAUSES, Drafted, judge, reachable
from tided.training.chains import bounds
from tided.training.data import read_runs, whole_packs
from tided.training.evaluate import chains
from tided.training.losses import Frozen
from tided.training.trainer import score

GAMMA = 3
ANSWER = 12


def serve(right: Sequence[int], draw: random.Random, idle: float = 0.0) -> tuple[int, int]:
    """(drafting steps, accepted tokens) of an engine: of a step's drafted tokens `right[at]` are accepted; `idle` steps draft none."""
    at = steps = accepted = 0
    while at < len(right):
        taken = 0
        if draw.random() >= idle:
            room = len(right) - at
            taken = right[at]
            counted = min(taken, room - 1) if draw.random() < 0.5 else taken
            steps, accepted = steps + 1, accepted + counted
        at += taken + 1
    return steps, accepted


@given(st.lists(st.integers(0, GAMMA), min_size=1, max_size=14), st.integers(0, 3), st.randoms(use_true_random=False))
def test_whatever_an_engine_does_with_these_tokens_is_reachable(
    right: list[int], open_: int, draw: random.Random
) -> None:
    right = [min(value, len(right) - at) for at, value in enumerate(right)]
    low, high = [max(0, value - open_) for value in right], [min(GAMMA, value + open_) for value in right]
    found = reachable(Chain("0a", tuple(low), tuple(high)), GAMMA)
    assert serve(right, draw) in found
    assert serve(right, draw, idle=0.3) in found


def test_what_it_cannot_have_done_is_not() -> None:
    chain = Chain("0a", (2, 0, 0, 1, 0), (2, 0, 0, 1, 0))
    assert reachable(chain, 2) >= {(2, 3), (2, 2)}
    assert not any(accepted == 0 and steps == 5 for steps, accepted in reachable(chain, 2))


def reports(chains_: Sequence[Chain], version: str) -> tuple[tuple[RequestStats, ...], ...]:
    """As an engine reports which accepts what these say."""
    served = [serve(chain.low, random.Random(0)) for chain in chains_]
    return tuple((RequestStats(9, ANSWER, steps, GAMMA * steps, accepted, version),) for steps, accepted in served)


@dataclass(frozen=True)
class Scene:
    """A trained draft that accepts nearly everything on the `groups`; `found`: what the score job says of it."""

    spec: JobSpec
    probes: tuple[Sample, ...]
    groups: tuple[str, ...]
    found: tuple[Chain, ...]

    def of(self, fault: DraftFault) -> list[Chain]:
        by_group = {chain.group: chain for chain in self.found if chain.fault is fault}
        return [by_group[group] for group in self.groups]

    def drafted(self, served: Sequence[Chain]) -> Drafted:
        return Drafted(self.groups, reports(served, "v"), gamma=GAMMA)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("acceptance")
    spec, staged, probes = train_draft(root, GAMMA, ANSWER)
    groups = tuple(sample.group.hex() for sample in probes)
    asked = replace(spec, kind=JobKind.SCORE, draft_dir=staged, groups=groups, previous_dir=spec.draft_dir)
    return Scene(asked, tuple(probes), groups, score(asked, lambda _: None).chains)


def test_the_draft_as_it_is_passes(scene: Scene) -> None:
    check = judge("tiny@1", scene.found, scene.drafted(scene.of(DraftFault.NONE)))
    assert check.outcome is CheckOutcome.OK, check.measured


def test_another_draft_is_found_out(scene: Scene) -> None:
    """Version 0 serves where the trained one should: its whole swap was not applied."""
    check = judge("tiny@1", scene.found, scene.drafted(scene.of(DraftFault.PREVIOUS)))
    assert check.outcome is CheckOutcome.FAILED
    assert CAUSES[DraftFault.PREVIOUS] in check.measured


SOUND = (2, 1, 3, 0, 2, 3, 1, 0, 2, 2, 1)


@pytest.mark.parametrize("fault", list(CAUSES))
def test_a_fault_is_named_where_it_explains_what_was_served(fault: DraftFault) -> None:
    sound, faulty = Chain("0a", SOUND, SOUND), Chain("0a", (0,) * 11, (0,) * 11, fault)
    others = [Chain("0a", SOUND, SOUND, other) for other in CAUSES if other is not fault]
    drafted = Drafted(("0a",), reports([faulty], "v"), gamma=GAMMA)
    check = judge("tiny@1", (sound, faulty, *others), drafted)
    assert check.outcome is CheckOutcome.FAILED
    assert check.measured.endswith(CAUSES[fault])
    unexplained = judge("tiny@1", (sound, *others), drafted)
    assert unexplained.outcome is CheckOutcome.FAILED
    assert "neither another version's weights" in unexplained.measured


def test_each_fault_is_what_it_says(scene: Scene, tmp_path: Path) -> None:
    """The same samples with the fault in them, or the other draft, say the same."""

    def asked(samples: Sequence[Sample], draft_dir: str) -> list[Chain]:
        path = str(write_shard(tmp_path / "faulty.safetensors", samples))
        spec = replace(scene.spec, held_out=(path,), draft_dir=draft_dir, previous_dir="")
        return [chain for chain in score(spec, lambda _: None).chains if not chain.fault]

    def with_states(change: Callable[[Array], Array]) -> list[Sample]:
        return [replace(sample, states=change(sample.states)) for sample in scene.probes]

    trained, first = scene.spec.draft_dir, scene.spec.previous_dir
    late = with_states(lambda states: np.concatenate((states[:1], states[:-1])))
    early = with_states(lambda states: np.concatenate((states[1:], states[-1:])))
    order = with_states(lambda states: states[:, [2, 1, 0, 3]])
    wanted = {
        DraftFault.FEATURES_LATE: asked(late, trained),
        DraftFault.FEATURES_EARLY: asked(early, trained),
        DraftFault.FEATURES_ORDER: asked(order, trained),
        DraftFault.PREVIOUS: asked(scene.probes, first),
    }
    for fault, chains_ in wanted.items():
        assert {replace(chain, fault=fault) for chain in chains_} == set(scene.of(fault)), fault


def test_a_draft_that_accepts_next_to_nothing_proves_nothing(scene: Scene) -> None:
    spec = replace(scene.spec, draft_dir=scene.spec.previous_dir, previous_dir="")
    found = score(spec, lambda _: None).chains
    nothing = [chain for chain in found if not chain.fault]
    check = judge("tiny@0", found, Drafted(tuple(chain.group for chain in nothing), reports(nothing, "v"), gamma=GAMMA))
    assert check.outcome is CheckOutcome.SKIPPED
    assert "too few to tell" in check.measured


def test_bounds_hold_what_the_evaluation_counts(scene: Scene) -> None:
    source = checkpoint.load(Path(scene.spec.draft_dir))
    draft, frozen = Eagle3.of(source), Frozen.read(Path(scene.spec.target_dir), source, "cpu")
    runs = read_runs(scene.spec.held_out, source.config.hidden, source.config.vocab)
    for pack in whole_packs(runs, 1024, skip=1):
        low, high = bounds(draft, pack, frozen, GAMMA)
        right = chains(draft, pack, frozen, GAMMA)
        assert bool((low <= right).all())
        assert bool((right <= high).all())
        assert int(right.sum()) > 0
