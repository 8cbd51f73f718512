"""The control cycle: every `daemon.cycle_s`, hold what each engine reports against what is wanted, and close the gap.

Level-triggered and idempotent: on an engine that has converged a cycle does nothing. It acts only while this tided leads, and stops
in mid-cycle when the lease is lost: every write and command asks for the epoch first. An engine in doubt (another target than the
configured one, a draft that nobody knows) is left as it is: no swap, no training, no capture, speculation as it was.
"""

import re
import tempfile
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from tided.draft.init import init_draft
from tided.draft.target import describe
from tided.model import failpoints
from tided.model.errors import Refused, Superseded, TideError, Unavailable
from tided.model.records import (
    Capability,
    Deployment,
    DeploymentState,
    Draft,
    DraftOrigin,
    Job,
    PolicySetting,
)
from tided.policies.base import SpeculationDecision
from tided.services.context import Context
from tided.services.deployer import RESTART, Deployer, desired_version
from tided.services.dispatcher import Dispatcher, TrainingView
from tided.services.monitor import EngineView, Monitor
from tided.services.speculator import Speculator, in_force

REAP_EVERY_S = 2.0
RESTART_RETRY_MS = 60_000

_log = structlog.get_logger()


class Controller:
    """Owns the views and the services that act on engines. `cycles` counts finished cycles: the watchdog's progress."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.monitor = Monitor(context.engines, lambda: context.config.training)
        self.deployer = Deployer(context)
        self.dispatcher = Dispatcher(context, self.deployer)
        self.speculator = Speculator(context.drafts)
        self.problems: dict[str, str] = {}
        """By engine: why tided keeps its hands off, or what failed in its newest cycle."""
        self.training: dict[str, TrainingView] = {}
        self.cycles = 0
        self.redis_problem = ""
        self._schedules: dict[str, tuple[int, ...]] = {}
        self._locks: dict[str, anyio.Lock] = {}
        self._reaped_s = float("-inf")
        self._lineage = ""

    def lock(self, engine: str) -> anyio.Lock:
        """Held while an engine is reconciled, and by whoever else changes its stored state."""
        return self._locks.setdefault(engine, anyio.Lock())

    async def run(self) -> None:
        """Cycle until cancelled. Only `InvariantBroken`, or a bug, ends it."""
        while True:
            try:
                await self.cycle()
                self.redis_problem = ""
            except Unavailable as exc:
                if not self.redis_problem:
                    _log.warning("cycle-failed", why=str(exc))
                self.redis_problem = str(exc)
            self.cycles += 1
            await anyio.sleep(self.context.config.daemon.cycle_s)

    async def cycle(self) -> list[str]:
        """One pass over every engine; what was done, in words. Empty when all has converged, or in standby."""
        context = self.context
        now_s = context.clock()
        before = set(self.monitor.views)
        await self.monitor.poll(now_s)
        self.speculator.forget(before - set(self.monitor.views))
        for gone in before - set(self.monitor.views):
            self.problems.pop(gone, None)
            self.training.pop(gone, None)
            self._schedules.pop(gone, None)
        if context.target is None:
            await context.read_target()
        if context.leadership.epoch is None:
            return []
        done: list[str] = []
        setting = await context.state.policy()
        now_ms = await context.now_ms()
        async with anyio.create_task_group() as group:
            for view in list(self.monitor.views.values()):
                group.start_soon(self._guarded, view, setting, now_s, now_ms, done)
        if now_s - self._reaped_s >= REAP_EVERY_S:
            self._reaped_s = now_s
            done += [f"reaped {job.id}" for job in await self._reap()]
        return done

    async def _reap(self) -> list[Job]:
        try:
            return await self.dispatcher.reap()
        except Superseded as exc:
            await self.context.leadership.step_down(exc)
            return []

    async def _guarded(
        self, view: EngineView, setting: PolicySetting, now_s: float, now_ms: int, done: list[str]
    ) -> None:
        """One engine's trouble is its own: it is noted and the others go on."""
        problem = ""
        try:
            async with self.lock(view.engine):
                problem = await self._reconcile(view, setting, now_s, now_ms, done)
        except Superseded as exc:
            await self.context.leadership.step_down(exc)
        except TideError as exc:
            problem = str(exc)
        if problem and self.problems.get(view.engine) != problem:
            _log.warning("engine-problem", engine=view.engine, why=problem)
        self.problems[view.engine] = problem

    async def _reconcile(
        self, view: EngineView, setting: PolicySetting, now_s: float, now_ms: int, done: list[str]
    ) -> str:
        context = self.context
        problem = self.mismatch(view)
        if problem:
            await self._capture(view, False, done)
            return problem
        deployment = await self.deployer.reconcile(view, now_ms)
        deployment, problem = await self._onto_its_version(view, deployment, now_ms, done)
        watching = deployment is not None and deployment.state is DeploymentState.WATCHING
        decision = await self.speculator.decide(view, setting, context.config.speculation, now_s, watching=watching)
        if decision.gammas != in_force(view.info) and Capability.SCHEDULE in view.info.capabilities:
            await view.backend.set_schedule(decision.gammas, context.leadership.require())
            done.append(f"{view.engine}: schedule {decision.gammas}")
        await self._announce_schedule(view, decision)
        if problem:
            await self._capture(view, False, done)
            return problem
        training = self.training[view.engine] = await self.dispatcher.reconcile(view, deployment, now_ms)
        await self._capture(view, training.capture, done)
        failpoints.hit("controller.reconciled")
        return ""

    async def _announce_schedule(self, view: EngineView, decision: SpeculationDecision) -> None:
        """Say that the policy chose another schedule. Probes come and go and are not worth an event."""
        if decision.probing or self._schedules.get(view.engine) == decision.gammas:
            return
        known = view.engine in self._schedules
        self._schedules[view.engine] = decision.gammas
        if known:
            message = f"drafted tokens by batch size {list(decision.gammas)}: {decision.reason}"
            await self.context.announce("schedule-changed", view.engine, message, gammas=list(decision.gammas))

    def mismatch(self, view: EngineView) -> str:
        """Why nothing at all may be done to this engine, or ""."""
        target = self.context.target
        if target is None:
            return self.context.target_problem
        if view.info.target.digest != target.digest:
            return (
                f"engine {view.engine} serves target {view.info.target.name} ({view.info.target.digest[:12]}), target.path is"
                f" {target.name} ({target.digest[:12]}): no capture, no swap; make them the same"
            )
        return ""

    async def _capture(self, view: EngineView, wanted: bool, done: list[str]) -> None:
        if Capability.TAP not in view.info.capabilities or view.info.capturing == wanted:
            return
        context = self.context
        await view.backend.set_capture(wanted, context.config.capture.credit_bytes, context.leadership.require())
        done.append(f"{view.engine}: capture {'on' if wanted else 'off'}")

    async def _onto_its_version(
        self, view: EngineView, deployment: Deployment | None, now_ms: int, done: list[str]
    ) -> tuple[Deployment | None, str]:
        """Bring an engine that was restarted back onto its version, and one that never had a draft onto version 0.

        Gives the deployment that is under way or the newest, and why training must wait, or "".
        """
        if deployment is not None and not deployment.state.final:
            return deployment, ""
        served, wanted = view.info.version, desired_version(deployment)
        if wanted and wanted != served:
            if deployment is not None and deployment.reason == RESTART and _is_recent(deployment, now_ms):
                return deployment, f"engine {view.engine} could not be put back onto {wanted[:12]}: {deployment.error}"
            draft, reason = await self._find(wanted), RESTART
        elif await self._find(served) is not None:
            return deployment, ""
        else:
            draft, reason = await self._first(view), "init"
        if draft is not None and draft.version == served:
            return deployment, ""
        if draft is None or draft.quarantined:
            name = served[:12] or "no draft"
            return (
                deployment,
                f"engine {view.engine} serves {name}, which is not in the draft store: deploy one that is",
            )
        try:
            begun = await self.deployer.begin(view, draft, reason)
        except Refused as exc:
            return deployment, str(exc)
        done.append(f"{view.engine}: {reason} onto {draft.version[:12]}")
        return begun, ""

    async def _find(self, version: str) -> Draft | None:
        if not version:
            return None
        try:
            return await anyio.to_thread.run_sync(self.context.drafts.get, version)
        except Refused:
            return None

    async def _first(self, view: EngineView) -> Draft | None:
        """Version 0 for an engine without a draft, or one that booted on what `draft init` writes; None for any other.

        Equal content has an equal version, whoever wrote it, so an engine's own version 0 is recognised.
        """
        if not view.info.version and Capability.SWAP not in view.info.capabilities:
            return None
        config, target = self.context.config, self.context.known_target()
        draft = await self.init(config.target.path, lineage_of(target.name))
        return draft if view.info.version in ("", draft.version) else None

    async def init(self, target_dir: Path, lineage: str) -> Draft:
        """Version 0 for a target in the store. Raises `Refused` for a target that is none. Takes seconds the first time."""
        context = self.context
        now_ms = await context.now_ms()

        def make() -> Draft:
            target = describe(target_dir)
            for draft in context.drafts.list(lineage):
                if draft.origin is DraftOrigin.INIT and draft.target == target.digest:
                    return draft
            with tempfile.TemporaryDirectory(prefix="tided-init-", dir=context.config.daemon.state_dir) as staged:
                init_draft(target_dir, Path(staged), context.config.training.draft_vocab)
                return context.drafts.add(
                    Path(staged),
                    lineage=lineage,
                    parent="",
                    origin=DraftOrigin.INIT,
                    target=target,
                    now_ms=now_ms,
                )

        return await anyio.to_thread.run_sync(make)


def _is_recent(deployment: Deployment, now_ms: int) -> bool:
    return now_ms - deployment.updated_ms < RESTART_RETRY_MS


def lineage_of(target_name: str) -> str:
    """A lineage's name for a target's: in the alphabet of names."""
    name = re.sub(r"[^a-z0-9._-]+", "-", target_name.lower()).strip("-._")[:64]
    return name or "draft"
