"""The way of one version onto one engine: swap, read back, watch, and restore the last good version when anything is wrong.

    pending -> swapping -> watching -> live
                  |            |
                  +-> restoring <-+ -> rolled_back (the previous version serves again) | failed (it could not be restored in time)

Level-triggered: a swap is confirmed by the version that the engine reports, not by the reply alone, so a leader that takes over in
the middle, or a lost reply, changes nothing. The machine keeps no time: events carry it.
"""

from dataclasses import dataclass, replace

from tided.machine import watch
from tided.machine.watch import Judgement, Verdict
from tided.model.deployments import Deployment, DeploymentState, ServedSums
from tided.model.errors import InvariantBroken

_S = DeploymentState


MOST_TIMES = 2
"""So many times the requests of a good version's watch are the most: a doubt that is the baseline's own does not end with more of them."""


@dataclass(frozen=True, slots=True)
class WatchRules:
    """From `watch_requests` with the new version on its acceptance length is held against what the incumbent's would be
    (`tided.machine.watch`): surely worse by more than the share `rollback_margin` restores the incumbent and quarantines the new version;
    surely not ends the watch. `watch_ms` ends it in any case. A trial, for which other engines wait, goes on for `canary_requests`, and
    `canary_ms` at most.
    """

    swap_deadline_ms: int = 30_000
    watch_ms: int = 120_000
    watch_requests: int = 20
    canary_ms: int = 300_000
    canary_requests: int = 60
    rollback_margin: float = 0.10

    def enough(self, deployment: Deployment) -> int:
        """Requests that a good version's watch lasts."""
        return max(self.watch_requests, self.canary_requests if deployment.trial else 0)

    def longest_ms(self, deployment: Deployment) -> int:
        return max(self.watch_ms, self.canary_ms if deployment.trial else 0)


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
    """Finished requests that drafted, all with `version`."""

    now_ms: int
    version: str
    served: ServedSums


@dataclass(frozen=True, slots=True)
class PeerServed:
    """What another engine served meanwhile, with the version that it served when the watch was planned."""

    now_ms: int
    engine: str
    served: ServedSums


@dataclass(frozen=True, slots=True)
class RollbackRequested:
    """An operator, or the gate on second thoughts. `quarantine`: the version is to blame."""

    now_ms: int
    reason: str
    quarantine: bool = False


@dataclass(frozen=True, slots=True)
class TimePassed:
    now_ms: int


DeploymentEvent = (
    Started | SwapSent | SwapFailed | VersionSeen | RequestsServed | PeerServed | RollbackRequested | TimePassed
)

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


def judged(deployment: Deployment, rules: WatchRules = DEFAULT_RULES) -> Judgement:
    """What the watch says so far."""
    return watch.judge(
        deployment.watched,
        deployment.baseline_length,
        deployment.baseline_error,
        deployment.peers,
        rules.rollback_margin,
    )


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
        (deployment.state in (_S.PENDING, _S.SWAPPING) and deployment.watched.requests > 0, "watched before the swap"),
        (
            deployment.state in (_S.RESTORING, _S.ROLLED_BACK, _S.FAILED) and not deployment.error,
            "ends badly without saying why",
        ),
        (deployment.state is _S.LIVE and bool(deployment.error), "live with an error"),
        (bool(deployment.command) and not in_flight, "a command in flight outside a swap"),
        (deployment.watched.accepted < 0 or deployment.watched.steps < 0, "negative counts"),
        (deployment.withdrawn and not deployment.error, "withdrawn without saying why"),
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
        case RollbackRequested(_, reason, quarantine):
            state, actions = _ended(deployment, _S.FAILED, f"withdrawn before the swap: {reason}")
            return state, (*_blame(deployment, reason, quarantine=quarantine), *actions)
        case _:
            return deployment, ()


def _swapping(deployment: Deployment, event: DeploymentEvent, rules: WatchRules) -> Step:
    match event:
        case SwapSent(_, command):
            return replace(deployment, command=command), ()
        case VersionSeen(now_ms, version, swap_s) if version == deployment.version:
            watching = replace(
                deployment,
                state=_S.WATCHING,
                command="",
                deadline_ms=now_ms + rules.longest_ms(deployment),
                swap_s=swap_s,
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
        case RequestsServed(now_ms, version, served) if version == deployment.version:
            watched = replace(deployment, watched=deployment.watched.plus(served))
            return _judge(watched, now_ms, rules)
        case PeerServed(now_ms, engine, served):
            peers = tuple(
                replace(peer, served=peer.served.plus(served)) if peer.engine == engine else peer
                for peer in deployment.peers
            )
            return replace(deployment, peers=peers), ()
        case VersionSeen(now_ms, version) if version != deployment.version:
            why = f"the engine serves {version[:12] or 'no draft'} instead"
            return _restore(deployment, now_ms, why, rules, withdrawn=True)
        case SwapFailed() | VersionSeen() | Started() | SwapSent() | RequestsServed():
            return deployment, ()
        case RollbackRequested(now_ms, reason, quarantine):
            return _restore(deployment, now_ms, reason, rules, quarantine=quarantine)
        case TimePassed(now_ms):
            return _watch_over(deployment, now_ms, rules) if now_ms >= deployment.deadline_ms else (deployment, ())


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
    """End the watch once enough was seen to be sure."""
    found, requests = judged(deployment, rules), deployment.watched.requests
    if found.verdict is Verdict.WORSE and requests >= rules.watch_requests:
        return _worse(deployment, found, now_ms, rules)
    if found.verdict is Verdict.FINE and requests >= rules.enough(deployment):
        return _ended(deployment, _S.LIVE, "")
    if requests >= MOST_TIMES * rules.enough(deployment):
        return _watch_over(deployment, now_ms, rules)
    return deployment, ()


def _watch_over(deployment: Deployment, now_ms: int, rules: WatchRules) -> Step:
    """Time is up, or enough requests were seen. Without evidence against it the version stays: the gate has already found it better.

    But a trial on an engine that has hardly any requests, where others have them, is none.
    """
    elsewhere = sum(peer.served.requests for peer in deployment.peers)
    if deployment.trial and deployment.watched.requests < rules.watch_requests <= elsewhere:
        why = f"it finished {deployment.watched.requests:.0f} requests, the other engines {elsewhere:.0f}"
        return _restore(deployment, now_ms, why, rules, withdrawn=True)
    found = judged(deployment, rules)
    return _worse(deployment, found, now_ms, rules) if found.below else _ended(deployment, _S.LIVE, "")


def _worse(deployment: Deployment, found: Judgement, now_ms: int, rules: WatchRules) -> Step:
    reason = f"acceptance length {found.length:.2f} over {deployment.watched.requests:.0f} requests"
    reason += f", the incumbent had {deployment.baseline_length:.2f}"
    if found.moved < 1.0:
        reason += f" and would have {found.expected:.2f} now, by the other engines"
    return _restore(deployment, now_ms, reason, rules, quarantine=not deployment.proven)


def _blame(deployment: Deployment, reason: str, *, quarantine: bool) -> tuple[DeploymentAction, ...]:
    return (Quarantine(deployment.version, reason),) if quarantine else ()


def _restore(
    deployment: Deployment,
    now_ms: int,
    reason: str,
    rules: WatchRules,
    *,
    quarantine: bool = False,
    withdrawn: bool = False,
) -> Step:
    blame = _blame(deployment, reason, quarantine=quarantine)
    deployment = replace(deployment, withdrawn=withdrawn)
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
