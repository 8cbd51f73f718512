"""The way of a version onto an engine: the whole state x event table, and random histories with an engine that misbehaves."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tided.machine.deployment import (
    Announce,
    DeploymentAction,
    DeploymentEvent,
    PeerServed,
    Quarantine,
    RequestsServed,
    RollbackRequested,
    SendSwap,
    Started,
    SwapFailed,
    SwapSent,
    TimePassed,
    VersionSeen,
    WatchRules,
    step,
    validate_state,
)
from tided.model.deployments import Deployment, DeploymentState, ServedSums, WatchPeer
from tided.model.errors import InvariantBroken

S = DeploymentState
NEW, OLD, OTHER = "a" * 64, "b" * 64, "c" * 64
NOW = 1_000_000
RULES = WatchRules(
    swap_deadline_ms=1_000,
    watch_ms=5_000,
    watch_requests=10,
    canary_ms=9_000,
    canary_requests=30,
    rollback_margin=0.1,
)

PENDING = Deployment("d1", "engine-a", NEW, OLD, S.PENDING, 7, NOW, NOW, "gate", baseline_length=2.0)
SWAPPING = replace(PENDING, state=S.SWAPPING, deadline_ms=NOW + 1, command="cmd-1")
SWAPPING_LATE = replace(SWAPPING, deadline_ms=NOW)
WATCHING = replace(PENDING, state=S.WATCHING, deadline_ms=NOW + 1, swap_s=0.1)
WATCHED_WELL = replace(WATCHING, watched=ServedSums(9, 100, 100))
WATCHED_BADLY = replace(WATCHED_WELL, watched=ServedSums(9, 100, 70))
WATCH_OVER = replace(WATCHED_WELL, deadline_ms=NOW)
WATCH_OVER_BADLY = replace(WATCHED_BADLY, deadline_ms=NOW)
TRIAL = replace(WATCHED_WELL, trial=True, peers=(WatchPeer("b", OLD, 2.0, 0.0),))
TRIAL_ENOUGH = replace(TRIAL, watched=ServedSums(29, 290, 290))
TRIAL_BADLY = replace(TRIAL, watched=WATCHED_BADLY.watched)
TRIAL_OVER = replace(TRIAL, watched=ServedSums(9, 90, 10), deadline_ms=NOW)
TRIAL_SILENT = replace(TRIAL_OVER, peers=(WatchPeer("b", OLD, 2.0, 0.0, ServedSums(10, 100, 100)),))
RESTORING = replace(WATCHING, state=S.RESTORING, command="cmd-1", error="bad")
RESTORING_LATE = replace(RESTORING, deadline_ms=NOW)
LIVE = replace(WATCHED_WELL, state=S.LIVE)
ROLLED_BACK = replace(RESTORING, state=S.ROLLED_BACK, command="")
FAILED = replace(RESTORING, state=S.FAILED, command="")
STATES = {
    "pending": PENDING,
    "swapping": SWAPPING,
    "swapping-late": SWAPPING_LATE,
    "watching": WATCHING,
    "watched-well": WATCHED_WELL,
    "watched-badly": WATCHED_BADLY,
    "watch-over": WATCH_OVER,
    "watch-over-badly": WATCH_OVER_BADLY,
    "trial": TRIAL,
    "trial-enough": TRIAL_ENOUGH,
    "trial-badly": TRIAL_BADLY,
    "trial-over": TRIAL_OVER,
    "trial-silent": TRIAL_SILENT,
    "restoring": RESTORING,
    "restoring-late": RESTORING_LATE,
    "live": LIVE,
    "rolled-back": ROLLED_BACK,
    "failed": FAILED,
}
EVENTS: dict[str, DeploymentEvent] = {
    "started": Started(NOW),
    "sent": SwapSent(NOW, "cmd-2"),
    "failed": SwapFailed(NOW, "cmd-1", "no memory"),
    "failed-other": SwapFailed(NOW, "cmd-0", "no memory"),
    "new-seen": VersionSeen(NOW, NEW, 0.1),
    "old-seen": VersionSeen(NOW, OLD),
    "other-seen": VersionSeen(NOW, OTHER),
    "served": RequestsServed(NOW, NEW, ServedSums(1, 10, 10)),
    "peer": PeerServed(NOW, "b", ServedSums(1, 10, 10)),
    "peer-unknown": PeerServed(NOW, "z", ServedSums(1, 10, 10)),
    "served-old": RequestsServed(NOW, OLD, ServedSums(1, 10, 10)),
    "rollback": RollbackRequested(NOW, "asked"),
    "rollback-quarantine": RollbackRequested(NOW, "asked", quarantine=True),
    "time": TimePassed(NOW),
}

# (state, event) -> state after, kinds of actions. Every pair that is not here changes nothing and asks for nothing.
RESTORE = (SendSwap, Announce)
BLAME_AND_RESTORE = (Quarantine, SendSwap, Announce)
TABLE: dict[tuple[str, str], tuple[DeploymentState, tuple[type, ...]]] = {
    ("pending", "started"): (S.SWAPPING, (SendSwap,)),
    ("pending", "rollback"): (S.FAILED, (Announce,)),
    ("pending", "rollback-quarantine"): (S.FAILED, (Quarantine, Announce)),
    ("swapping", "sent"): (S.SWAPPING, ()),
    ("swapping", "failed"): (S.RESTORING, RESTORE),
    ("swapping", "new-seen"): (S.WATCHING, (Announce,)),
    ("swapping", "rollback"): (S.RESTORING, RESTORE),
    ("swapping", "rollback-quarantine"): (S.RESTORING, BLAME_AND_RESTORE),
    ("swapping-late", "sent"): (S.SWAPPING, ()),
    ("swapping-late", "failed"): (S.RESTORING, RESTORE),
    ("swapping-late", "new-seen"): (S.WATCHING, (Announce,)),
    ("swapping-late", "rollback"): (S.RESTORING, RESTORE),
    ("swapping-late", "rollback-quarantine"): (S.RESTORING, BLAME_AND_RESTORE),
    ("swapping-late", "time"): (S.RESTORING, RESTORE),
    ("restoring", "sent"): (S.RESTORING, ()),
    ("restoring", "failed"): (S.RESTORING, (SendSwap,)),
    ("restoring", "old-seen"): (S.ROLLED_BACK, (Announce,)),
    ("restoring", "rollback-quarantine"): (S.RESTORING, (Quarantine,)),
    ("restoring-late", "sent"): (S.RESTORING, ()),
    ("restoring-late", "old-seen"): (S.ROLLED_BACK, (Announce,)),
    ("restoring-late", "rollback-quarantine"): (S.RESTORING, (Quarantine,)),
    ("restoring-late", "time"): (S.FAILED, (Announce,)),
    ("watching", "served"): (S.WATCHING, ()),
    ("watched-well", "served"): (S.LIVE, (Announce,)),
    ("watched-badly", "served"): (S.RESTORING, BLAME_AND_RESTORE),
    ("watch-over", "served"): (S.LIVE, (Announce,)),
    ("watch-over-badly", "served"): (S.RESTORING, BLAME_AND_RESTORE),
    ("watch-over", "time"): (S.LIVE, (Announce,)),
    ("watch-over-badly", "time"): (S.RESTORING, BLAME_AND_RESTORE),
    ("trial", "served"): (S.WATCHING, ()),
    ("trial-enough", "served"): (S.LIVE, (Announce,)),
    ("trial-badly", "served"): (S.RESTORING, BLAME_AND_RESTORE),
    ("trial-over", "served"): (S.RESTORING, BLAME_AND_RESTORE),
    ("trial-over", "time"): (S.RESTORING, BLAME_AND_RESTORE),
    ("trial-silent", "served"): (S.RESTORING, BLAME_AND_RESTORE),
    ("trial-silent", "time"): (S.RESTORING, RESTORE),  # it has hardly any requests, another engine has: no blame
}
TRIALS = ("trial", "trial-enough", "trial-badly", "trial-over", "trial-silent")
for _name in TRIALS:
    TABLE[_name, "peer"] = (S.WATCHING, ())
for _name in ("watching", "watched-well", "watched-badly", "watch-over", "watch-over-badly", *TRIALS):
    TABLE.update(
        {
            (_name, "old-seen"): (S.RESTORING, RESTORE),
            (_name, "other-seen"): (S.RESTORING, RESTORE),
            (_name, "rollback"): (S.RESTORING, RESTORE),
            (_name, "rollback-quarantine"): (S.RESTORING, BLAME_AND_RESTORE),
        }
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_whole_table(state: str, event: str) -> None:
    before = STATES[state]
    validate_state(before)
    after, actions = step(before, EVENTS[event], RULES)
    validate_state(after)
    if (state, event) not in TABLE:
        assert after == before
        assert actions == ()
        return
    expected, kinds = TABLE[state, event]
    assert after.state is expected
    assert tuple(type(action) for action in actions) == kinds
    for action in actions:
        if isinstance(action, SendSwap):
            assert action.version == (NEW if after.state is S.SWAPPING else OLD)
            assert action.deadline_ms == after.deadline_ms
        elif isinstance(action, Quarantine):
            assert action.version == NEW


def test_a_good_deployment_from_beginning_to_end() -> None:
    deployment = PENDING
    for event in (
        Started(NOW),
        SwapSent(NOW, "cmd-9"),
        VersionSeen(NOW + 10, OLD),
        VersionSeen(NOW + 20, NEW, 0.05),
        RequestsServed(NOW + 30, OLD, ServedSums(50, 500, 0)),
        RequestsServed(NOW + 40, NEW, ServedSums(9, 90, 100)),
        RequestsServed(NOW + 50, NEW, ServedSums(1, 10, 30)),
    ):
        deployment, _ = step(deployment, event, RULES)
    assert deployment.state is S.LIVE
    assert (deployment.swap_s, deployment.watched.requests, deployment.updated_ms) == (0.05, 10, NOW + 50)
    assert deployment.watched.length == 2.3


def test_the_margin_is_a_share_of_the_incumbents_length() -> None:
    for accepted, expected in ((81, S.LIVE), (79, S.RESTORING)):
        after, _ = step(WATCHING, RequestsServed(NOW, NEW, ServedSums(10, 100, accepted)), RULES)
        assert after.state is expected


def test_a_draft_that_has_proved_itself_elsewhere_is_taken_back_and_not_blamed() -> None:
    after, actions = step(replace(WATCH_OVER_BADLY, proven=True), TimePassed(NOW), RULES)
    assert after.state is S.RESTORING
    assert not any(isinstance(action, Quarantine) for action in actions)
    _, actions = step(replace(WATCHING, proven=True), RollbackRequested(NOW, "an operator", quarantine=True), RULES)
    assert any(isinstance(action, Quarantine) for action in actions)


def test_without_traffic_or_a_baseline_there_is_no_evidence_against_the_gate() -> None:
    assert step(replace(WATCHING, deadline_ms=NOW), TimePassed(NOW), RULES)[0].state is S.LIVE
    unknown = replace(WATCHING, baseline_length=0.0)
    assert step(unknown, RequestsServed(NOW, NEW, ServedSums(10, 100, 0)), RULES)[0].state is S.LIVE


def test_what_is_not_sure_is_watched_on_until_time_is_up() -> None:
    """Requests that differ a lot: no verdict at enough of them, the mean decides at the end."""
    for accepted, ended in ((20.0, S.LIVE), (13.0, S.RESTORING)):
        differing = ServedSums.of(10, 0).plus(ServedSums.of(10, accepted))
        deployment = WATCHING
        for _ in range(5):
            deployment, actions = step(deployment, RequestsServed(NOW, NEW, differing), RULES)
            assert (deployment.state, actions) == (S.WATCHING, ())
        assert step(deployment, TimePassed(NOW + 1), RULES)[0].state is ended


def test_no_blame_where_the_incumbent_fell_on_the_other_engines_too() -> None:
    fell = PeerServed(NOW, "b", ServedSums(20, 200, 120))
    blamed, _ = step(replace(TRIAL_ENOUGH, watched=ServedSums(29, 290, 180)), EVENTS["served"], RULES)
    assert blamed.state is S.RESTORING
    fallen, _ = step(replace(TRIAL_ENOUGH, watched=ServedSums(29, 290, 180)), fell, RULES)
    assert step(fallen, EVENTS["served"], RULES)[0].state is S.LIVE


def test_a_trial_that_ends_without_blame_may_be_made_elsewhere() -> None:
    assert step(TRIAL_SILENT, TimePassed(NOW), RULES)[0].withdrawn
    assert step(TRIAL, VersionSeen(NOW, OLD), RULES)[0].withdrawn
    assert not step(TRIAL_OVER, TimePassed(NOW), RULES)[0].withdrawn
    assert step(replace(SWAPPING, trial=True), VersionSeen(NOW, NEW), RULES)[0].deadline_ms == NOW + RULES.canary_ms


def test_a_first_version_that_fails_has_nothing_to_go_back_to() -> None:
    after, actions = step(replace(SWAPPING_LATE, previous=""), TimePassed(NOW), RULES)
    assert after.state is S.FAILED
    assert "no previous version" in after.error
    assert not any(isinstance(action, SendSwap) for action in actions)


@pytest.mark.parametrize(
    "broken",
    [
        replace(SWAPPING, deadline_ms=0),
        replace(PENDING, watched=ServedSums(1, 10, 10)),
        replace(RESTORING, error=""),
        replace(LIVE, error="x"),
        replace(LIVE, command="cmd"),
    ],
)
def test_impossible_states_are_recognised(broken: Deployment) -> None:
    with pytest.raises(InvariantBroken):
        validate_state(broken)


class AnEngineThatMisbehaves(RuleBasedStateMachine):
    """Commands get lost, fail, are done late or done wrong; the engine restarts with any draft. Whatever happens: the state is valid,
    a bad version is quarantined before it is restored, and after the deadlines have passed the deployment has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW
        self.deployment = PENDING
        self.served = OLD
        self.sent: list[tuple[str, str]] = []
        self.quarantined: set[str] = set()
        self.ended: Deployment | None = None

    def happen(self, event: DeploymentEvent) -> None:
        before = self.deployment
        self.deployment, actions = step(before, event, RULES)
        assert (self.deployment, actions) == step(before, event, RULES)
        for action in actions:
            self.do(action)

    def do(self, action: DeploymentAction) -> None:
        if isinstance(action, SendSwap):
            command = f"cmd-{len(self.sent)}"
            self.sent.append((command, action.version))
            self.happen(SwapSent(self.now_ms, command))
        elif isinstance(action, Quarantine):
            self.quarantined.add(action.version)

    @rule()
    def start(self) -> None:
        self.happen(Started(self.now_ms))

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data(), version=st.sampled_from(["asked", OTHER]))
    def engine_obeys(self, data: Any, version: str) -> None:
        """Any command at any time, as asked or wrongly."""
        _, asked = data.draw(st.sampled_from(self.sent))
        self.served = asked if version == "asked" else version

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data())
    def engine_fails(self, data: Any) -> None:
        command, _ = data.draw(st.sampled_from(self.sent))
        self.happen(SwapFailed(self.now_ms, command, "out of memory"))

    @rule()
    def look(self) -> None:
        self.happen(VersionSeen(self.now_ms, self.served))

    @rule(requests=st.integers(1, 20), accepted=st.integers(0, 300))
    def traffic(self, requests: int, accepted: int) -> None:
        self.happen(RequestsServed(self.now_ms, self.served, ServedSums(requests, 100, accepted)))

    @rule(quarantine=st.booleans())
    def operator_asks_for_rollback(self, quarantine: bool) -> None:
        self.happen(RollbackRequested(self.now_ms, "asked", quarantine))

    @rule(ms=st.sampled_from([10, 500, 1_000, 5_000]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.happen(TimePassed(self.now_ms))

    @invariant()
    def valid(self) -> None:
        validate_state(self.deployment)
        if self.deployment.state is S.LIVE:
            assert NEW not in self.quarantined
            assert self.deployment.watched.steps == 0 or self.deployment.watched.length >= 1.8
        if self.ended is not None:
            assert self.deployment == self.ended
        if self.deployment.state.final:
            self.ended = self.deployment

    def teardown(self) -> None:
        """From wherever it is, time alone ends it: a swap, a restore and a watch at most."""
        self.start()
        for _ in range(3):
            self.time_passes(RULES.watch_ms)
        assert self.deployment.state.final


TestAnEngineThatMisbehaves = AnEngineThatMisbehaves.TestCase
