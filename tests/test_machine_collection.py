"""Algorithm 1: the whole phase x event table, and random histories."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tided.machine.collection import (
    HOUR_MS,
    PLATEAU,
    AnnounceDrift,
    Collection,
    CollectionEvent,
    CollectionRules,
    DriftAnswered,
    JobSubmitted,
    Outcome,
    Phase,
    Reject,
    RestartTrend,
    RowsStored,
    StartTraining,
    TimePassed,
    TrainingEnded,
    TrainingRequested,
    TrendJudged,
    capture_wanted,
    over_budget,
    step,
    validate_state,
)
from tided.model.codec import from_plain, to_plain
from tided.model.errors import InvariantBroken
from tided.model.jobs import Recipe

NOW = 1_000_000
LOW = ("a",)
RULES = CollectionRules(min_rows=100, max_rows=300, cool_down_ms=1_000)

COLD = Collection(rows=10)
FULL_COOLING = Collection(rows=100, not_before_ms=NOW + 1)
FULL = Collection(rows=100, not_before_ms=NOW)
TRAINING = Collection(Phase.TRAINING, rows=50, trainings=1, job="job-1")
LATER = Collection(rows=10, trainings=1, deployed=1)
RETRAINING = Collection(Phase.TRAINING, rows=50, trainings=2, deployed=1, job="job-2")
STOPPED = Collection(Phase.STOPPED, trainings=2, deployed=1)
STOPPED_LOW = replace(STOPPED, low=LOW, drifts=1, drifts_seen=1, drifts_answered=1)
DRIFTING = replace(LATER, low=LOW, drifts=1)
DRIFT_TRAINING = replace(RETRAINING, low=LOW, drifts=1, drifts_seen=1)
MOVED = replace(DRIFT_TRAINING, drifts=2, domain=1, moved=True, not_before_ms=NOW - 1)
STATES = {
    "cold": COLD,
    "full-cooling": FULL_COOLING,
    "full": FULL,
    "training": TRAINING,
    "later": LATER,
    "retraining": RETRAINING,
    "stopped": STOPPED,
    "stopped-low": STOPPED_LOW,
    "drifting": DRIFTING,
    "drift-training": DRIFT_TRAINING,
    "moved": MOVED,
}
EVENTS: dict[str, CollectionEvent] = {
    "rows": RowsStored(NOW, 100),
    "few-rows": RowsStored(NOW, 99),
    "low": TrendJudged(NOW, LOW),
    "normal": TrendJudged(NOW, ()),
    "requested": TrainingRequested(NOW),
    "submitted": JobSubmitted(NOW, "job-9"),
    "deployed": TrainingEnded(NOW, Outcome.DEPLOYED),
    "pooled": TrainingEnded(NOW, Outcome.POOLED),
    "worse": TrainingEnded(NOW, Outcome.WORSE),
    "undecided": TrainingEnded(NOW, Outcome.UNDECIDED),
    "job-failed": TrainingEnded(NOW, Outcome.FAILED),
    "rolled-back": TrainingEnded(NOW, Outcome.ROLLED_BACK),
    "time": TimePassed(NOW),
    "answered": DriftAnswered(NOW, 1),
}

C, T, X = Phase.COLLECTING, Phase.TRAINING, Phase.STOPPED
# phase after each event, in the order of EVENTS
PHASES = {
    "cold": (T, C, C, C, T, C, C, C, C, C, C, C, C, C),
    "full-cooling": (C, C, C, C, T, C, C, C, C, C, C, C, C, C),
    "full": (T, C, C, C, T, C, C, C, C, C, C, C, T, C),
    "training": (T, T, T, T, T, T, C, C, C, C, C, C, T, T),
    "later": (T, C, C, C, T, C, C, C, C, C, C, C, C, C),
    "retraining": (T, T, T, T, T, T, C, C, X, C, C, X, T, T),
    "stopped": (X, X, C, X, X, X, X, X, X, X, X, X, X, X),
    "stopped-low": (X, X, X, X, X, X, X, X, X, X, X, X, X, X),
    "drifting": (T, C, C, C, T, C, C, C, C, C, C, C, C, C),
    "drift-training": (T, T, T, T, T, T, C, C, X, C, C, X, T, T),
    "moved": (T, T, T, T, T, T, C, C, C, C, C, C, T, T),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_whole_table(state: str, event: str) -> None:
    before = STATES[state]
    validate_state(before)
    after, actions = step(before, EVENTS[event], RULES)
    validate_state(after)
    assert after.phase is PHASES[state][list(EVENTS).index(event)]
    began = before.phase is not T and after.phase is T
    assert any(isinstance(action, StartTraining) for action in actions) == began
    assert any(isinstance(action, AnnounceDrift) for action in actions) == (after.drifts > before.drifts)
    assert (RestartTrend() in actions) == (after.deployed > before.deployed)
    if event == "requested" and not began:
        assert isinstance(actions[0], Reject)
    if began:
        assert after.trainings == before.trainings + 1


def test_a_drift_that_a_pooled_draft_answered_needs_no_training_and_the_next_one_counts() -> None:
    after, actions = step(DRIFTING, DriftAnswered(NOW, 1), RULES)
    assert (after.drifting, after.drifts, after.low, actions) == (False, 1, (), ())
    assert step(after, DriftAnswered(NOW, 1), RULES) == (after, ())  # a level
    assert step(after, DriftAnswered(NOW, 9), RULES) == (after, ())  # never more than there were
    again, actions = step(after, TrendJudged(NOW, LOW), RULES)
    assert (again.drifts, actions) == (2, (AnnounceDrift(LOW),))


def test_the_recipe_follows_from_what_came_before() -> None:
    learning, settled = replace(LATER, gains=(0.01, 0.08)), replace(LATER, gains=(0.3, 0.04))
    for state, recipe in (
        (FULL, Recipe.COLD),
        (LATER, Recipe.REFRESH),
        (DRIFTING, Recipe.DRIFT),
        (learning, Recipe.DRIFT),
        (settled, Recipe.REFRESH),
    ):
        assert step(state, RowsStored(NOW, 100), RULES)[1] == (StartTraining(recipe, state.since_ms),)


def test_after_a_drift_only_newer_samples_count() -> None:
    after, _ = step(replace(LATER, rows=90), TrendJudged(NOW, LOW), RULES)
    assert (after.rows, after.since_ms, after.drifting, after.drifts) == (0, NOW, True, 1)
    again, actions = step(after, TrendJudged(NOW + 5, LOW), RULES)
    assert (again, actions) == (after, ())


def test_acceptance_that_hovers_about_the_threshold_does_not_put_the_training_off() -> None:
    state = LATER
    for n in range(10):
        state, _ = step(state, TrendJudged(NOW + n, LOW if n % 2 == 0 else ()), RULES)
    assert (state.drifts, state.since_ms) == (1, NOW)


def test_a_trend_that_stays_low_after_a_worse_draft_waits_for_the_next_drift() -> None:
    state, _ = step(DRIFT_TRAINING, TrainingEnded(NOW, Outcome.WORSE), RULES)
    assert state.phase is X
    state, actions = step(state, TrendJudged(NOW + 1, LOW), RULES)
    assert (state.phase, actions) == (X, ())
    state, _ = step(state, TrendJudged(NOW + 2, ()), RULES)
    state, actions = step(state, TrendJudged(NOW + 3, LOW), RULES)
    assert (state.phase, actions) == (C, (AnnounceDrift(LOW),))


def test_a_drift_in_the_middle_of_a_training_is_still_to_be_answered_after_it() -> None:
    state, actions = step(RETRAINING, TrendJudged(NOW, LOW), RULES)
    assert (state.phase, actions) == (T, (AnnounceDrift(LOW),))
    assert state.moved
    for outcome in (Outcome.DEPLOYED, Outcome.POOLED, Outcome.WORSE):
        after, _ = step(state, TrainingEnded(NOW + 1, outcome), RULES)
        assert (after.phase, after.drifting, after.moved) == (C, True, False)
        after, actions = step(after, RowsStored(NOW + 2_000, 100), RULES)
        assert actions == (StartTraining(Recipe.DRIFT, NOW),)


def test_a_draft_for_traffic_that_has_gone_leaves_the_drift_and_delays_no_training_for_it() -> None:
    rules = replace(RULES, jobs_per_hour=2)
    state, _ = step(replace(MOVED, spent=((NOW - 90, 0),)), TrainingEnded(NOW, Outcome.POOLED, worker_ms=40), rules)
    assert (state.drifts_answered, state.drifting, state.deployed, state.low) == (1, True, MOVED.deployed, LOW)
    assert (state.spent, state.job, state.domain) == (((NOW - 90, 40),), "", 0)
    after, actions = step(state, RowsStored(NOW, 100), rules)  # no cool-down
    assert actions == (StartTraining(Recipe.DRIFT, MOVED.since_ms),)
    full = replace(state, spent=((NOW - 95, 0), *state.spent))
    assert step(full, RowsStored(NOW, 100), rules) == (replace(full, rows=100), ()), "the budget holds"
    answered, _ = step(MOVED, DriftAnswered(NOW, 2), RULES)
    after, _ = step(answered, TrainingEnded(NOW, Outcome.POOLED), RULES)
    assert (after.drifting, after.not_before_ms) == (False, NOW + RULES.cool_down_ms)


def test_a_training_s_traffic_is_noted_with_its_job_and_states_of_before_do_not_know_it() -> None:
    begun, _ = step(FULL, RowsStored(NOW, 100), RULES)
    begun, _ = step(begun, JobSubmitted(NOW, "job-3", 7), RULES)
    assert (begun.job, begun.domain, begun.moved) == ("job-3", 7, False)
    stored = to_plain(begun)
    del stored["domain"], stored["moved"]
    assert from_plain(Collection, stored) == replace(begun, domain=0)


def test_a_failed_job_costs_a_cool_down_and_no_more() -> None:
    state, _ = step(replace(DRIFT_TRAINING, rows=200), TrainingEnded(NOW, Outcome.FAILED), RULES)
    assert (state.phase, state.drifting, state.job) == (C, True, "")
    state, actions = step(state, TimePassed(NOW + 999), RULES)
    assert actions == ()
    state, actions = step(state, TimePassed(NOW + 1_000), RULES)
    assert actions == (StartTraining(Recipe.DRIFT, state.since_ms),)


def ended(state: Collection, gain: float, rules: CollectionRules) -> Collection:
    training = replace(state, phase=T, trainings=state.trainings + 1, drifts_seen=state.drifts, job="job-1")
    return step(training, TrainingEnded(NOW, Outcome.DEPLOYED, gain), rules)[0]


def test_drafts_that_are_hardly_better_end_collection_until_drift() -> None:
    rules = replace(RULES, plateau_gain=0.02)
    once = ended(LATER, 0.01, rules)
    assert once.phase is C
    assert ended(once, 0.03, rules).phase is C
    twice = ended(once, 0.015, rules)
    assert (twice.phase, twice.gains) == (X, (0.01, 0.015))
    assert not capture_wanted(twice, rules)
    assert ended(once, 0.015, RULES).phase is C, "switched off"
    drifting, _ = step(twice, TrendJudged(NOW, LOW), rules)
    assert (drifting.phase, drifting.gains) == (C, ())
    # A drift in the middle of the training is still to be answered.
    during = replace(once, phase=T, trainings=3, drifts=1, job="job-1")
    assert step(during, TrainingEnded(NOW, Outcome.DEPLOYED, 0.0), rules)[0].phase is C


def test_no_more_jobs_begin_in_an_hour_than_the_budget_has() -> None:
    rules = replace(RULES, jobs_per_hour=2)
    spent = replace(FULL, spent=((NOW - HOUR_MS, 5), (NOW - 10, 5)))
    assert over_budget(spent, NOW, rules) == ""
    full = replace(spent, spent=((NOW - HOUR_MS + 1, 5), (NOW - 10, 5)))
    assert "training.jobs_per_hour" in over_budget(full, NOW, rules)
    assert step(full, RowsStored(NOW, 100), rules) == (full, ())
    assert step(full, TimePassed(NOW + 1), rules)[0].phase is T
    assert step(full, TrainingRequested(NOW), rules)[0].phase is T, "an operator may"


def test_worker_time_within_an_hour_keeps_to_the_budget_though_a_job_takes_as_long_as_it_may() -> None:
    rules = replace(RULES, worker_ms_per_hour=100, job_ms=60)
    training, _ = step(FULL, RowsStored(NOW, 100), rules)
    after, _ = step(training, TrainingEnded(NOW + 40, Outcome.UNDECIDED, worker_ms=40), rules)
    assert after.spent == ((NOW, 40),)
    later = NOW + 40 + RULES.cool_down_ms
    assert step(after, TimePassed(later), rules)[0].phase is T
    dear = replace(after, spent=((NOW, 41),))
    assert "training.worker_s_per_hour" in over_budget(dear, later, rules)
    assert step(dear, TimePassed(later), rules) == (dear, ())


def test_capture_is_wanted_only_while_it_may_be_used() -> None:
    assert capture_wanted(COLD, RULES)
    assert capture_wanted(replace(TRAINING, rows=299), RULES)
    assert not capture_wanted(replace(TRAINING, rows=300), RULES)
    assert not capture_wanted(STOPPED, RULES)


@pytest.mark.parametrize(
    "broken",
    [
        replace(LATER, job="job-1"),
        replace(LATER, deployed=2),
        replace(STOPPED, drifts=1),
        replace(STOPPED, deployed=0),
        replace(LATER, drifts_seen=1),
        replace(LATER, rows=-1),
        replace(LATER, domain=1),
        replace(LATER, moved=True),
    ],
)
def test_impossible_states_are_recognised(broken: Collection) -> None:
    with pytest.raises(InvariantBroken):
        validate_state(broken)


class AnyHistory(RuleBasedStateMachine):
    """One training at a time, never inside a cool-down, on too few rows or over budget unless an operator asks, and never stuck."""

    bounds = replace(RULES, jobs_per_hour=3, worker_ms_per_hour=10_000, job_ms=4_000, plateau_gain=0.02)

    def __init__(self) -> None:
        super().__init__()
        self.began = list[list[int]]()  # of each training: when, and what it may take, or took
        self.now_ms = NOW
        self.state = Collection()
        self.training = False

    def happen(self, event: CollectionEvent) -> None:
        before = self.state
        self.state, actions = step(before, event, self.bounds)
        for action in actions:
            if isinstance(action, StartTraining):
                assert not self.training
                self.training = True
                asked = isinstance(event, TrainingRequested)
                self.began.append([self.now_ms, self.bounds.job_ms])
                hour = [took for at, took in self.began if self.now_ms - at < HOUR_MS]
                assert asked or (len(hour) <= 3 and sum(hour) <= self.bounds.worker_ms_per_hour)
                assert asked or (self.state.rows >= RULES.min_rows and self.now_ms >= before.not_before_ms)
                assert self.state.rows > 0

    @rule(rows=st.integers(0, 400))
    def stored(self, rows: int) -> None:
        self.happen(RowsStored(self.now_ms, rows))

    @rule(low=st.sets(st.sampled_from(("a", "b"))))
    def judged(self, low: set[str]) -> None:
        self.happen(TrendJudged(self.now_ms, tuple(sorted(low))))

    @rule()
    def requested(self) -> None:
        self.happen(TrainingRequested(self.now_ms))

    @rule()
    def submitted(self) -> None:
        self.happen(JobSubmitted(self.now_ms, "job-1", 2))

    @rule(outcome=st.sampled_from(Outcome), gain=st.sampled_from([0.001, 0.5]), took_ms=st.integers(0, 4_000))
    def ended(self, outcome: Outcome, gain: float = 0.5, took_ms: int = 0) -> None:
        if self.training:
            self.began[-1][1] = took_ms
        self.happen(TrainingEnded(self.now_ms, outcome, gain, took_ms))
        self.training = False

    @rule(drifts=st.integers(0, 5))
    def answered(self, drifts: int) -> None:
        self.happen(DriftAnswered(self.now_ms, drifts))

    @rule(ms=st.sampled_from([1, 999, 5_000, HOUR_MS // 3]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.happen(TimePassed(self.now_ms))

    @invariant()
    def valid(self) -> None:
        validate_state(self.state)
        assert self.training == (self.state.phase is T)
        if self.state.phase is C and self.state.rows < RULES.max_rows:
            assert capture_wanted(self.state, self.bounds)
        assert len(self.state.gains) <= PLATEAU

    def teardown(self) -> None:
        """From wherever it is, a new drift and enough rows lead to a training."""
        self.ended(Outcome.UNDECIDED)
        self.judged(set())
        self.judged({"a"})
        self.time_passes(HOUR_MS)
        self.stored(100)
        assert self.state.phase is T


TestAnyHistory = AnyHistory.TestCase
