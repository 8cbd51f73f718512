"""Worker liveness: the whole state x event table, and random histories."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tided.machine.worker import HeartbeatSeen, Liveness, TimePassed, WorkerEvent, WorkerLife, step, validate_state
from tided.model.errors import InvariantBroken

NOW, LIMIT = 1_000_000, 10_000
L = Liveness

STATES = {
    "unknown": WorkerLife(),
    "joining": WorkerLife(seen_ms=NOW - LIMIT),
    "joining-late": WorkerLife(seen_ms=NOW - LIMIT - 1),
    "ready": WorkerLife(L.READY, "i1", "", NOW - LIMIT),
    "ready-late": WorkerLife(L.READY, "i1", "", NOW - LIMIT - 1),
    "busy": WorkerLife(L.BUSY, "i1", "job-1", NOW - LIMIT),
    "busy-late": WorkerLife(L.BUSY, "i1", "job-1", NOW - LIMIT - 1),
    "draining": WorkerLife(L.DRAINING, "i1", "job-1", NOW - LIMIT),
    "draining-late": WorkerLife(L.DRAINING, "i1", "", NOW - LIMIT - 1),
    "lost": WorkerLife(L.LOST, "i1", "", NOW - 5 * LIMIT),
}
EVENTS: dict[str, WorkerEvent] = {
    "idle": HeartbeatSeen(NOW, "i1"),
    "busy": HeartbeatSeen(NOW, "i1", "job-2"),
    "draining": HeartbeatSeen(NOW, "i1", "job-2", draining=True),
    "another": HeartbeatSeen(NOW, "i2"),
    "silence": TimePassed(NOW),
}
NEW, OLD = ("worker-joined",), ()
ONE = {"unknown", "joining", "joining-late", "lost"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_whole_table(state: str, event: str) -> None:
    before = STATES[state]
    validate_state(before)
    after, actions = step(before, EVENTS[event], LIMIT)
    validate_state(after)
    told = tuple(action.kind for action in actions)
    if event == "silence":
        late = state.endswith("-late")
        assert after.state is (L.LOST if late else before.state)
        assert told == (("worker-lost",) if late else ())
        return
    assert after.state is {"busy": L.BUSY, "draining": L.DRAINING}.get(event, L.READY)
    expected = ["worker-joined"] if state in ONE else []
    if event == "another" and state not in ONE:
        expected = ["worker-restarted"]
    if event == "draining" and before.state is not L.DRAINING:
        expected.append("worker-draining")
    assert told == tuple(expected)
    assert after.seen_ms == NOW
    assert after.restarts == int(event == "another" and bool(before.incarnation))


def test_a_worker_that_is_looked_for_the_first_time_gets_its_whole_time() -> None:
    waiting, _ = step(WorkerLife(), TimePassed(NOW), LIMIT)
    assert step(waiting, TimePassed(NOW + LIMIT), LIMIT) == (waiting, ())
    assert step(waiting, TimePassed(NOW + LIMIT + 1), LIMIT)[0].state is L.LOST


@pytest.mark.parametrize(
    "broken",
    [WorkerLife(L.READY), WorkerLife(L.BUSY, "i1"), replace(STATES["lost"], job="job-1"), WorkerLife(job="job-1")],
)
def test_impossible_states_are_recognised(broken: WorkerLife) -> None:
    with pytest.raises(InvariantBroken):
        validate_state(broken)


class AnyHistory(RuleBasedStateMachine):
    """Lost exactly when silent for longer than the limit, announced once, whatever the clock does."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW
        self.life = WorkerLife()
        self.heard_ms: int | None = None

    @rule(job=st.sampled_from(["", "job-1"]), draining=st.booleans(), incarnation=st.sampled_from(["i1", "i2"]))
    def beat(self, job: str, draining: bool, incarnation: str) -> None:
        self.life, _ = step(self.life, HeartbeatSeen(self.now_ms, incarnation, job, draining), LIMIT)
        self.heard_ms = self.now_ms

    @rule(ms=st.sampled_from([1, 5_000, 10_001, -20_000]))
    def silence(self, ms: int) -> None:
        self.now_ms += ms
        was = self.life.state
        self.life, actions = step(self.life, TimePassed(self.now_ms), LIMIT)
        if self.heard_ms is not None:
            lost = was is L.LOST or self.now_ms - self.heard_ms > LIMIT
            assert (self.life.state is L.LOST) == lost
            assert len(actions) == int(lost and was is not L.LOST)

    @invariant()
    def valid(self) -> None:
        validate_state(self.life)


TestAnyHistory = AnyHistory.TestCase
