"""Drift and faults in virtual time: the table of `make bench-policy` with fewer runs, and what its parts promise."""

from dataclasses import replace

import pytest

from bench.policy import told_apart
from tided.policies.suspicion import Cause
from tided.replay.incidents import PROBES, SOON_S, UNKNOWABLE_S, Incident, Outcome, play, right, row, scene

FAULTS = [incident for incident in Incident if incident.faulty]
DRIFTS = [incident for incident in Incident if incident.drifts]


@pytest.mark.parametrize("incident", FAULTS)
@pytest.mark.parametrize("seed", [100, 101])
def test_a_fault_is_named_soon_and_nothing_is_trained(incident: Incident, seed: int) -> None:
    outcome = play(scene(incident, seed))
    assert outcome.alarmed_s is not None
    assert 0 < outcome.alarmed_s <= SOON_S
    assert not [at for at in outcome.trainings if at > UNKNOWABLE_S]


@pytest.mark.parametrize("incident", DRIFTS)
@pytest.mark.parametrize("seed", [100, 101])
def test_drift_is_trained_for_and_raises_no_alarm(incident: Incident, seed: int) -> None:
    outcome = play(replace(scene(incident, seed), stopped=True))
    assert outcome.trainings
    assert outcome.alarms == ()
    assert outcome.drifted_s is not None


def test_steady_traffic_is_neither() -> None:
    for seed in (100, 101):
        outcome = play(replace(scene(Incident.NONE, seed), stopped=True))
        assert (outcome.alarms, outcome.trainings, outcome.drifted_s) == ((), (), None)


def test_where_few_requests_come_a_fault_is_named_in_a_minute_and_before_a_training() -> None:
    """It takes half a minute until the fall is sure; what was served since it began counts, and training waits for a hunch."""
    outcome = play(scene(Incident.TEMPERATURE, 15))
    assert outcome.alarmed_s is not None
    assert outcome.alarmed_s <= SOON_S
    assert not [at for at in outcome.trainings if at > UNKNOWABLE_S]


def test_an_engine_that_stopped_drafting_and_cannot_be_probed_is_found_out_too() -> None:
    """Nothing but requests that are drafted for again tells it from drift."""
    given = replace(scene(Incident.TEMPERATURE, 3), probed=False, rests=True, greedy=0.0, kept=0.15)
    outcome = play(given)
    assert outcome.alarmed_s is not None
    assert outcome.trainings == ()


def test_the_same_seed_plays_the_same() -> None:
    assert play(scene(Incident.SUDDEN_DRIFT, 7)) == play(scene(Incident.SUDDEN_DRIFT, 7))


def test_an_alarm_must_name_what_is_wrong() -> None:
    temperature, swap, drift = (
        scene(kind, 0) for kind in (Incident.TEMPERATURE, Incident.HALF_SWAP, Incident.SUDDEN_DRIFT)
    )
    told = (Cause.SAMPLING, Cause.LIKELIEST, Cause.EITHER, Cause.DRAFT, PROBES)
    assert [right(temperature, alarm) for alarm in told] == [True, True, True, False, False]
    assert [right(swap, alarm) for alarm in told] == [False, False, True, True, True]
    assert not any(right(drift, alarm) for alarm in told)


def test_the_table_counts_and_its_goals_can_be_missed() -> None:
    def found(incident: Incident, alarm_s: float | None, *trainings: float) -> Outcome:
        alarms = () if alarm_s is None else ((alarm_s, Cause.DRAFT),)
        return Outcome(scene(incident, 0), alarms, trainings, None, False)

    good = [
        row(Incident.HALF_SWAP, [found(Incident.HALF_SWAP, 20.0)]),
        row(Incident.SUDDEN_DRIFT, [found(Incident.SUDDEN_DRIFT, None, 80.0)]),
    ]
    assert all(claim.met is not False for claim in told_apart(good))
    bad = [
        row(Incident.HALF_SWAP, [found(Incident.HALF_SWAP, 70.0, 30.0), found(Incident.HALF_SWAP, -5.0)]),
        row(Incident.SUDDEN_DRIFT, [found(Incident.SUDDEN_DRIFT, 20.0)]),
    ]
    assert (bad[0].right_soon, bad[0].trained, bad[0].wrong, bad[1].wrong) == (0, 1, 1, 1)
    missed = {claim.id for claim in told_apart(bad) if claim.met is False}
    assert missed == {"faults-trained", "faults-alarmed", "drifts-trained", "drifts-alarmed", "alarms-wrong"}
