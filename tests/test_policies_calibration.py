"""T(n) from served steps: a wrong profile is put right, load that slows everything changes nothing, the past fades."""

from dataclasses import replace

import pytest

from tests.test_policies_threshold import PROFILE, decide, ran, seen
from tided.config import SpeculationConfig
from tided.model.engines import LatencyProfile, StepCounts
from tided.policies.calibration import Calibration
from tided.policies.speedup import step_s, target_s
from tided.replay.compare import compare
from tided.replay.generate import generate

WRONG = replace(PROFILE, target_s=tuple(max(seconds, 0.068) for seconds in PROFILE.target_s))


def steps(profile: LatencyProfile, batch: int, gamma: int, factor: float = 1.0, count: int = 20) -> StepCounts:
    """`count` steps that took `factor` times what `profile` says."""
    accepted = (count * batch, *([0] * gamma))
    return StepCounts(batch, gamma, count, factor * count * step_s(profile, batch, gamma), accepted)


def test_a_wrong_profile_is_put_right_where_steps_were_measured() -> None:
    calibration = Calibration.of(WRONG, 0.0)
    for half in range(40):
        calibration = calibration.add(
            half / 2, [steps(PROFILE, batch, gamma) for batch in (1, 2, 4) for gamma in (0, 3)]
        )
    found = calibration.corrected()
    for tokens in (1, 2, 4, 8, 16):
        assert target_s(found, tokens) == pytest.approx(target_s(PROFILE, tokens), rel=0.1), tokens


def test_what_is_around_every_step_is_no_load() -> None:
    around_s = 0.08 * min(PROFILE.target_s)
    served = steps(PROFILE, 1, 0, count=400)
    calibration = Calibration.of(PROFILE, 0.0).add(1.0, [replace(served, seconds=served.seconds + 400 * around_s)])
    for tokens, seconds in zip(PROFILE.tokens, PROFILE.target_s, strict=True):
        found = target_s(calibration.corrected(), tokens)
        assert found == pytest.approx(seconds + around_s, rel=0.02), tokens


def test_load_that_slows_everything_changes_no_prediction() -> None:
    calm = [seen(0.35, now_s=i / 2, measured=(steps(PROFILE, 2, 0),)) for i in range(60)]
    loaded = [replace(each, measured=(steps(PROFILE, 2, 0, 2.0),)) for each in calm]
    one, other = decide(*calm)[-1], decide(*loaded)[-1]
    for choice, theirs in zip(one.choices, other.choices, strict=True):
        assert choice.speedups == pytest.approx(theirs.speedups, rel=0.1)


def test_nothing_measured_is_the_profile_and_the_past_fades() -> None:
    calibration = Calibration.of(PROFILE, 0.0)
    assert calibration.corrected().target_s == pytest.approx(PROFILE.target_s)
    assert calibration.add(1.0, ran(0)).corrected().target_s == pytest.approx(PROFILE.target_s)
    slow = calibration.add(1.0, [steps(PROFILE, 1, 0, 1.5, count=400)])
    assert slow.corrected().target_s[0] == pytest.approx(1.5 * PROFILE.target_s[0], rel=0.1)
    assert slow.add(1200.0, []).corrected().target_s == pytest.approx(PROFILE.target_s, rel=0.03)


def test_an_engine_with_a_wrong_profile_is_served_nearly_as_well() -> None:
    found = compare(generate("misprofiled", 2, 300.0), ["threshold"], SpeculationConfig())
    assert found.of("threshold").regret < 0.035
