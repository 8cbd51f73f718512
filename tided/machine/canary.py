"""The way of a version that passed the gate onto one engine of its target before the others: choose, watch, then all of them or none.

    choosing -> watching -> passed   (the version becomes the target's head, which the others follow)
        ^          |     -> failed   (it served worse, and is in quarantine)
        +----------+     -> withdrawn (nothing was found out: its engines died, or could not take it)

The watch itself is that of the engine's deployment (`tided.machine.deployment`); this follows it. A canary that dies, restarts or goes
silent says nothing about the version, but a version may be why its engine dies: so another engine is chosen once, and then no more.
Level-triggered and total, as the deployment; events carry the time.
"""

from dataclasses import dataclass, replace

from tided.model.deployments import Canary, CanaryState, DeploymentState
from tided.model.errors import InvariantBroken

MOST_ENGINES = 2
"""A draft that takes its engine down must not go round all of them."""

_S = CanaryState


@dataclass(frozen=True, slots=True)
class CanaryRules:
    """`choose_ms`: within which an engine must be found that can take the version. `absent_ms`: for how long the canary may be connected
    and not in order (its self-test runs again, say) before another is chosen."""

    choose_ms: int = 120_000
    absent_ms: int = 300_000


DEFAULT_RULES = CanaryRules()

# --- events ---


@dataclass(frozen=True, slots=True)
class Placed:
    """The version's deployment onto an engine is noted. `alone`: no other engine would follow."""

    now_ms: int
    engine: str
    deployment: str
    alone: bool = False


@dataclass(frozen=True, slots=True)
class NowhereToGo:
    """No engine that serves the incumbent can take the version."""

    now_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeploymentSeen:
    """The canary is in order, and how far its deployment is. `blamed`: the version is in quarantine."""

    now_ms: int
    state: DeploymentState
    blamed: bool = False
    withdrawn: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class CanaryAbsent:
    """The canary is not in order; `gone`: not even connected."""

    now_ms: int
    gone: bool


@dataclass(frozen=True, slots=True)
class VersionBlamed:
    """The version is in quarantine, and is not on its way onto any engine that could be asked."""

    now_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class HeadMoved:
    """The version is its target's head: an operator's word, or that of a leader before us."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    now_ms: int


CanaryEvent = Placed | NowhereToGo | DeploymentSeen | CanaryAbsent | VersionBlamed | HeadMoved | TimePassed

# --- actions ---


@dataclass(frozen=True, slots=True)
class Promote:
    """Make the version its target's head."""

    version: str


@dataclass(frozen=True, slots=True)
class Announce:
    """An event for people: `canary-started`, `canary-lost`, `canary-passed`, `canary-failed`, `canary-withdrawn`."""

    kind: str
    message: str


CanaryAction = Promote | Announce
Step = tuple[Canary, tuple[CanaryAction, ...]]


def step(canary: Canary, event: CanaryEvent, rules: CanaryRules = DEFAULT_RULES) -> Step:
    """Total: an event that says nothing in a state changes nothing. Final states never change."""
    match canary.state:
        case _S.CHOOSING:
            after, actions = _choosing(canary, event)
        case _S.WATCHING:
            after, actions = _watching(canary, event, rules)
        case _S.PASSED | _S.FAILED | _S.WITHDRAWN:
            return canary, ()
    return (replace(after, updated_ms=event.now_ms), actions) if after != canary else (after, actions)


def validate_state(canary: Canary) -> None:
    """Raise `InvariantBroken` for a state that no sequence of events can reach."""
    watching = canary.state is _S.WATCHING
    wrong = (
        (watching and not (canary.engine and canary.deployment), "watches no engine"),
        (canary.state is _S.CHOOSING and bool(canary.engine or canary.deployment), "chooses while it has an engine"),
        (canary.absent_ms > 0 and not watching, "absent while there is nothing to watch"),
        (watching and canary.engine in canary.tried, "is where it was lost before"),
        (len(canary.tried) > MOST_ENGINES, "was on too many engines"),
        (canary.state in (_S.FAILED, _S.WITHDRAWN) and not canary.reason, "ends badly without saying why"),
    )
    for broken, what in wrong:
        if broken:
            raise InvariantBroken(f"canary of {canary.version[:12]} in state {canary.state}: {what}")


def _choosing(canary: Canary, event: CanaryEvent) -> Step:
    match event:
        case Placed(_, engine, deployment, alone) if engine not in canary.tried:
            placed = replace(canary, state=_S.WATCHING, engine=engine, deployment=deployment, alone=alone)
            return placed, _announced(placed, "canary-started", f"serves on {engine} first")
        case NowhereToGo(_, reason):
            return _ended(canary, _S.WITHDRAWN, reason)
        case VersionBlamed(_, reason):
            return _ended(canary, _S.FAILED, reason)
        case HeadMoved():
            return _ended(canary, _S.PASSED, "it is what all engines are to serve")
        case TimePassed(now_ms) if now_ms >= canary.deadline_ms:
            return _ended(canary, _S.WITHDRAWN, "no engine could take it in time")
        case _:
            return canary, ()


def _watching(canary: Canary, event: CanaryEvent, rules: CanaryRules) -> Step:
    match event:
        case DeploymentSeen(now_ms, state, blamed, withdrawn, error):
            seen = replace(canary, absent_ms=0)
            if not state.final:
                return seen, ()
            if state is DeploymentState.LIVE:
                after, said = _ended(seen, _S.PASSED, f"{canary.engine} serves it well")
                return after, (Promote(canary.version), *said)
            if blamed:
                return _ended(seen, _S.FAILED, error)
            return _lost(seen, now_ms, error, rules) if withdrawn else _ended(seen, _S.WITHDRAWN, error)
        case CanaryAbsent(now_ms, gone):
            since_ms = canary.absent_ms or now_ms
            if gone or now_ms - since_ms >= rules.absent_ms:
                return _lost(canary, now_ms, "the engine is gone" if gone else "the engine is not in order", rules)
            return replace(canary, absent_ms=since_ms), ()
        case VersionBlamed(_, reason):
            return _ended(canary, _S.FAILED, reason)
        case HeadMoved():
            return _ended(canary, _S.PASSED, "it is what all engines are to serve")
        case Placed() | NowhereToGo() | TimePassed():
            return canary, ()


def _lost(canary: Canary, now_ms: int, why: str, rules: CanaryRules) -> Step:
    """The engine gives no answer: another is chosen, at most so often."""
    tried = (*canary.tried, canary.engine)
    lost = replace(
        canary,
        state=_S.CHOOSING,
        engine="",
        deployment="",
        tried=tried,
        absent_ms=0,
        deadline_ms=now_ms + rules.choose_ms,
    )
    said = _announced(canary, "canary-lost", f"{canary.engine} says nothing about it: {why}")
    if len(tried) < MOST_ENGINES:
        return lost, said
    after, ended = _ended(lost, _S.WITHDRAWN, f"neither {' nor '.join(tried)} says anything about it: {why}")
    return after, (*said, *ended)


_KINDS = {_S.PASSED: "canary-passed", _S.FAILED: "canary-failed", _S.WITHDRAWN: "canary-withdrawn"}


def _ended(canary: Canary, state: CanaryState, reason: str) -> Step:
    ended = replace(canary, state=state, absent_ms=0, reason=reason or "no reason was given")
    return ended, _announced(ended, _KINDS[state], ended.reason)


def _announced(canary: Canary, kind: str, message: str) -> tuple[Announce, ...]:
    """A target's only engine is nobody's canary: its deployment says all there is to say."""
    return () if canary.alone else (Announce(kind, f"{canary.version[:12]}: {message}"),)
