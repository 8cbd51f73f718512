"""The way of one version onto one engine: swap, read back, watch, and restore the last good version when anything is wrong.

    pending -> swapping -> watching -> live
                  |            |
                  +-> restoring <-+ -> rolled_back (the previous version serves again) | failed (it could not be restored in time)

Level-triggered: a swap is confirmed by the version that the engine reports, not by the reply alone, so a leader that takes over in
the middle, or a lost reply, changes nothing. The machine keeps no time: events carry it.
"""

from dataclasses import dataclass, replace

from tided.model.errors import InvariantBroken
from tided.model.records import Deployment, DeploymentState

_S = DeploymentState


@dataclass(frozen=True, slots=True)
class WatchRules:
    """After `watch_requests` with the new version its acceptance length is compared with the incumbent's on the same engine: worse
    by more than the share `rollback_margin` restores the incumbent and quarantines the new version. `watch_ms` ends the watch.
    """

    swap_deadline_ms: int = 30_000
    watch_ms: int = 120_000
    watch_requests: int = 20
    rollback_margin: float = 0.10


DEFAULT_RULES = WatchRules()

# --- events ---


@dataclass(frozen=True, slots=True)
class Started:
    """The deployer takes the deployment up."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class SwapSent:
    """The swap that was asked for is in the engine's stream."""

    now_ms: int
    command: str


@dataclass(frozen=True, slots=True)
class SwapFailed:
    """The engine refused the command in flight, or failed at it. Replies to other commands are not reported."""

    now_ms: int
    command: str
    error: str


@dataclass(frozen=True, slots=True)
class VersionSeen:
    """The version that the engine reports as served, in a reply or in a heartbeat read after all replies that were reported here
    (an engine writes its heartbeat before its reply). `swap_s`: the pause, where the reply told it."""

    now_ms: int
    version: str
    swap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestsServed:
    """Finished requests that drafted, all with `version`: `steps` request-steps in which `accepted` drafted tokens were accepted."""

    now_ms: int
    version: str
    requests: int
    steps: int
    accepted: int


@dataclass(frozen=True, slots=True)
class RollbackRequested:
    """An operator, or the gate on second thoughts. `quarantine`: the version is to blame."""

    now_ms: int
    reason: str
    quarantine: bool = False


@dataclass(frozen=True, slots=True)
class TimePassed:
    now_ms: int


DeploymentEvent = Started | SwapSent | SwapFailed | VersionSeen | RequestsServed | RollbackRequested | TimePassed

# --- actions ---


@dataclass(frozen=True, slots=True)
class SendSwap:
    """Send the engine a swap to `version` (then report `SwapSent`), unless it has passed `deadline_ms`."""

    version: str
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Announce:
    """An event for people: `draft-swapped`, `draft-live`, `draft-restoring`, `draft-rolled-back`, `deployment-failed`."""

    kind: str
    message: str


DeploymentAction = SendSwap | Quarantine | Announce
Step = tuple[Deployment, tuple[DeploymentAction, ...]]


def watched_length(deployment: Deployment) -> float:
    """Mean acceptance length (bonus token included) since the swap; 0.0 before the first step."""
    return 1.0 + deployment.watched_accepted / deployment.watched_steps if deployment.watched_steps else 0.0


def step(deployment: Deployment, event: DeploymentEvent, rules: WatchRules = DEFAULT_RULES) -> Step:
    """Total: an event that says nothing in a state changes nothing. Final states never change."""
    if deployment.state.final:
        return deployment, ()
    state, actions = _step(deployment, event, rules)
    return (replace(state, updated_ms=event.now_ms), actions) if state != deployment else (state, actions)


def validate_state(deployment: Deployment) -> None:
    """Raise `InvariantBroken` for a state that no sequence of events can reach."""
    in_flight = deployment.state in (_S.SWAPPING, _S.RESTORING)
    wrong = (
        ((in_flight or deployment.state is _S.WATCHING) and deployment.deadline_ms <= 0, "no deadline"),
        (deployment.state in (_S.PENDING, _S.SWAPPING) and deployment.watched_requests > 0, "watched before the swap"),
        (
            deployment.state in (_S.RESTORING, _S.ROLLED_BACK, _S.FAILED) and not deployment.error,
            "ends badly without saying why",
        ),
        (deployment.state is _S.LIVE and bool(deployment.error), "live with an error"),
        (bool(deployment.command) and not in_flight, "a command in flight outside a swap"),
        (deployment.watched_accepted < 0 or deployment.watched_steps < 0, "negative counts"),
    )
    for broken, what in wrong:
        if broken:
            raise InvariantBroken(f"deployment {deployment.id} in state {deployment.state}: {what}")


def _step(deployment: Deployment, event: DeploymentEvent, rules: WatchRules) -> Step:
    match deployment.state:
        case _S.PENDING:
            return _pending(deployment, event, rules)
        case _S.SWAPPING:
            return _swapping(deployment, event, rules)
        case _S.WATCHING:
            return _watching(deployment, event, rules)
        case _S.RESTORING:
            return _restoring(deployment, event)
        case _S.LIVE | _S.ROLLED_BACK | _S.FAILED:
            return deployment, ()


def _pending(deployment: Deployment, event: DeploymentEvent, rules: WatchRules) -> Step:
    match event:
        case Started(now_ms):
            deadline_ms = now_ms + rules.swap_deadline_ms
            swapping = replace(deployment, state=_S.SWAPPING, deadline_ms=deadline_ms)
            return swapping, (SendSwap(deployment.version, deadline_ms),)
        case RollbackRequested(_, reason):
            return _ended(deployment, _S.FAILED, f"withdrawn before the swap: {reason}")
        case _:
            return deployment, ()


def _swapping(deployment: Deployment, event: DeploymentEvent, rules: WatchRules) -> Step:
    match event:
        case SwapSent(_, command):
            return replace(deployment, command=command), ()
        case VersionSeen(now_ms, version, swap_s) if version == deployment.version:
            watching = replace(
                deployment, state=_S.WATCHING, command="", deadline_ms=now_ms + rules.watch_ms, swap_s=swap_s
            )
            return watching, (Announce("draft-swapped", f"{deployment.engine} serves {version[:12]}"),)
        case SwapFailed(now_ms, command, error) if command == deployment.command:
            return _restore(deployment, now_ms, f"the swap failed: {error}", rules)
        case RollbackRequested(now_ms, reason, quarantine):
            return _restore(deployment, now_ms, reason, rules, quarantine=quarantine)
        case TimePassed(now_ms) if now_ms >= deployment.deadline_ms:
            return _restore(deployment, now_ms, "the engine did not report the new version before the deadline", rules)
        case _:
            return deployment, ()


def _watching(deployment: Deployment, event: DeploymentEvent, rules: WatchRules) -> Step:
    match event:
        case RequestsServed(now_ms, version, requests, steps, accepted) if version == deployment.version:
            watched = replace(
                deployment,
                watched_requests=deployment.watched_requests + requests,
                watched_steps=deployment.watched_steps + steps,
                watched_accepted=deployment.watched_accepted + accepted,
            )
            return _judge(watched, now_ms, rules) if watched.watched_requests >= rules.watch_requests else (watched, ())
        case VersionSeen(now_ms, version) if version != deployment.version:
            return _restore(deployment, now_ms, f"the engine serves {version[:12] or 'no draft'} instead", rules)
        case SwapFailed() | VersionSeen() | Started() | SwapSent() | RequestsServed():
            return deployment, ()
        case RollbackRequested(now_ms, reason, quarantine):
            return _restore(deployment, now_ms, reason, rules, quarantine=quarantine)
        case TimePassed(now_ms):
            return _judge(deployment, now_ms, rules) if now_ms >= deployment.deadline_ms else (deployment, ())


def _restoring(deployment: Deployment, event: DeploymentEvent) -> Step:
    match event:
        case SwapSent(_, command):
            return replace(deployment, command=command), ()
        case VersionSeen(_, version) if version == deployment.previous:
            return _ended(deployment, _S.ROLLED_BACK, deployment.error)
        case SwapFailed(now_ms, command) if command == deployment.command and now_ms < deployment.deadline_ms:
            return replace(deployment, command=""), (SendSwap(deployment.previous, deployment.deadline_ms),)
        case RollbackRequested(_, reason, True):
            return deployment, (Quarantine(deployment.version, reason),)
        case TimePassed(now_ms) if now_ms >= deployment.deadline_ms:
            return _ended(deployment, _S.FAILED, f"{deployment.error}; restoring {deployment.previous[:12]} failed too")
        case _:
            return deployment, ()


def _judge(deployment: Deployment, now_ms: int, rules: WatchRules) -> Step:
    """The watch is over. Without evidence against it the version stays: the gate has already found it better."""
    length, floor = watched_length(deployment), deployment.baseline_length * (1.0 - rules.rollback_margin)
    if deployment.watched_steps and length < floor:
        reason = f"acceptance length {length:.2f} over {deployment.watched_requests} requests"
        reason += f", the incumbent had {deployment.baseline_length:.2f}"
        return _restore(deployment, now_ms, reason, rules, quarantine=not deployment.proven)
    return _ended(deployment, _S.LIVE, "")


def _restore(deployment: Deployment, now_ms: int, reason: str, rules: WatchRules, *, quarantine: bool = False) -> Step:
    blame = (Quarantine(deployment.version, reason),) if quarantine else ()
    if not deployment.previous:
        state, actions = _ended(deployment, _S.FAILED, f"{reason}; there is no previous version to restore")
        return state, blame + actions
    deadline_ms = now_ms + rules.swap_deadline_ms
    restoring = replace(deployment, state=_S.RESTORING, command="", deadline_ms=deadline_ms, error=reason)
    announce = Announce("draft-restoring", f"{deployment.engine}: {reason}; restoring {deployment.previous[:12]}")
    return restoring, (*blame, SendSwap(deployment.previous, deadline_ms), announce)


_KINDS = {_S.LIVE: "draft-live", _S.ROLLED_BACK: "draft-rolled-back", _S.FAILED: "deployment-failed"}


def _ended(deployment: Deployment, state: DeploymentState, error: str) -> Step:
    ended = replace(deployment, state=state, command="", error=error)
    version = deployment.previous if state is _S.ROLLED_BACK else deployment.version
    message = f"{deployment.engine}: {version[:12]}" + (f": {error}" if error else "")
    return ended, (Announce(_KINDS[state], message),)
