"""The control plane as one object: what the admin API serves (`tided.api.plane.Plane` is its shape). Changes are audited.

Every change writes exactly one event of kind `audit` with `data` = {"actor", "action", "target", "result"}, also when it is refused.
While this tided is in standby, reads work and changes raise `Unavailable`. All methods but `status` raise `Unavailable` while Redis
cannot be reached, `NotFound` and `Refused` for a request that is wrong, `Conflict` when something else is under way.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import structlog

import tided
from tided.machine.collection import Phase, TrainingRequested
from tided.model.deployments import Canary, Deployment, DeploymentState
from tided.model.drafts import Draft
from tided.model.errors import Conflict, NotFound, Refused, TideError, Unavailable
from tided.model.events import Event
from tided.model.ids import check_name
from tided.model.jobs import Job, JobKind, JobState, WorkerInfo, WorkerMark
from tided.model.policy import PolicySetting, SpeculationMode
from tided.model.status import Choice, EngineStatus, Explanation, PoolStatus, SpeculationStatus, Status, TrainingStatus
from tided.model.verification import Finding
from tided.services import pooled
from tided.services.controller import Controller
from tided.services.deployer import ROLLBACK, TALLY, Tally, check_fit
from tided.services.doctor import look_over
from tided.services.monitor import EngineView
from tided.services.pools import Head
from tided.services.speculator import in_force
from tided.services.training_view import TrainingView
from tided.store import purge
from tided.store.ledger import read_ledger

T = TypeVar("T")
PURGE_WAIT_S = 10.0
PURGE_POLL_S = 0.1

_log = structlog.get_logger()


class ControlPlane:
    """See the module. `actor` names who asks, e.g. "uid:1000"; it ends in the audit log."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._context = controller.context

    # --- reads ---

    async def status(self) -> Status:
        """Answers in every condition: what is wrong is in `redis` and `problems`."""
        context, controller = self._context, self._controller
        told = (controller.problems, controller.warnings, controller.speculator.problems, controller.faults.warnings)
        noted = (problem for source in told for problem in source.values())
        problems = [problem for problem in noted if problem]
        redis = controller.redis_problem or context.leadership.problem or "connected"
        setting, engines, workers, jobs, pools, canaries = PolicySetting(), (), (), (), (), ()
        try:
            setting = await context.state.policy()
            engines, workers, pools = await self.engines(), await self.workers(), await self.pools()
            canaries = await self._canaries()
            jobs = tuple(await context.jobs.list(50, (JobState.QUEUED, JobState.RUNNING)))
        except Unavailable as exc:
            redis = str(exc)
        if redis != "connected":
            problems.insert(0, f"{redis}; engines go on serving with what they have")
        problems += context.target_problems.values()
        launcher = controller.launching.status
        if launcher is not None and launcher.problem:
            problems.append(f"launcher: {launcher.problem}")
        if jobs and not workers and not context.config.launcher.kind:
            problems.append("jobs are waiting and no worker is registered: start a tide-worker")
        return Status(
            name=context.config.daemon.name,
            program=tided.__version__,
            leader=context.leadership.leads,
            epoch=context.leadership.epoch or 0,
            uptime_s=context.clock() - context.started_s,
            redis=redis,
            policy=setting,
            engines=engines,
            workers=workers,
            active_jobs=jobs,
            drafts=len(await self.drafts()),
            problems=tuple(dict.fromkeys(problems)),
            pools=pools,
            canaries=canaries,
            launcher=launcher,
        )

    async def engines(self) -> tuple[EngineStatus, ...]:
        views = sorted(self._controller.monitor.views.values(), key=lambda view: view.engine)
        return tuple([await self._engine_status(view) for view in views])

    async def _canaries(self) -> tuple[Canary, ...]:
        """Those under way, and how the newest of each target ended."""
        found = [await self._controller.canaries.current(digest) for digest in self._context.targets]
        return tuple(canary for canary in found if canary is not None)

    async def drafts(self) -> tuple[Draft, ...]:
        return tuple(await anyio.to_thread.run_sync(self._context.drafts.list))

    async def draft(self, ref: str) -> Draft:
        return await anyio.to_thread.run_sync(self._context.drafts.get, ref)

    async def jobs(self, limit: int, state: JobState | None = None) -> tuple[Job, ...]:
        return tuple(await self._context.jobs.list(limit, (state,) if state is not None else ()))

    async def job(self, job_id: str) -> Job:
        job = await self._context.jobs.get(check_name(job_id, "job"))
        if job is None:
            raise NotFound(f"no job {job_id}: see `tidectl jobs list`")
        return job

    async def workers(self) -> tuple[WorkerInfo, ...]:
        return tuple(await self._context.workers.list())

    async def pools(self) -> tuple[PoolStatus, ...]:
        return await pooled.pools(self._context, self._controller.scout)

    async def policy(self) -> PolicySetting:
        return await self._context.state.policy()

    async def explain(self, engine: str | None) -> tuple[Explanation, ...]:
        views = sorted(self._controller.monitor.views.values(), key=lambda view: view.engine)
        setting = await self.policy()
        auto = setting.mode is SpeculationMode.AUTO
        name = self._context.config.speculation.policy if auto else "operator"
        found = [self._explanation(view, name) for view in (views if engine is None else [self._view(engine)])]
        return tuple(explanation for explanation in found if explanation is not None)

    def _explanation(self, view: EngineView, policy: str) -> Explanation | None:
        decision = self._controller.speculator.decisions.get(view.engine)
        if decision is None:
            return None
        training = self._controller.training.get(view.info.target.digest)
        return Explanation(
            engine=view.engine,
            policy=policy,
            running=view.running,
            gammas=decision.gammas,
            probing=decision.probing,
            reason=decision.reason,
            alpha=decision.alpha,
            conditional=tuple(view.acceptance.conditional(k) for k in range(len(view.acceptance.trials))),
            choices=tuple(Choice(choice.batch, choice.gamma, choice.speedups) for choice in decision.choices),
            figures=dict(decision.figures),
            training=training.reason if training is not None else "",
        )

    async def events(self, after: str, limit: int) -> tuple[Event, ...]:
        store = self._context.events
        return tuple(await (store.read(after, limit) if after else store.newest(limit)))

    async def doctor(self, engine: str | None) -> tuple[Finding, ...]:
        views = sorted(self._controller.monitor.views.values(), key=lambda view: view.engine)
        return await look_over(self._controller, views if engine is None else [self._view(engine)])

    # --- changes ---

    async def init_draft(self, target_dir: Path, name: str, actor: str) -> Draft:
        async def do() -> Draft:
            self._context.leadership.require()
            return await self._controller.init(target_dir, check_name(name, "lineage"))

        return await self._audited("init-draft", name, actor, do)

    async def deploy(self, ref: str, engine: str | None, actor: str) -> tuple[Deployment, ...]:
        async def do() -> tuple[Deployment, ...]:
            self._context.leadership.require()
            draft = await self.draft(ref)
            views = [self._view(engine)] if engine else await self._fitting(draft)
            begun = tuple([await self._begin(view, draft, "operator") for view in views])
            if engine is None:  # for those that come later, too
                since_ms = min(deployment.created_ms for deployment in begun)
                await self._controller.heads.move(draft.target, Head(draft.version, since_ms))
            return begun

        return await self._audited("deploy", f"{ref} onto {engine or 'all that fit'}", actor, do)

    async def rollback(self, engine: str, actor: str) -> Deployment:
        """Back to the version before, and the present one into quarantine: engines that share it go back as well.

        A deployment under way is taken back.
        """

        async def do() -> Deployment:
            self._context.leadership.require()
            view = self._view(engine)
            reason = f"rolled back by {actor}"
            async with self._controller.lock(engine):
                current = await self._controller.deployer.current(engine)
                if current is not None and not current.state.final:
                    return await self._controller.deployer.take_back(current, reason)
            if current is None or current.state is not DeploymentState.LIVE or not current.previous:
                raise Refused(f"engine {engine}: there is no earlier version to go back to; deploy one by name")
            begun = await self._begin(view, await self.draft(current.previous), ROLLBACK)
            await anyio.to_thread.run_sync(self._context.drafts.quarantine, current.version, reason)
            return begun

        return await self._audited("rollback", engine, actor, do)

    async def cancel(self, job_id: str, actor: str) -> Job:
        async def do() -> Job:
            return await self._context.jobs.cancel(job_id, self._context.leadership.require())

        return await self._audited("cancel", job_id, actor, do)

    async def retry(self, job_id: str, actor: str) -> Job:
        async def do() -> Job:
            self._context.leadership.require()
            job = await self.job(job_id)
            if job.state not in (JobState.FAILED, JobState.CANCELLED):
                raise Conflict(f"job {job_id} is {job.state}: only what failed or was cancelled is done again")
            if job.spec.kind is not JobKind.TRAIN:
                raise Refused(f"job {job_id}: whoever asked for this {job.spec.kind} asks again by itself")
            return await self._train(job.spec.target)

        return await self._audited("retry", job_id, actor, do)

    async def cordon(self, worker: str, drain: bool, actor: str) -> WorkerMark:
        mark = WorkerMark.DRAIN if drain else WorkerMark.CORDON
        return await self._marked(worker, mark, actor)

    async def uncordon(self, worker: str, actor: str) -> WorkerMark:
        return await self._marked(worker, WorkerMark.NONE, actor)

    async def _marked(self, worker: str, mark: WorkerMark, actor: str) -> WorkerMark:
        async def do() -> WorkerMark:
            workers, epoch = self._context.workers, self._context.leadership.require()
            name = check_name(worker, "worker")
            known = name in {info.worker for info in await workers.list()}
            if not known and await workers.marked(name) is WorkerMark.NONE:
                raise NotFound(f"no worker {name}: see `tidectl workers list`")
            await workers.mark(name, mark, epoch)
            return mark

        return await self._audited("uncordon" if mark is WorkerMark.NONE else mark.value, worker, actor, do)

    async def set_policy(self, mode: SpeculationMode, gamma: int, actor: str) -> PolicySetting:
        async def do() -> PolicySetting:
            most = self._context.config.speculation.gamma_max
            if mode is SpeculationMode.FIXED and not 0 <= gamma <= most:
                raise Refused(f"gamma {gamma}: expected 0 to {most} (speculation.gamma_max)")
            setting = PolicySetting(mode, gamma if mode is SpeculationMode.FIXED else 0)
            await self._context.state.put_policy(setting, self._context.leadership.require())
            return setting

        shown = f"{mode.value}{f' gamma={gamma}' if mode is SpeculationMode.FIXED else ''}"
        return await self._audited("set-policy", shown, actor, do)

    async def train_now(self, engine: str | None, actor: str) -> Job:
        async def do() -> Job:
            self._context.leadership.require()
            view = self._view(engine, of_one_target=True)
            problem = self._controller.problems.get(view.engine, "")
            if problem:
                raise Refused(problem)
            return await self._train(view.info.target.digest)

        return await self._audited("train", engine or "the only target", actor, do)

    async def purge(self, engine: str | None, actor: str) -> dict[str, Any]:
        """Delete what was captured. `rows` counts all of it, `waiting_bytes` what goes only when a collector runs again."""

        async def do() -> dict[str, Any]:
            self._context.leadership.require()
            if engine is not None:
                check_name(engine, "engine")
            return await self._purge(engine)

        return await self._audited("purge", engine or "all engines", actor, do)

    # --- how ---

    async def _train(self, target: str) -> Job:
        """From what is stored for a target, by its digest."""
        event = TrainingRequested(await self._context.now_ms())
        async with self._controller.training_lock(target):
            pool = self._controller.pools.get(target)
            if pool is None:
                known = self._context.targets.get(target)
                name = known.name if known is not None else target[:12]
                raise Refused(f"no engine of target {name} is in order: see `tidectl status`")
            return await self._controller.dispatcher.request(pool, event)

    async def _discarded(self, engine: str) -> None:
        """Wait until the collector has discarded what was marked."""
        while True:
            if not await purge.marked(self._context.redis, engine):
                return
            await anyio.sleep(PURGE_POLL_S)

    async def _purge(self, engine: str | None) -> dict[str, Any]:
        context = self._context
        before = await anyio.to_thread.run_sync(context.samples.ledger)
        engines = [engine] if engine is not None else await purge.engines(context.redis)
        on_their_way = [await read_ledger(context.redis, name) for name in engines]
        for name in engines:
            await purge.mark(context.redis, name)
        gone = await anyio.to_thread.run_sync(context.samples.purge, engine)
        context.exchange.look()
        with anyio.move_on_after(PURGE_WAIT_S):
            for name in engines:
                await self._discarded(name)
        rows = (await anyio.to_thread.run_sync(context.samples.ledger)).purged - before.purged
        waiting = 0
        for name, then in zip(engines, on_their_way, strict=True):
            now = await read_ledger(context.redis, name)
            rows += now.purged - then.purged
            waiting += now.stream_bytes if await purge.marked(context.redis, name) else 0
        return {"rows": rows, "shards": gone.shards, "bytes": gone.bytes, "waiting_bytes": waiting}

    async def _audited(self, action: str, target: str, actor: str, do: Callable[[], Awaitable[T]]) -> T:
        result = "failed"
        try:
            done = await do()
            result = "done"
            return done
        except TideError as exc:
            result = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._audit(action, target, actor, result)

    async def _audit(self, action: str, target: str, actor: str, result: str) -> None:
        data = {"actor": actor, "action": action, "target": target, "result": result}
        _log.info("audit", **data)
        try:
            now_ms = await self._context.now_ms()
            await self._context.events.append(Event("audit", now_ms, target, f"{actor}: {action}: {result}", data))
        except Unavailable as exc:
            _log.warning("audit-not-stored", why=str(exc))  # the log line above stays

    def _view(self, engine: str | None, *, of_one_target: bool = False) -> EngineView:
        """An engine by name; None: the only one, or with `of_one_target` any, when all serve the same."""
        views = self._controller.monitor.views
        if engine is None:
            targets = {view.info.target.digest for view in views.values()}
            if len(targets if of_one_target else views) != 1:
                names = ", ".join(sorted(views)) or "none is connected"
                raise Refused(f"name the engine: {names}")
            return next(iter(views.values()))
        if engine not in views:
            raise NotFound(f"no engine {engine} is connected: see `tidectl engines`")
        return views[engine]

    async def _fitting(self, draft: Draft) -> list[EngineView]:
        """The engines that can take a draft and neither serve it nor are on their way to it. Raises `Conflict` when one is on its way to
        another: then nothing is begun anywhere."""
        fitting: list[EngineView] = []
        refusal: Refused | None = None
        for view in self._controller.monitor.views.values():
            try:
                check_fit(view.info, draft)
                fitting.append(view)
            except Refused as exc:
                refusal = exc
        if not fitting:
            raise refusal or NotFound("no engine is connected: see `tidectl engines`")
        wanting: list[EngineView] = []
        for view in fitting:
            deployment = await self._controller.deployer.current(view.engine)
            if deployment is None or deployment.state.final:
                if view.info.version != draft.version:
                    wanting.append(view)
            elif deployment.version != draft.version:
                raise Conflict(
                    f"engine {view.engine}: deployment of {deployment.version[:12]} is under way ({deployment.state}); "
                    f"wait for its end, or `tidectl drafts rollback {view.engine}` takes it back"
                )
        return wanting or fitting

    async def _begin(self, view: EngineView, draft: Draft, reason: str) -> Deployment:
        problem = self._controller.mismatch(view) or self._controller.selftest.refusal(view.info)
        if problem:
            raise Refused(problem)
        async with self._controller.lock(view.engine):
            return await self._controller.deployer.begin(view, draft, reason)

    async def _engine_status(self, view: EngineView) -> EngineStatus:
        context, controller = self._context, self._controller
        now_s = context.clock()
        deployment = await controller.deployer.current(view.engine)
        target = view.info.target.digest
        training = controller.training.get(target) or await controller.dispatcher.view(target)
        return EngineStatus(
            info=view.info,
            draft=await self._name_of(view.info.version),
            running=view.running,
            waiting=view.waiting,
            tokens_per_s=view.tokens_per_s(now_s),
            accept_length=view.accept_length(now_s),
            speculation=self._speculation(view),
            training=await self._training(view, training, deployment),
            samples=await read_ledger(context.redis, view.engine),
            deployment=deployment,
            swaps=(await context.state.get(Tally, TALLY, view.engine) or Tally()).swaps,
            verification=await controller.selftest.current(view.info),
        )

    async def _name_of(self, version: str) -> str:
        if not version:
            return ""
        try:
            draft = await self.draft(version)
        except Refused:
            return ""
        return f"{draft.lineage}@{draft.number}"

    def _speculation(self, view: EngineView) -> SpeculationStatus:
        decision = self._controller.speculator.decisions.get(view.engine)
        gammas = in_force(view.info)
        if decision is None:
            return SpeculationStatus(gammas, (1.0,) * len(gammas), view.acceptance.alpha, "not decided by this tided")
        predicted = tuple(
            choice.speedups[gamma] if gamma < len(choice.speedups) else 1.0
            for choice, gamma in zip(decision.choices, gammas, strict=False)
        )
        return SpeculationStatus(gammas, predicted or (1.0,) * len(gammas), decision.alpha, decision.reason)

    async def _training(
        self, view: EngineView, training: TrainingView, deployment: Deployment | None
    ) -> TrainingStatus:
        settings, collection = self._context.training_for(view.info.target.digest), training.collection
        state, reason = (
            {Phase.STOPPED: "waiting", Phase.COLLECTING: "collecting"}.get(collection.phase, ""),
            training.reason,
        )
        if collection.phase is Phase.TRAINING:
            under_way = deployment is not None and not deployment.state.final
            state = "deploying" if under_way else "training"
        if not settings.enabled:
            state = "off"
        problem = self._controller.problems.get(view.engine, "") or self._controller.selftest.refusal(view.info)
        if problem:
            state, reason = "off", problem
        return TrainingStatus(
            state=state,
            reason=reason,
            short=view.trend.short.value,
            long=view.trend.long.value,
            rows=training.stock.fresh_rows,
            rows_needed=settings.min_rows,
            drifts=collection.drifts,
            trainings=collection.trainings,
            job=collection.job,
        )
