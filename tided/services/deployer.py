"""One version on its way onto one engine: `tided.machine.deployment` with its IO.

Level-triggered. In each cycle the stored deployment is held against what the engine reports; a swap that is wanted and not in
flight is sent, so a leader that died in between is made up for. A version goes out only when its files were read again whole and
the engine can take it. Everything is written back under the leader's epoch before the next cycle.
"""

from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import structlog

from tided.backends.base import require
from tided.draft import bundle
from tided.machine import deployment as machine
from tided.machine.deployment import (
    Announce,
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
)
from tided.model import failpoints
from tided.model.deployments import Deployment, DeploymentState, ServedSums
from tided.model.drafts import Draft
from tided.model.engines import Capability, EngineInfo
from tided.model.errors import Conflict, NotFound, Refused, Superseded
from tided.model.ids import new_id
from tided.services.context import Context
from tided.services.monitor import EngineView, Monitor
from tided.services.watching import Readings, baseline, peers

STATE = "deployment"
TALLY = "tally"
RESTART = "restart"
"""Reason of a deployment that puts an engine, which came back without its draft, onto it again."""
ROLLBACK = "rollback"
"""Reason of one that goes back to an earlier version. It has no baseline: what it would be compared with is not wanted."""

_log = structlog.get_logger()
_REPLACED = (DeploymentState.WATCHING, DeploymentState.ROLLED_BACK)
_IN_FLIGHT = (DeploymentState.SWAPPING, DeploymentState.RESTORING)


@dataclass(frozen=True, slots=True)
class Tally:
    """How often the engine's draft was replaced, restored ones included."""

    swaps: int = 0


class Deployer:
    """Keeps the newest deployment of each engine in the leader's state."""

    def __init__(self, context: Context, monitor: Monitor) -> None:
        self._context = context
        self._monitor = monitor
        self._readings = Readings()
        self._locks: dict[str, anyio.Lock] = {}
        self._reading = anyio.Lock()
        self._read = ("", float("-inf"))  # the version that was read whole last, and when that began

    def lock(self, engine: str) -> anyio.Lock:
        """Held while an engine is reconciled, and by whoever else changes its deployment."""
        return self._locks.setdefault(engine, anyio.Lock())

    async def current(self, engine: str) -> Deployment | None:
        """The newest deployment onto an engine, final or not."""
        return await self._context.state.get(Deployment, STATE, engine)

    async def begin(
        self, view: EngineView, draft: Draft, reason: str, pooled_over: float = 0.0, *, trial: bool = False
    ) -> Deployment:
        """Note that `draft` is to be deployed; `reconcile` does it. `trial`: other engines wait for what its watch finds.

        `pooled_over`: of a draft that has served well in an earlier domain, the acceptance length that its predecessor scored on the
        newest samples. What was served until now is partly of the traffic before, so the lower of the two is the watch's baseline.

        Raises `Refused` when the engine cannot take it, `Conflict` while another deployment is under way or it serves already.
        """
        context = self._context
        epoch = context.leadership.require()
        before = await self.current(view.engine)
        if before is not None and not before.state.final:
            raise Conflict(f"engine {view.engine}: deployment of {before.version[:12]} is under way ({before.state})")
        if view.info.version == draft.version:
            raise Conflict(f"engine {view.engine} already serves {draft.version[:12]}")
        check_fit(view.info, draft)
        now_ms = await context.now_ms()
        length, error = _baseline(view, reason, pooled_over)
        deployment = Deployment(
            id=new_id("dep"),
            engine=view.engine,
            version=draft.version,
            previous=await self._restorable(view.info.version),
            state=DeploymentState.PENDING,
            epoch=epoch,
            created_ms=now_ms,
            updated_ms=now_ms,
            reason=reason,
            baseline_length=length,
            baseline_error=error,
            peers=peers(view, self._monitor.views.values()) if length else (),
            proven=pooled_over > 0.0,
            trial=trial,
        )
        await context.state.put(STATE, view.engine, deployment, epoch)
        await context.announce(
            "deployment-started",
            view.engine,
            f"{draft.lineage}@{draft.number} ({draft.version[:12]}) onto {view.engine}",
            version=draft.version,
            previous=deployment.previous,
            reason=reason,
        )
        return deployment

    async def reconcile(self, view: EngineView, now_ms: int) -> Deployment | None:
        """Take the engine's deployment one step further. Raises `Unavailable`, `Superseded`."""
        deployment = await self.current(view.engine)
        if deployment is None or deployment.state.final:
            return deployment
        rules = self.rules()
        if deployment.state is DeploymentState.PENDING:
            event = await self._ready(view, deployment, now_ms)
            deployment = await self._apply(deployment, event, rules)
        elif deployment.state is not DeploymentState.RESTORING and deployment.reason != ROLLBACK:
            deployment = await self._still_good(deployment, now_ms, rules)
        if deployment.state in _IN_FLIGHT:
            deployment = await self._in_flight(view, deployment, now_ms, rules)
        if deployment.state is DeploymentState.WATCHING:
            deployment = await self._apply(deployment, VersionSeen(now_ms, view.info.version), rules)
            deployment = await self._watched(view, deployment, now_ms, rules)
        deployment = await self._apply(deployment, TimePassed(now_ms), rules)
        if deployment.state.final:
            self._readings.end(view.engine)
        return deployment

    async def take_back(self, deployment: Deployment, reason: str, *, quarantine: bool = True) -> Deployment:
        """A deployment that is under way is not wanted any more; `quarantine`: its version never again."""
        now_ms = await self._context.now_ms()
        return await self._apply(deployment, RollbackRequested(now_ms, reason, quarantine=quarantine), self.rules())

    async def _watched(self, view: EngineView, deployment: Deployment, now_ms: int, rules: WatchRules) -> Deployment:
        """Tell the watch what was finished since the last cycle, here and on its peers: theirs first, for it is judged by both."""
        for peer in deployment.peers:
            other = self._monitor.views.get(peer.engine)
            served = self._readings.take(view.engine, other, peer.version) if other is not None else ServedSums()
            if served.requests:
                deployment = await self._apply(deployment, PeerServed(now_ms, peer.engine, served), rules)
        served = self._readings.take(view.engine, view, deployment.version)
        if served.requests and deployment.state is DeploymentState.WATCHING:
            deployment = await self._apply(deployment, RequestsServed(now_ms, deployment.version, served), rules)
        return deployment

    async def _still_good(self, deployment: Deployment, now_ms: int, rules: WatchRules) -> Deployment:
        """Take back what has gone into quarantine meanwhile, wherever that happened."""
        draft = await self._context.find_draft(deployment.version)
        if draft is None or not draft.quarantined:
            return deployment
        return await self._apply(
            deployment, RollbackRequested(now_ms, f"it is in quarantine: {draft.quarantined}"), rules
        )

    async def _ready(self, view: EngineView, deployment: Deployment, now_ms: int) -> DeploymentEvent:
        """Whether what is in the store, whole, can go onto the engine, now that it is about to."""
        store = self._context.drafts
        try:
            draft = await anyio.to_thread.run_sync(store.get, deployment.version)
            check_fit(view.info, draft)
            await self._verify(deployment.version)
        except Refused as exc:
            return RollbackRequested(now_ms, str(exc))
        self._readings.start(view.engine, view)
        return Started(now_ms)

    async def _verify(self, version: str) -> None:
        """Read a version again whole. One at a time, for that takes its size in memory; engines that ask together share a reading
        that began after they asked. Raises `Refused`."""
        asked_s = anyio.current_time()
        async with self._reading:
            if self._read[0] != version or self._read[1] < asked_s:
                began_s = anyio.current_time()
                await anyio.to_thread.run_sync(self._context.drafts.verify, version)
                self._read = version, began_s

    async def _in_flight(self, view: EngineView, deployment: Deployment, now_ms: int, rules: WatchRules) -> Deployment:
        wanted = deployment.version if deployment.state is DeploymentState.SWAPPING else deployment.previous
        if self._sends_bytes(view):
            self._context.courier.attend(view.engine)
        if not deployment.command and view.info.version != wanted and now_ms < deployment.deadline_ms:
            return await self._send(view, deployment, wanted, now_ms, rules)
        pause_s = 0.0
        if deployment.command:
            try:
                done = await view.backend.swap_outcome(wanted, deployment.command)
                pause_s = done.pause_s if done is not None else 0.0
            except Superseded:
                raise
            except (Refused, Conflict) as exc:
                return await self._apply(deployment, SwapFailed(now_ms, deployment.command, str(exc)), rules)
        return await self._apply(deployment, VersionSeen(now_ms, view.info.version, pause_s), rules)

    async def _send(
        self, view: EngineView, deployment: Deployment, version: str, now_ms: int, rules: WatchRules
    ) -> Deployment:
        context = self._context
        epoch = context.leadership.require()
        failpoints.hit("deployer.sending")
        try:
            path = await anyio.to_thread.run_sync(context.drafts.path, version)
            ttl_s = (deployment.deadline_ms - now_ms) / 1000
            if self._sends_bytes(view):
                size = await anyio.to_thread.run_sync(bundle.size_of, path)
                command = await view.backend.send_draft(version, size, epoch, ttl_s)
            else:
                command = await view.backend.send_swap(version, path, epoch, ttl_s)
        except NotFound as exc:
            return await self._apply(deployment, RollbackRequested(now_ms, str(exc)), rules)
        failpoints.hit("deployer.sent")
        return await self._apply(deployment, SwapSent(now_ms, command), rules)

    def _sends_bytes(self, view: EngineView) -> bool:
        """Whether the engine gets the draft itself over Redis, not the path of one that it could read."""
        return self._context.config.storage.is_shared and Capability.FETCH in view.info.capabilities

    async def _apply(self, deployment: Deployment, event: DeploymentEvent, rules: WatchRules) -> Deployment:
        """One step of the machine: its actions first (all are safe to repeat), then its state, fenced."""
        context = self._context
        after, actions = machine.step(deployment, event, rules)
        for action in actions:
            match action:
                case SendSwap():
                    pass  # the next cycle sends: it does for any swap that is wanted and not in flight
                case Quarantine(version, reason):
                    # Told first: a superseded leader is refused there, and the disk would take its word.
                    await context.announce("draft-quarantined", version, reason, engine=deployment.engine)
                    await anyio.to_thread.run_sync(context.drafts.quarantine, version, reason)
                case Announce(kind, message):
                    await context.announce(kind, deployment.engine, message, **_figures(after))
        if after.state is not deployment.state and after.state in _REPLACED:
            tally = await context.state.get(Tally, TALLY, after.engine) or Tally()
            await context.state.put(TALLY, after.engine, Tally(tally.swaps + 1), context.leadership.require())
        if after != deployment:
            await context.state.put(STATE, after.engine, after, context.leadership.require())
            failpoints.hit(f"deployer.{after.state}")
        return after

    async def _restorable(self, version: str) -> str:
        """`version` if it is in the store, so that it can be restored; else "": there is nothing to go back to."""
        draft = await self._context.find_draft(version)
        return draft.version if draft is not None else ""

    def rules(self) -> WatchRules:
        settings = self._context.config.deployment
        return WatchRules(
            swap_deadline_ms=round(settings.swap_deadline_s * 1000),
            watch_ms=round(settings.watch_s * 1000),
            watch_requests=settings.watch_requests,
            canary_ms=round(settings.canary_s * 1000),
            canary_requests=settings.canary_requests,
            rollback_margin=settings.rollback_margin,
        )


def check_fit(info: EngineInfo, draft: Draft) -> None:
    """Raise `Refused` unless the engine can take the draft: capability, target, vocabulary, quarantine."""
    require(info, Capability.SWAP)
    name = f"draft {draft.lineage}@{draft.number} ({draft.version[:12]})"
    if draft.quarantined:
        raise Refused(f"{name} is in quarantine: {draft.quarantined}")
    if draft.target != info.target.digest:
        raise Refused(
            f"{name} is for target {draft.target[:12]}, engine {info.engine} serves {info.target.digest[:12]}"
        )
    other = bool(info.vocab_id) and draft.vocab_id != info.vocab_id
    if other and Capability.SWAP_VOCABULARY not in info.capabilities:
        raise Refused(
            f"{name} has another draft vocabulary, which engine {info.engine} cannot swap; restart it with this draft"
        )


def fits(info: EngineInfo, draft: Draft) -> bool:
    """Whether the engine can take the draft."""
    try:
        check_fit(info, draft)
    except Refused:
        return False
    return True


def desired_version(deployment: Deployment | None) -> str:
    """The version that an engine should serve by its newest, finished deployment; "" when nothing says so."""
    if deployment is None or not deployment.state.final:
        return ""
    if deployment.state is DeploymentState.LIVE or deployment.reason == RESTART:
        return deployment.version
    return deployment.previous


def _baseline(view: EngineView, reason: str, pooled_over: float) -> tuple[float, float]:
    """The acceptance length that a version is held against, and its standard error; zeros: nothing."""
    found = baseline(view)
    if reason == ROLLBACK or not found.length:
        return 0.0, 0.0
    return (min(found.length, pooled_over) if pooled_over else found.length), found.error


def _figures(deployment: Deployment) -> dict[str, Any]:
    found = machine.judged(deployment)
    return {
        "deployment": deployment.id,
        "version": deployment.version,
        "previous": deployment.previous,
        "state": deployment.state.value,
        "swap_s": deployment.swap_s,
        "baseline_length": round(deployment.baseline_length, 3),
        "expected_length": round(found.expected, 3),
        "watched_length": round(found.length, 3),
        "watched_requests": round(deployment.watched.requests),
    }
