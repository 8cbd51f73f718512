"""The canary's engine: the whole state x event table, and random histories in which engines die, drain and come back."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tided.machine.canary import (
    MOST_ENGINES,
    Announce,
    CanaryAbsent,
    CanaryEvent,
    CanaryRules,
    DeploymentSeen,
    HeadMoved,
    NowhereToGo,
    Placed,
    Promote,
    TimePassed,
    VersionBlamed,
    step,
    validate_state,
)
from tided.model.deployments import Canary, CanaryState, DeploymentState
from tided.model.errors import InvariantBroken

S, D = CanaryState, DeploymentState
NOW = 1_000_000
RULES = CanaryRules(choose_ms=1_000, absent_ms=2_000)

CHOOSING = Canary("tiny", "a" * 64, "b" * 64, "job-1", S.CHOOSING, NOW, NOW, NOW + 1)
CHOOSING_LATE = replace(CHOOSING, deadline_ms=NOW)
CHOOSING_AGAIN = replace(CHOOSING, tried=("a",))
WATCHING = replace(CHOOSING, state=S.WATCHING, engine="a", deployment="dep-1")
WATCHING_ABSENT = replace(WATCHING, absent_ms=NOW - 2_000)
WATCHING_AGAIN = replace(WATCHING, engine="b", deployment="dep-2", tried=("a",))
WATCHING_ALONE = replace(WATCHING, alone=True)
STATES = {
    "choosing": CHOOSING,
    "choosing-late": CHOOSING_LATE,
    "choosing-again": CHOOSING_AGAIN,
    "watching": WATCHING,
    "watching-absent": WATCHING_ABSENT,
    "watching-again": WATCHING_AGAIN,
    "watching-alone": WATCHING_ALONE,
    "passed": replace(WATCHING, state=S.PASSED),
    "failed": replace(WATCHING, state=S.FAILED, reason="worse"),
    "withdrawn": replace(CHOOSING_AGAIN, state=S.WITHDRAWN, reason="gone"),
}
EVENTS: dict[str, CanaryEvent] = {
    "placed": Placed(NOW, "a", "dep-9"),
    "placed-elsewhere": Placed(NOW, "c", "dep-9", alone=True),
    "nowhere": NowhereToGo(NOW, "no engine"),
    "under-way": DeploymentSeen(NOW, D.WATCHING),
    "live": DeploymentSeen(NOW, D.LIVE),
    "worse": DeploymentSeen(NOW, D.ROLLED_BACK, blamed=True, error="worse"),
    "not-restored": DeploymentSeen(NOW, D.FAILED, blamed=True, error="worse"),
    "restarted": DeploymentSeen(NOW, D.ROLLED_BACK, withdrawn=True, error="restarted"),
    "refused": DeploymentSeen(NOW, D.ROLLED_BACK, error="does not load"),
    "absent": CanaryAbsent(NOW, gone=False),
    "gone": CanaryAbsent(NOW, gone=True),
    "blamed": VersionBlamed(NOW, "in quarantine"),
    "head-moved": HeadMoved(NOW),
    "time": TimePassed(NOW),
}
SAID = (Announce,)
PROMOTED = (Promote, Announce)
# (state, event) -> state after, kinds of actions. Every pair that is not here changes nothing and asks for nothing.
TABLE: dict[tuple[str, str], tuple[CanaryState, tuple[type, ...]]] = {
    ("choosing-late", "time"): (S.WITHDRAWN, SAID),
    ("watching", "gone"): (S.CHOOSING, SAID),
    ("watching", "restarted"): (S.CHOOSING, SAID),
    ("watching", "absent"): (S.WATCHING, ()),
    ("watching-absent", "absent"): (S.CHOOSING, SAID),
    ("watching-absent", "gone"): (S.CHOOSING, SAID),
    ("watching-absent", "under-way"): (S.WATCHING, ()),
    ("watching-absent", "restarted"): (S.CHOOSING, SAID),
    ("watching-again", "gone"): (S.WITHDRAWN, (Announce, Announce)),
    ("watching-again", "restarted"): (S.WITHDRAWN, (Announce, Announce)),
    ("watching-again", "absent"): (S.WATCHING, ()),
    ("watching-alone", "gone"): (S.CHOOSING, ()),
    ("watching-alone", "restarted"): (S.CHOOSING, ()),
    ("watching-alone", "absent"): (S.WATCHING, ()),
    ("watching-alone", "live"): (S.PASSED, (Promote,)),
    ("watching-alone", "worse"): (S.FAILED, ()),
    ("watching-alone", "not-restored"): (S.FAILED, ()),
    ("watching-alone", "refused"): (S.WITHDRAWN, ()),
    ("watching-alone", "blamed"): (S.FAILED, ()),
    ("watching-alone", "head-moved"): (S.PASSED, ()),
}
for _name in ("choosing", "choosing-late", "choosing-again"):
    TABLE[_name, "placed-elsewhere"] = (S.WATCHING, ())
    TABLE[_name, "nowhere"] = (S.WITHDRAWN, SAID)
    TABLE[_name, "blamed"] = (S.FAILED, SAID)
    TABLE[_name, "head-moved"] = (S.PASSED, SAID)
    if _name != "choosing-again":
        TABLE[_name, "placed"] = (S.WATCHING, SAID)
for _name in ("watching", "watching-absent", "watching-again"):
    TABLE[_name, "live"] = (S.PASSED, PROMOTED)
    TABLE[_name, "worse"] = (S.FAILED, SAID)
    TABLE[_name, "not-restored"] = (S.FAILED, SAID)
    TABLE[_name, "refused"] = (S.WITHDRAWN, SAID)
    TABLE[_name, "blamed"] = (S.FAILED, SAID)
    TABLE[_name, "head-moved"] = (S.PASSED, SAID)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_whole_table(state: str, event: str) -> None:
    before = STATES[state]
    validate_state(before)
    after, actions = step(before, EVENTS[event], RULES)
    validate_state(after)
    assert (after, actions) == step(before, EVENTS[event], RULES)
    if (state, event) not in TABLE:
        assert (after, actions) == (before, ())
        return
    expected, kinds = TABLE[state, event]
    assert after.state is expected
    assert tuple(type(action) for action in actions) == kinds


def test_one_that_is_lost_is_replaced_once_and_then_no_more() -> None:
    lost, _ = step(WATCHING, CanaryAbsent(NOW, gone=True), RULES)
    assert (lost.engine, lost.deployment, lost.tried, lost.deadline_ms) == ("", "", ("a",), NOW + 1_000)
    assert step(lost, Placed(NOW, "a", "dep-3"), RULES) == (lost, ())
    second, _ = step(lost, Placed(NOW, "b", "dep-3"), RULES)
    over, actions = step(second, CanaryAbsent(NOW, gone=True), RULES)
    assert over.state is S.WITHDRAWN
    assert over.reason == "neither a nor b says anything about it: the engine is gone"
    assert [action.kind for action in actions if isinstance(action, Announce)] == ["canary-lost", "canary-withdrawn"]


def test_one_that_is_out_of_order_has_time_to_be_again() -> None:
    away, _ = step(WATCHING, CanaryAbsent(NOW, gone=False), RULES)
    assert away.absent_ms == NOW
    assert step(away, CanaryAbsent(NOW + 1_999, gone=False), RULES) == (away, ())
    back, _ = step(away, DeploymentSeen(NOW + 1_999, D.SWAPPING), RULES)
    assert back.absent_ms == 0
    assert step(away, CanaryAbsent(NOW + 2_000, gone=False), RULES)[0].state is S.CHOOSING


@pytest.mark.parametrize(
    "broken",
    [
        replace(WATCHING, engine=""),
        replace(WATCHING, deployment=""),
        replace(CHOOSING, engine="a"),
        replace(CHOOSING, absent_ms=1),
        replace(WATCHING, tried=("a",)),
        replace(CHOOSING, tried=("a", "b", "c")),
        replace(CHOOSING, state=S.FAILED),
    ],
)
def test_impossible_states_are_recognised(broken: Canary) -> None:
    with pytest.raises(InvariantBroken):
        validate_state(broken)


class EnginesThatComeAndGo(RuleBasedStateMachine):
    """Whatever happens: the state is valid, at most so many engines ever serve the version before it is the head, it is promoted only by a
    live deployment of the engine that it is on, never again after its end, and in bounded time there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW
        self.canary = CHOOSING
        self.served: set[str] = set()
        self.promoted = 0
        self.over: Canary | None = None

    def happen(self, event: CanaryEvent) -> None:
        before = self.canary
        self.canary, actions = step(before, event, RULES)
        promoted = [action for action in actions if isinstance(action, Promote)]
        if promoted:
            assert isinstance(event, DeploymentSeen)
            assert event.state is D.LIVE
            assert before.state is S.WATCHING
            self.promoted += 1
        if self.canary.state is S.WATCHING:
            self.served.add(self.canary.engine)

    @rule(engine=st.sampled_from("abcd"), alone=st.booleans())
    def place(self, engine: str, alone: bool) -> None:
        self.happen(Placed(self.now_ms, engine, f"dep-{engine}", alone))

    @rule(state=st.sampled_from(D), blamed=st.booleans(), withdrawn=st.booleans())
    def deployment(self, state: DeploymentState, blamed: bool, withdrawn: bool) -> None:
        self.happen(DeploymentSeen(self.now_ms, state, blamed, withdrawn, "why"))

    @rule(gone=st.booleans())
    def absent(self, gone: bool) -> None:
        self.happen(CanaryAbsent(self.now_ms, gone))

    @rule(event=st.sampled_from([NowhereToGo, VersionBlamed]))
    def bad_news(self, event: type[NowhereToGo] | type[VersionBlamed]) -> None:
        self.happen(event(self.now_ms, "why"))

    @rule()
    def operator_deploys(self) -> None:
        self.happen(HeadMoved(self.now_ms))

    @rule(ms=st.sampled_from([10, 500, 1_000, 5_000]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.happen(TimePassed(self.now_ms))

    @invariant()
    def valid(self) -> None:
        validate_state(self.canary)
        assert self.promoted <= 1
        assert len(self.served) <= MOST_ENGINES
        assert self.over is None or self.over == self.canary
        if self.canary.state.final:
            self.over = self.canary

    def teardown(self) -> None:
        """Wherever it is: engines that stay away and time that passes end it."""
        for _ in range(2 * MOST_ENGINES):
            self.time_passes(RULES.absent_ms)
            self.absent(False)
            self.time_passes(RULES.absent_ms)
            self.absent(False)
        assert self.canary.state.final


TestEnginesThatComeAndGo = EnginesThatComeAndGo.TestCase
