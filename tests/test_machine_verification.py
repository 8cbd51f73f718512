"""The self-test's machine: its whole way, its refusals, and that no sequence of events trusts what was not verified."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.machine.verification import (
    Announce,
    Connected,
    Doubted,
    DraftServed,
    Listened,
    Probed,
    ProbeFailed,
    ReferenceFailed,
    ReferenceFound,
    TestRules,
    TimePassed,
    VerificationEvent,
    step,
    validate_state,
)
from tided.model.errors import InvariantBroken
from tided.model.verification import Check, CheckOutcome, Verification, VerificationPhase, VerificationState

RULES = TestRules(reference_wait_ms=100, probe_timeout_ms=50, max_probes=2, retry_ms=1_000)
GOOD = tuple(
    Check(name, CheckOutcome.OK, "fine")
    for name in ("token ids", "token alignment", "layer ids", "norms", "dtype", "accuracy")
)
BAD = (GOOD[0], Check("layer ids", CheckOutcome.FAILED, "layer 3, not 2"))
HIDDEN = (*GOOD[:2], Check("layer ids", CheckOutcome.SKIPPED, "a prefix cache"))
CONNECTED = Connected(0, "e", "i-1", "ab" * 32)


def after(*events: VerificationEvent) -> Verification:
    state, _ = step(None, CONNECTED, RULES)
    for event in events:
        state, _ = step(state, event, RULES)
        validate_state(state)
    return state


def where(state: Verification) -> tuple[str, str]:
    return state.state.value, state.phase.value


def test_the_whole_way() -> None:
    assert where(after()) == ("pending", "reference")
    assert where(after(TimePassed(99))) == ("pending", "reference")
    assert where(after(ReferenceFound(5))) == ("pending", "probing")
    verified = after(ReferenceFound(5), Probed(9, 1, GOOD))
    assert where(verified) == ("verified", "done")
    assert where(step(verified, TimePassed(10**9), RULES)[0]) == ("verified", "done")


def test_a_failed_check_is_a_mismatch_for_ever() -> None:
    state = after(
        ReferenceFound(5), Probed(9, 1, BAD), TimePassed(10**9), ReferenceFound(10**9), Probed(10**9, 1, GOOD)
    )
    assert (where(state), state.reason) == (("mismatch", "done"), "layer 3, not 2")


@pytest.mark.parametrize("why", [ReferenceFailed(5, "the job failed"), TimePassed(100)])
def test_without_a_reference_it_is_unverified_at_best(why: VerificationEvent) -> None:
    state = after(why, Probed(109, 1, GOOD))
    assert where(state) == ("unverified", "done")
    assert "reference" in state.reason or "job failed" in state.reason
    assert where(after(why, Probed(109, 1, BAD))) == ("mismatch", "done")
    # As soon as there is one, it is tested again.
    assert where(step(state, ReferenceFound(120), RULES)[0]) == ("pending", "probing")


def test_what_could_not_be_looked_at_is_not_verified() -> None:
    state = after(ReferenceFound(5), Probed(9, 1, HIDDEN))
    assert (where(state), state.reason) == (("unverified", "done"), "layer ids: a prefix cache")


def test_checks_that_were_not_made_are_not_passed() -> None:
    assert where(after(ReferenceFound(5), Probed(9, 1, GOOD[:-1]))) == ("unverified", "done")
    assert where(after(ReferenceFound(5), Probed(9, 1, ()))) == ("unverified", "done")


def test_probes_are_repeated_and_then_given_up_for_a_while() -> None:
    once = after(ReferenceFound(5), ProbeFailed(6, 1, "no answer"))
    assert (where(once), once.attempt) == (("pending", "probing"), 2)
    assert once == after(ReferenceFound(5), ProbeFailed(6, 1, "no answer"), Probed(7, 1, GOOD)), "an old round"
    given_up, announced = step(once, TimePassed(60), RULES)
    assert where(given_up) == ("unverified", "done")
    assert [item.kind for item in announced] == ["engine-unverified"]
    assert where(step(given_up, TimePassed(1_059), RULES)[0]) == ("unverified", "done")
    assert where(step(given_up, TimePassed(1_060), RULES)[0]) == ("pending", "reference")


def test_an_engine_that_cannot_be_probed_is_listened_to() -> None:
    state, announced = step(None, replace(CONNECTED, hindrance="it tells no URL"), RULES)
    assert (where(state), state.reason) == (("unverified", "listening"), "it tells no URL")
    assert announced == (Announce("engine-unverified", "it tells no URL"),)
    assert where(step(state, Listened(9, GOOD), RULES)[0]) == ("unverified", "done")
    assert where(step(state, Listened(9, BAD), RULES)[0]) == ("mismatch", "done")


TAKEN = Check("draft acceptance", CheckOutcome.OK, "as it must")
REFUSED = Check("draft acceptance", CheckOutcome.FAILED, "not at all")
UNTOLD = Check("draft acceptance", CheckOutcome.SKIPPED, "version 0")


def test_a_draft_of_which_more_can_be_told_is_looked_at_and_the_verdict_holds_meanwhile() -> None:
    zero = after(ReferenceFound(5), Probed(9, 1, (*GOOD, UNTOLD), "v0"))
    assert step(zero, DraftServed(20, "v0"), RULES)[0] == zero, "that is the one which was probed"
    again = step(zero, DraftServed(20, "v1"), RULES)[0]
    assert where(again) == ("verified", "probing")
    assert (again.attempt, again.started_ms) == (2, 20)
    good, announced = step(again, Probed(30, 2, (TAKEN,), "v1", accepted=True), RULES)
    assert (where(good), good.checks, announced) == (("verified", "done"), (*GOOD, TAKEN), ())
    assert step(good, DraftServed(40, "v2"), RULES)[0] == good, "one is enough"
    bad, announced = step(again, Probed(30, 2, (REFUSED,), "v1"), RULES)
    assert (where(bad), bad.reason) == (("mismatch", "done"), "not at all")
    assert [item.kind for item in announced] == ["engine-mismatch"]


@pytest.mark.parametrize("event", [ProbeFailed(30, 2, "no answer"), TimePassed(70)])
def test_a_second_look_that_gives_nothing_takes_nothing_away(event: VerificationEvent) -> None:
    zero = after(ReferenceFound(5), Probed(9, 1, (*GOOD, UNTOLD), "v0"))
    state, announced = step(step(zero, DraftServed(20, "v1"), RULES)[0], event, RULES)
    assert (where(state), state.checks, announced) == (("verified", "done"), zero.checks, ())
    assert step(state, DraftServed(80, "v1"), RULES)[0] == state
    assert where(step(state, DraftServed(80, "v2"), RULES)[0]) == ("verified", "probing")


def test_a_new_incarnation_begins_anew() -> None:
    state = after(ReferenceFound(5), Probed(9, 1, BAD))
    fresh, _ = step(state, replace(CONNECTED, incarnation="i-2", now_ms=20), RULES)
    assert (where(fresh), fresh.incarnation, fresh.checks) == (("pending", "reference"), "i-2", ())


def test_nothing_goes_on_that_has_not_begun() -> None:
    with pytest.raises(InvariantBroken):
        step(None, TimePassed(1), RULES)


_TIMES = st.integers(0, 3_000)
_CHECKS = st.sampled_from((GOOD, BAD, HIDDEN, ()))
_EVENTS = st.one_of(
    st.builds(ReferenceFound, _TIMES),
    st.builds(ReferenceFailed, _TIMES, st.just("no")),
    st.builds(Probed, _TIMES, st.integers(0, 3), _CHECKS),
    st.builds(ProbeFailed, _TIMES, st.integers(0, 3), st.just("no")),
    st.builds(DraftServed, _TIMES, st.sampled_from(("v0", "v1"))),
    st.builds(Listened, _TIMES, _CHECKS),
    st.builds(Doubted, _TIMES, _TIMES),
    st.builds(TimePassed, _TIMES),
)


@given(st.lists(_EVENTS, max_size=20), st.sampled_from(("", "no URL")))
def test_nothing_is_verified_but_by_good_probes_with_a_reference(events: list[VerificationEvent], why: str) -> None:
    state, _ = step(None, replace(CONNECTED, hindrance=why), RULES)
    for event in events:
        before = state
        state, _ = step(state, event, RULES)
        validate_state(state)
        if state.state is VerificationState.VERIFIED and before.state is not state.state:
            assert isinstance(event, Probed)
            assert before.phase is VerificationPhase.PROBING
            assert before.referenced
            assert not why


def test_a_fall_of_acceptance_puts_what_was_passed_in_question() -> None:
    verified = after(ReferenceFound(5), Probed(9, 1, GOOD, "v"))
    assert step(verified, Doubted(50, 9), RULES)[0] == verified, "it was probed since"
    doubted, told = step(verified, Doubted(50, 40), RULES)
    validate_state(doubted)
    assert (where(doubted), doubted.attempt, doubted.started_ms, doubted.doubted, told) == (
        ("verified", "probing"),
        2,
        40,
        True,
        (),
    )
    good, _ = step(doubted, Probed(60, 2, GOOD, "v"), RULES)
    assert (where(good), good.doubted) == (("verified", "done"), False)
    assert step(good, Doubted(61, 40), RULES)[0] == good, "once for each fall"
    bad, told = step(doubted, Probed(60, 2, BAD, "v"), RULES)
    assert (where(bad), [item.kind for item in told]) == (("mismatch", "done"), ["engine-mismatch"])
    for event in (ProbeFailed(60, 2, "no answer"), TimePassed(10**6)):
        kept, _ = step(doubted, event, RULES)
        validate_state(kept)
        assert (where(kept), kept.doubted) == (("verified", "done"), False)


def test_without_a_reference_probes_cannot_tell_what_fell() -> None:
    for state in (
        after(ReferenceFailed(5, "no"), Probed(9, 1, GOOD, "v")),
        after(ReferenceFound(5)),
        after(ReferenceFound(5), Probed(9, 1, BAD)),
        step(None, replace(CONNECTED, hindrance="no URL"), RULES)[0],
    ):
        assert step(state, Doubted(500, 400), RULES)[0] == state
