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
from tided.machine import deployment as machine
from tided.machine.deployment import (
    Announce,
    DeploymentEvent,
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
from tided.model.errors import Conflict, NotFound, Refused, Superseded
from tided.model.ids import new_id
from tided.model.records import Capability, Deployment, DeploymentState, Draft, EngineInfo
from tided.services.context import Context
from tided.services.monitor import EngineView

STATE = "deployment"
TALLY = "tally"
RESTART = "restart"
"""Reason of a deployment that puts an engine, which came back without its draft, onto it again."""
ROLLBACK = "rollback"
"""Reason of one that goes back to an earlier version. It has no baseline: what it would be compared with is not wanted."""
MIN_BASELINE_TRIALS = 50
"""Fewer of the incumbent's drafting request-steps than this say nothing: then the watch has no floor."""

_log = structlog.get_logger()
_REPLACED = (DeploymentState.WATCHING, DeploymentState.ROLLED_BACK)
_IN_FLIGHT = (DeploymentState.SWAPPING, DeploymentState.RESTORING)


@dataclass(frozen=True, slots=True)
class Tally:
    """How often the engine's draft was replaced, restored ones included."""

    swaps: int = 0


class Deployer:
    """Keeps the newest deployment of each engine in the leader's state."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._locks: dict[str, anyio.Lock] = {}

    def lock(self, engine: str) -> anyio.Lock:
        """Held while an engine is reconciled, and by whoever else changes its deployment."""
        return self._locks.setdefault(engine, anyio.Lock())

    async def current(self, engine: str) -> Deployment | None:
        """The newest deployment onto an engine, final or not."""
        return await self._context.state.get(Deployment, STATE, engine)

    async def begin(self, view: EngineView, draft: Draft, reason: str, pooled_over: float = 0.0) -> Deployment:
        """Note that `draft` is to be deployed; `reconcile` does it.

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
            baseline_length=_baseline(view, reason, pooled_over),
            proven=pooled_over > 0.0,
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
        rules = self._rules()
        if deployment.state is DeploymentState.PENDING:
            event = await self._ready(view, deployment, now_ms)
            deployment = await self._apply(deployment, event, rules)
        if deployment.state in _IN_FLIGHT:
            deployment = await self._in_flight(view, deployment, now_ms, rules)
        if deployment.state is DeploymentState.WATCHING:
            deployment = await self._apply(deployment, VersionSeen(now_ms, view.info.version), rules)
            served = view.watch.take(deployment.version)
            if served.requests:
                deployment = await self._apply(
                    deployment,
                    RequestsServed(now_ms, deployment.version, served.requests, served.steps, round(served.accepted)),
                    rules,
                )
        return await self._apply(deployment, TimePassed(now_ms), rules)

    async def take_back(self, deployment: Deployment, reason: str) -> Deployment:
        """An operator wants a deployment that is under way undone, and its version never again."""
        now_ms = await self._context.now_ms()
        return await self._apply(deployment, RollbackRequested(now_ms, reason, quarantine=True), self._rules())

    async def _ready(self, view: EngineView, deployment: Deployment, now_ms: int) -> DeploymentEvent:
        """Whether what is in the store, whole, can go onto the engine, now that it is about to."""
        store = self._context.drafts
        try:
            draft = await anyio.to_thread.run_sync(store.get, deployment.version)
            check_fit(view.info, draft)
            await anyio.to_thread.run_sync(store.verify, deployment.version)
        except Refused as exc:
            return RollbackRequested(now_ms, str(exc))
        view.watch.reset(deployment.version)
        return Started(now_ms)

    async def _in_flight(self, view: EngineView, deployment: Deployment, now_ms: int, rules: WatchRules) -> Deployment:
        wanted = deployment.version if deployment.state is DeploymentState.SWAPPING else deployment.previous
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
            command = await view.backend.send_swap(version, path, epoch, ttl_s)
        except NotFound as exc:
            return await self._apply(deployment, RollbackRequested(now_ms, str(exc)), rules)
        failpoints.hit("deployer.sent")
        return await self._apply(deployment, SwapSent(now_ms, command), rules)

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

    def _rules(self) -> WatchRules:
        settings = self._context.config.deployment
        return WatchRules(
            swap_deadline_ms=round(settings.swap_deadline_s * 1000),
            watch_ms=round(settings.watch_s * 1000),
            watch_requests=settings.watch_requests,
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


def desired_version(deployment: Deployment | None) -> str:
    """The version that an engine should serve by its newest, finished deployment; "" when nothing says so."""
    if deployment is None or not deployment.state.final:
        return ""
    if deployment.state is DeploymentState.LIVE or deployment.reason == RESTART:
        return deployment.version
    return deployment.previous


def _baseline(view: EngineView, reason: str, pooled_over: float) -> float:
    live = view.live
    if reason == ROLLBACK or live.steps < MIN_BASELINE_TRIALS:
        return 0.0
    length = live.length(view.info.gamma_max)
    return min(length, pooled_over) if pooled_over else length


def _figures(deployment: Deployment) -> dict[str, Any]:
    return {
        "deployment": deployment.id,
        "version": deployment.version,
        "previous": deployment.previous,
        "state": deployment.state.value,
        "swap_s": deployment.swap_s,
        "baseline_length": round(deployment.baseline_length, 3),
        "watched_length": round(machine.watched_length(deployment), 3),
        "watched_requests": deployment.watched_requests,
    }
