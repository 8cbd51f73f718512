"""The self-test of one incarnation of an engine: may its samples train, may its draft be swapped?

    reference -> probing -> verified | unverified | mismatch
    listening -> unverified | mismatch                        (an engine that cannot be probed)
    verified | unverified -> probing -> the same | mismatch   (another draft serves, of which more can be told; or acceptance fell)

Fails closed: only `verified` is trust; whether `unverified` is, the configuration says. Level-triggered: while the phase is
REFERENCE somebody makes reference states, while it is PROBING somebody probes, and reports with the attempt that it was told; a leader
that takes over does it again. A mismatch holds as long as the incarnation does. The machine keeps no time: events carry it.
"""

from dataclasses import dataclass, replace

from tided.model.errors import InvariantBroken
from tided.model.verification import Check, CheckOutcome, Verification, VerificationPhase, VerificationState

_S, _P = VerificationState, VerificationPhase


@dataclass(frozen=True, slots=True)
class TestRules:
    """`max_probes` rounds, then the engine is unverified and is tried again after `retry_ms`."""

    __test__ = False  # not a test of pytest's

    reference_wait_ms: int = 120_000
    probe_timeout_ms: int = 30_000
    max_probes: int = 3
    retry_ms: int = 300_000


DEFAULT_RULES = TestRules()

# --- events ---


@dataclass(frozen=True, slots=True)
class Connected:
    """An incarnation on a target, new to us or to be tested again. `hindrance`: why it cannot be probed, or ""."""

    now_ms: int
    engine: str
    incarnation: str
    target: str
    hindrance: str = ""


@dataclass(frozen=True, slots=True)
class ReferenceFound:
    now_ms: int


@dataclass(frozen=True, slots=True)
class ReferenceFailed:
    """There will be none for now."""

    now_ms: int
    why: str


@dataclass(frozen=True, slots=True)
class Probed:
    """Round `attempt` of probes gave an answer, while draft `version` served. `accepted`: enough was accepted to tell that it does."""

    now_ms: int
    attempt: int
    checks: tuple[Check, ...]
    version: str = ""
    accepted: bool = False


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """Round `attempt` gave none: the engine did not answer, or no rows arrived."""

    now_ms: int
    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class DraftServed:
    """A draft serves for good whose acceptance is worth a look."""

    now_ms: int
    version: str


@dataclass(frozen=True, slots=True)
class Doubted:
    """Acceptance fell at `since_ms`: does it still tap what it should? Samples cannot tell, for their scores fall with it."""

    now_ms: int
    since_ms: int


@dataclass(frozen=True, slots=True)
class Listened:
    """The first real samples were looked at."""

    now_ms: int
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class TimePassed:
    now_ms: int


VerificationEvent = (
    Connected | ReferenceFound | ReferenceFailed | Probed | ProbeFailed | DraftServed | Doubted | Listened | TimePassed
)

# --- actions ---


@dataclass(frozen=True, slots=True)
class Announce:
    """An event for people: `engine-verified`, `engine-unverified`, `engine-mismatch`."""

    kind: str
    message: str


Step = tuple[Verification, tuple[Announce, ...]]


def step(before: Verification | None, event: VerificationEvent, rules: TestRules = DEFAULT_RULES) -> Step:
    """Total over all states and events; what does not concern the phase changes nothing. `before` None: only with `Connected`."""
    if isinstance(event, Connected):
        return _connected(event, rules)
    if before is None:
        raise InvariantBroken("a self-test that has not begun cannot go on")
    match event, before.phase:
        case ReferenceFound(now_ms), _P.REFERENCE:
            return _probing(before, now_ms, rules, referenced=True, reason="probing"), ()
        case ReferenceFound(now_ms), _P.DONE if _wants_reference(before):
            return _probing(replace(before, attempt=0), now_ms, rules, referenced=True, reason="probing"), ()
        case ReferenceFailed(now_ms, why), _P.REFERENCE:
            return _probing(before, now_ms, rules, referenced=False, reason=why), ()
        case TimePassed(now_ms), _P.REFERENCE if now_ms >= before.deadline_ms:
            why = "no worker has made the target's reference states: start a tide-worker with kind reference"
            return _probing(before, now_ms, rules, referenced=False, reason=why), ()
        case Probed(_, attempt), _P.PROBING if attempt == before.attempt:
            told = replace(before, draft=event.version, accepted=event.accepted)
            return _judged(told, event.now_ms, event.checks, rules)
        case ProbeFailed(now_ms, attempt, why), _P.PROBING if attempt == before.attempt:
            return _again(before, now_ms, why, rules)
        case TimePassed(now_ms), _P.PROBING if now_ms >= before.deadline_ms:
            return _again(before, now_ms, "the probes were not answered in time", rules)
        case DraftServed(now_ms, version), _P.DONE if wants_draft(before, version):
            return _probing_again(replace(before, draft=version), now_ms, rules), ()
        case Doubted(now_ms, since_ms), _P.DONE if may_doubt(before, since_ms):
            return replace(_probing_again(before, now_ms, rules), started_ms=since_ms, doubted=True), ()
        case Listened(now_ms, checks), _P.LISTENING:
            return _judged(before, now_ms, checks, rules)
        case TimePassed(now_ms), _P.DONE if 0 < before.deadline_ms <= now_ms:
            return _reference(replace(before, updated_ms=now_ms, attempt=0), now_ms, rules), ()
        case _:
            return before, ()


def first_failure(checks: tuple[Check, ...]) -> Check | None:
    return next((check for check in checks if check.outcome is CheckOutcome.FAILED), None)


def wants_draft(state: Verification, version: str) -> bool:
    """Whether a draft, other than that of the last probes, should be looked at: once enough was accepted of one, no more."""
    probed = state.state in (_S.VERIFIED, _S.UNVERIFIED) and state.attempt > 0 and bool(state.checks)
    return state.phase is _P.DONE and probed and not state.accepted and version not in ("", state.draft)


def may_doubt(state: Verification, since_ms: int) -> bool:
    """Whether probes can tell what a fall at that time is due to: there is a reference, and they were not asked since."""
    passed = state.state in (_S.VERIFIED, _S.UNVERIFIED) and state.phase is _P.DONE and state.attempt > 0
    return passed and state.referenced and state.updated_ms < since_ms


def validate_state(state: Verification) -> None:
    """Raise `InvariantBroken` for a state that no sequence of events can reach."""
    failed = first_failure(state.checks) is not None
    wrong = (
        (state.state is _S.PENDING and state.phase is _P.DONE, "done without a verdict"),
        (state.state is _S.MISMATCH and state.phase is not _P.DONE, "a mismatch that is tested again"),
        (state.state is _S.VERIFIED and state.phase not in (_P.DONE, _P.PROBING), "verified before it was probed"),
        (state.state is _S.VERIFIED and not state.referenced, "verified without a reference"),
        (state.doubted and state.phase is not _P.PROBING, "doubted, and nobody asks"),
        (failed != (state.state is _S.MISMATCH), "a failed check is a mismatch, and nothing else is"),
    )
    for broken, what in wrong:
        if broken:
            raise InvariantBroken(f"self-test of {state.engine} in state {state.state}, phase {state.phase}: {what}")


def _connected(event: Connected, rules: TestRules) -> Step:
    fresh = Verification(
        engine=event.engine,
        incarnation=event.incarnation,
        target=event.target,
        state=_S.PENDING,
        phase=_P.REFERENCE,
        reason="",
        started_ms=event.now_ms,
        updated_ms=event.now_ms,
    )
    if event.hindrance:
        listening = replace(fresh, state=_S.UNVERIFIED, phase=_P.LISTENING, reason=event.hindrance)
        return listening, (Announce("engine-unverified", event.hindrance),)
    return _reference(fresh, event.now_ms, rules), ()


def _reference(before: Verification, now_ms: int, rules: TestRules) -> Verification:
    return replace(
        before,
        state=_S.PENDING,
        phase=_P.REFERENCE,
        reason="waiting for the target's reference states",
        deadline_ms=now_ms + rules.reference_wait_ms,
        checks=(),
    )


def _probing(before: Verification, now_ms: int, rules: TestRules, *, referenced: bool, reason: str) -> Verification:
    return replace(
        before,
        state=_S.PENDING,
        phase=_P.PROBING,
        reason=reason,
        updated_ms=now_ms,
        deadline_ms=now_ms + rules.probe_timeout_ms,
        attempt=before.attempt + 1,
        referenced=referenced,
        checks=(),
    )


def _probing_again(before: Verification, now_ms: int, rules: TestRules) -> Verification:
    """What it has passed holds on until it fails."""
    return replace(
        before,
        phase=_P.PROBING,
        started_ms=now_ms,
        updated_ms=now_ms,
        deadline_ms=now_ms + rules.probe_timeout_ms,
        attempt=before.attempt + 1,
    )


def _again(before: Verification, now_ms: int, why: str, rules: TestRules) -> Step:
    if before.state is not _S.PENDING:
        kept = replace(before, phase=_P.DONE, updated_ms=now_ms, doubted=False)
        return replace(kept, deadline_ms=_retry_ms(before, now_ms, rules)), ()
    if before.attempt < rules.max_probes:
        return _probing(before, now_ms, rules, referenced=before.referenced, reason=f"probing again: {why}"), ()
    done = replace(
        before,
        state=_S.UNVERIFIED,
        phase=_P.DONE,
        reason=why,
        updated_ms=now_ms,
        deadline_ms=now_ms + rules.retry_ms,
    )
    return done, (Announce("engine-unverified", why),)


def _judged(before: Verification, now_ms: int, checks: tuple[Check, ...], rules: TestRules) -> Step:
    again = before.phase is _P.PROBING and before.state is not _S.PENDING
    if again:
        new = {check.name for check in checks}
        checks = (*(check for check in before.checks if check.name not in new), *checks)
    done = replace(before, phase=_P.DONE, updated_ms=now_ms, deadline_ms=0, checks=checks, doubted=False)
    failure = first_failure(checks)
    if failure is not None:
        return replace(done, state=_S.MISMATCH, reason=failure.measured), (
            Announce("engine-mismatch", f"{failure.name}: {failure.measured}"),
        )
    if again:
        return replace(done, deadline_ms=_retry_ms(before, now_ms, rules)), ()
    skipped = [check for check in checks if check.outcome is CheckOutcome.SKIPPED and check.name in ESSENTIAL]
    if before.referenced and not skipped and {check.name for check in checks} >= ESSENTIAL:
        why = "what it taps is what the reference says"
        return replace(done, state=_S.VERIFIED, reason=why), (Announce("engine-verified", why),)
    why = f"{skipped[0].name}: {skipped[0].measured}" if before.referenced and skipped else before.reason
    deadline_ms = 0 if before.phase is _P.LISTENING else now_ms + rules.retry_ms
    done = replace(done, state=_S.UNVERIFIED, reason=why, deadline_ms=deadline_ms)
    # Who listened has been told so when the engine connected.
    return done, () if before.phase is _P.LISTENING else (Announce("engine-unverified", why),)


def _retry_ms(state: Verification, now_ms: int, rules: TestRules) -> int:
    """When an engine that keeps its verdict is tested anew."""
    return now_ms + rules.retry_ms if state.state is _S.UNVERIFIED else 0


ESSENTIAL = frozenset({"token ids", "token alignment", "layer ids", "norms", "dtype", "accuracy"})
"""Without these an engine is not verified, even if nothing was found wrong."""


def _wants_reference(state: Verification) -> bool:
    """Whether nothing but a reference was missing."""
    return state.state is _S.UNVERIFIED and not state.referenced and state.deadline_ms > 0
