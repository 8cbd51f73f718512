"""The control cycle: every `daemon.cycle_s`, hold what each engine reports against what is wanted, and close the gap.

Level-triggered and idempotent: on an engine that has converged a cycle does nothing. It acts only while this tided leads, and stops
in mid-cycle when the lease is lost: every write and command asks for the epoch first. First each engine by itself: self-test,
deployment, version, schedule. Then each target with its engines that are in order: training, and capture as that wants it. An engine
in doubt (a target that is not configured, a draft that nobody knows) is left as it is: no swap, no training, no capture, speculation
as it was.
"""

import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from tided.draft.init import init_draft
from tided.draft.target import describe
from tided.model import failpoints
from tided.model.deployments import Deployment, DeploymentState
from tided.model.drafts import Draft, DraftOrigin
from tided.model.engines import Capability
from tided.model.errors import Refused, Superseded, TideError, Unavailable
from tided.model.jobs import Job
from tided.model.policy import PolicySetting, SpeculationMode
from tided.policies.base import SpeculationDecision
from tided.services.canaries import Canaries
from tided.services.context import Context
from tided.services.deployer import Deployer
from tided.services.dispatcher import Dispatcher
from tided.services.faults import FaultWatch
from tided.services.launching import Launching
from tided.services.monitor import EngineView, Monitor
from tided.services.pools import Heads, Member, Pool
from tided.services.scout import Scout
from tided.services.selftest import SelfTest
from tided.services.speculator import Speculator, in_force
from tided.services.training_view import TrainingView
from tided.services.workforce import Workforce
from tided.store.pressing import press

REAP_EVERY_S = 2.0
RETRY_MS = 60_000
"""Between two tries to bring an engine onto the same version."""

_log = structlog.get_logger()


class Controller:
    """Owns the views and the services that act on engines. `cycles` counts finished cycles: the watchdog's progress."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.monitor = Monitor(context.engines, context.training_for)
        self.deployer = Deployer(context, self.monitor)
        self.heads = Heads(context)
        self.canaries = Canaries(context, self.monitor, self.deployer, self.heads)
        self.scout = Scout(context, self.heads)
        self.dispatcher = Dispatcher(context, self.heads, self.canaries, self.scout)
        self.speculator = Speculator(context)
        self.selftest = SelfTest(context, self._draft_of)
        self.faults = FaultWatch(context, self.scout.rivals)
        self.problems: dict[str, str] = {}
        """By engine: why tided keeps its hands off, or what failed in its newest cycle."""
        self.warnings: dict[str, str] = {}
        """By engine: what is wrong and keeps nothing else from going on."""
        self.pools: dict[str, Pool] = {}
        """By target: its engines that were in order in the newest cycle."""
        self.training: dict[str, TrainingView] = {}
        """By target."""
        self.cycles = 0
        self.redis_problem = ""
        self._schedules: dict[str, tuple[int, ...]] = {}
        self._training_locks: dict[str, anyio.Lock] = {}
        self._init_lock = anyio.Lock()
        self._reaped_s = float("-inf")
        self.workforce = Workforce(context)
        self.launching = Launching(context)

    def lock(self, engine: str) -> anyio.Lock:
        """Held while an engine is reconciled, and by whoever else changes its stored state."""
        return self.deployer.lock(engine)

    def training_lock(self, target: str) -> anyio.Lock:
        """Held while a target's training is reconciled. Who needs an engine's lock as well takes that one second."""
        return self._training_locks.setdefault(target, anyio.Lock())

    async def run(self) -> None:
        """Cycle until cancelled. Only `InvariantBroken`, or a bug, ends it."""
        while True:
            began_s = time.monotonic()
            try:
                await self.cycle()
                self.redis_problem = ""
            except Unavailable as exc:
                if not self.redis_problem:
                    _log.warning("cycle-failed", why=str(exc))
                self.redis_problem = str(exc)
            self.cycles += 1
            _log.debug("cycle", seconds=round(time.monotonic() - began_s, 4))
            await anyio.sleep(self.context.config.daemon.cycle_s)

    async def cycle(self) -> list[str]:
        """One pass over every engine; what was done, in words. Empty when all has converged, or in standby."""
        context = self.context
        now_s = context.clock()
        before = set(self.monitor.views)
        await self.monitor.poll(now_s)
        self._forget(before - set(self.monitor.views))
        await context.read_targets()
        if not context.leadership.leads:
            self.pools, self.training = {}, {}
            self.workforce.forget()
            return []
        done: list[str] = []
        problems: dict[str, str] = {}
        setting = await context.state.policy()
        now_ms = await context.now_ms()
        sound: list[Member] = []
        async with anyio.create_task_group() as group:
            for view in list(self.monitor.views.values()):
                look = partial(self._reconcile, view, setting, now_s, now_ms, sound, done)
                group.start_soon(self._guarded, view.engine, problems, look)
        self.pools = self._pooled(sound)
        self.training = {target: view for target, view in self.training.items() if target in self.pools}
        async with anyio.create_task_group() as group:
            for pool in tuple(self.pools.values()):
                group.start_soon(self._train, pool, now_ms, problems, done)
        self._note(problems)
        leads = context.leadership.leads  # it may have stepped down in this cycle
        if leads and now_s - self._reaped_s >= REAP_EVERY_S:
            self._reaped_s = now_s
            await self.workforce.look(now_ms)
            done += [f"reaped {job.id}" for job in await self._reap()]
        return done

    def mismatch(self, view: EngineView) -> str:
        """Why nothing at all may be done to this engine, or ""."""
        if view.fault:
            return view.fault
        try:
            self.context.target_of(view.info.target)
        except Refused as exc:
            return f"engine {view.engine}: {exc}; no capture, no swap: make the [target] of the configuration and what it serves agree"
        return ""

    # --- one engine ---

    async def _guarded(self, engine: str, problems: dict[str, str], work: Callable[[], Awaitable[str]]) -> None:
        """One engine's trouble is its own: it is noted and the others go on. `work` gives a problem, or ""."""
        try:
            async with self.lock(engine):
                problem = await work()
        except Superseded as exc:
            await self.context.leadership.step_down(exc)
            return
        except TideError as exc:
            problem = str(exc)
        if problem:
            problems[engine] = problem

    async def _reconcile(
        self,
        view: EngineView,
        setting: PolicySetting,
        now_s: float,
        now_ms: int,
        sound: list[Member],
        done: list[str],
    ) -> str:
        """Everything that concerns this engine alone; when it is in order it joins `sound`."""
        context = self.context
        problem = self.mismatch(view)
        if problem:
            await self._capture(view, False, done)
            return problem
        trust = await self.selftest.reconcile(view, now_ms, done)
        if trust.probing:
            return ""
        deployment, problem = None, trust.problem
        if trust.granted:
            deployment = await self.deployer.reconcile(view, now_ms)
            deployment, problem = await self._onto_its_version(view, deployment, now_ms, done)
        watching = deployment is not None and deployment.state is DeploymentState.WATCHING
        held = view.engine in self.faults.held
        decision = await self.speculator.decide(
            view, setting, context.config.speculation, now_s, watching=watching, held=held
        )
        if decision.gammas != in_force(view.info) and Capability.SCHEDULE in view.info.capabilities:
            await view.backend.set_schedule(decision.gammas, context.leadership.require())
            done.append(f"{view.engine}: schedule {decision.gammas}")
        await self._announce_schedule(view, decision)
        if problem or not trust.granted:
            await self._capture(view, False, done)
            return problem
        if deployment is None or deployment.state.final:
            peers = [peer for peer in self.monitor.views.values() if peer.info.target.digest == view.info.target.digest]
            target, newest = context.target_of(view.info.target), deployment.id if deployment is not None else ""
            suspicion = await self.faults.reconcile(view, peers, target, newest, now_ms)
            if suspicion.questioned:
                await self.selftest.doubt(view, suspicion.onset_ms, now_ms)
        else:
            suspicion = await self.faults.current(view.engine)
        auto = setting.mode is SpeculationMode.AUTO and bool(view.version)
        sound.append(Member(view, deployment, suspicion, auto and decision.resting(view.running)))
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

    async def _capture(self, view: EngineView, wanted: bool, done: list[str]) -> str:
        if Capability.TAP in view.info.capabilities and view.info.capturing != wanted:
            context = self.context
            await view.backend.set_capture(wanted, context.config.capture.credit_bytes, context.leadership.require())
            done.append(f"{view.engine}: capture {'on' if wanted else 'off'}")
        return ""

    async def _onto_its_version(
        self, view: EngineView, deployment: Deployment | None, now_ms: int, done: list[str]
    ) -> tuple[Deployment | None, str]:
        """Bring an engine onto its target's draft, or its own after a restart, and one that never had a draft onto version 0.

        Gives the deployment that is under way or the newest, and why training must wait, or "".
        """
        self.warnings[view.engine] = ""
        if deployment is not None and not deployment.state.final:
            return deployment, ""
        served = view.info.version
        wanted = await self.heads.wanted(view, deployment)
        self.warnings[view.engine] = wanted.problem
        if wanted.version and wanted.version != served:
            if deployment is not None and deployment.version == wanted.version and _failed_lately(deployment, now_ms):
                why = f"engine {view.engine} could not be put onto {wanted.version[:12]}: {deployment.error}"
                return deployment, why
            draft, reason, over = await self.context.find_draft(wanted.version), wanted.reason, wanted.baseline_length
        elif await self.context.find_draft(served) is not None:
            return deployment, ""
        else:
            draft, reason, over = await self._first(view), "init", 0.0
        if draft is not None and draft.version == served:
            return deployment, ""
        if draft is None or draft.quarantined:
            name = served[:12] or "no draft"
            return (
                deployment,
                f"engine {view.engine} serves {name}, which is not in the draft store: deploy one that is",
            )
        try:
            begun = await self.deployer.begin(view, draft, reason, over)
        except Refused as exc:
            return deployment, str(exc)
        done.append(f"{view.engine}: {reason} onto {draft.version[:12]}")
        return begun, ""

    async def _draft_of(self, view: EngineView) -> Draft | None:
        """The stored draft that an engine serves; None if it is not known."""
        return (
            (await self.context.find_draft(view.info.version) or await self._first(view)) if view.info.version else None
        )

    async def _first(self, view: EngineView) -> Draft | None:
        """Version 0 for an engine without a draft, or one that booted on what `draft init` writes; None for any other.

        Equal content has an equal version, whoever wrote it, so an engine's own version 0 is recognised.
        """
        if not view.info.version and Capability.SWAP not in view.info.capabilities:
            return None
        target = self.context.target_of(view.info.target)
        draft = await self.init(target.path, target.name)
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
            vocab = context.training_for(target.digest).draft_vocab
            with tempfile.TemporaryDirectory(prefix="tided-init-", dir=context.config.daemon.state_dir) as staged:
                init_draft(target_dir, Path(staged), vocab)
                return context.drafts.add(
                    Path(staged),
                    lineage=lineage,
                    parent="",
                    origin=DraftOrigin.INIT,
                    target=target,
                    now_ms=now_ms,
                )

        async with self._init_lock:  # two engines that come together need it made once
            return await anyio.to_thread.run_sync(make)

    # --- one target ---

    async def _train(self, pool: Pool, now_ms: int, problems: dict[str, str], done: list[str]) -> None:
        """A target's trouble is that of its engines, and of no others."""
        try:
            async with self.training_lock(pool.digest):
                collection = await self.dispatcher.current(pool.digest)
                pool, sampling = await self.scout.reconcile(pool, collection, now_ms)
                self.pools[pool.digest] = pool
                training = self.training[pool.digest] = await self.dispatcher.reconcile(pool, now_ms)
                waited_for = [info.engine for info in pool.infos] if sampling else pool.wary(now_ms)
                for engine in waited_for:
                    await press(self.context.redis, engine)
        except Superseded as exc:
            await self.context.leadership.step_down(exc)
            return
        except TideError as exc:
            problems.update({member.view.engine: str(exc) for member in pool.members})
            return
        async with anyio.create_task_group() as group:
            for member in pool.members:
                capture = partial(self._capture, member.view, training.capture or sampling, done)
                group.start_soon(self._guarded, member.view.engine, problems, capture)
        failpoints.hit("controller.reconciled")

    def _pooled(self, sound: list[Member]) -> dict[str, Pool]:
        pools: dict[str, Pool] = {}
        for digest, target in self.context.targets.items():
            members = [member for member in sound if member.view.info.target.digest == digest]
            if members:
                pools[digest] = Pool(target, tuple(sorted(members, key=lambda member: member.view.engine)))
        return pools

    # --- all ---

    async def _reap(self) -> list[Job]:
        try:
            return await self.dispatcher.reap()
        except Superseded as exc:
            await self.context.leadership.step_down(exc)
            return []

    def _note(self, problems: dict[str, str]) -> None:
        """Keep what is wrong with each engine, and log what is new."""
        for engine in self.monitor.views:
            problem = problems.get(engine, "")
            if problem and self.problems.get(engine) != problem:
                _log.warning("engine-problem", engine=engine, why=problem)
            self.problems[engine] = problem

    def _forget(self, gone: set[str]) -> None:
        self.speculator.forget(gone)
        self.selftest.forget(gone)
        self.faults.forget(gone)
        self.scout.forget(gone)
        for engine in gone:
            for known in (self.problems, self.warnings, self._schedules):
                known.pop(engine, None)


def _failed_lately(deployment: Deployment, now_ms: int) -> bool:
    return deployment.state is not DeploymentState.LIVE and now_ms - deployment.updated_ms < RETRY_MS
