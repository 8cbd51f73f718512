"""What an engine's view tells the speculation policy: each count once, and nothing of another version."""

from dataclasses import replace

import pytest

from tests.fake_plane import DIGESTS, INFO
from tided.backends.guarded import AbsentBackend
from tided.model.drafts import Evaluation
from tided.model.engines import Observation, StepCounts, TapTotals
from tided.policies.speedup import Acceptance
from tided.policies.training import AcceptanceTrend
from tided.services.monitor import MOST_UNTOLD, SHADOW_TRIALS, EngineView, Meter

COUNTS = StepCounts(2, 1, 10, 0.5, (12, 8))
REPORT = Observation("local", "local-1", 1, 0, INFO.version, 2, 0, (COUNTS,), (), TapTotals())


def view() -> EngineView:
    trend = AcceptanceTrend.start(4, 32, 0.05)
    made = EngineView(INFO, AbsentBackend("local", ""), trend, Meter(4), 0.0)
    made.restart(INFO.version)
    return made


def test_what_was_measured_is_told_once() -> None:
    seen = view()
    seen.take(REPORT, 1.0)
    seen.take(REPORT, 1.5)
    assert seen.told() == ((COUNTS, COUNTS), Acceptance())
    assert seen.told()[0] == ()
    assert seen.acceptance.alpha == pytest.approx(0.4)


def test_another_versions_counts_are_not_told() -> None:
    seen = view()
    seen.take(REPORT, 1.0)
    seen.take(replace(REPORT, version=DIGESTS[0]), 1.5)  # mixes both
    assert seen.told()[0] == ()


def test_an_engine_that_no_policy_is_asked_about_does_not_fill_the_memory() -> None:
    seen = view()
    for number in range(2 * MOST_UNTOLD):
        seen.take(REPORT, number / 2)
    assert len(seen.told()[0]) == MOST_UNTOLD


def test_what_a_draft_scores_on_tapped_states_counts_as_steps_and_is_told_once() -> None:
    seen = view()
    seen.take(REPORT, 1.0)
    before = seen.acceptance
    seen.hear(Evaluation(INFO.version, 2, ("00",), (2.0,), (600,), (0.8, 0.5)))  # 300 steps
    assert seen.told()[1] == Acceptance((240.0, 150.0), (300.0, 300.0))
    assert seen.told()[1] == Acceptance()
    assert before.conditional(0) < seen.acceptance.conditional(0) < 0.8
    seen.hear(Evaluation(INFO.version, 2, ("00",), (2.0,), (60_000,), (0.8, 0.5)))
    assert seen.told()[1].steps == SHADOW_TRIALS  # its requests are few, however long
    seen.hear(Evaluation(INFO.version, 2, (), (), (), (0.0, 0.0)))
    assert seen.told()[1].steps == 0.0
