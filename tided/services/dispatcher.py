"""Training from samples to a judged draft: `tided.machine.collection` with its IO, and the taking back of expired jobs.

Level-triggered and safe to repeat at every point. A job's id is stored before the job is submitted, so that a leader which died in
between submits the same job and not a second one; a finished job's draft has one version whoever adds it; the gate is a pure
function of the evaluations; whether the version was deployed is read from the newest deployment.
"""

from dataclasses import dataclass

import anyio.to_thread
import structlog

from tided.machine import collection as machine
from tided.machine.collection import (
    AnnounceDrift,
    Collection,
    CollectionEvent,
    CollectionRules,
    JobSubmitted,
    Outcome,
    Phase,
    Reject,
    RestartTrend,
    RowsStored,
    StartTraining,
    TrainingEnded,
    TrendJudged,
)
from tided.model import failpoints
from tided.model.errors import Conflict, Refused
from tided.model.ids import new_id
from tided.model.records import (
    Capability,
    Deployment,
    DeploymentState,
    Draft,
    DraftOrigin,
    Job,
    JobKind,
    JobResult,
    JobSpec,
    JobState,
)
from tided.services import gate
from tided.services.context import Context
from tided.services.deployer import Deployer
from tided.services.monitor import EngineView
from tided.services.stock import Stock, Stockroom

STATE = "collection"
AHEAD = 3
"""While a training is under way, up to so many times `min_rows` are captured ahead."""
FAULT_GAP = 0.5
FAULT_TRIALS = 200

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TrainingView:
    """What the controller and the status read: the machine's state, and what is in stock for it."""

    collection: Collection
    stock: Stock
    capture: bool
    reason: str


class Dispatcher:
    """Runs Algorithm 1 for each engine and turns its jobs into drafts."""

    def __init__(self, context: Context, deployer: Deployer) -> None:
        self._context = context
        self._deployer = deployer
        self._stockroom = Stockroom(context)

    async def reap(self) -> list[Job]:
        """Take back the jobs whose worker stopped renewing. Raises `Unavailable`, `Superseded`."""
        context = self._context
        reaped = await context.jobs.reap(context.leadership.require())
        for job in reaped:
            kind = "job-failed" if job.state is JobState.FAILED else "job-requeued"
            await context.announce(kind, job.id, job.error or f"attempt {job.attempt} was taken back")
        return reaped

    async def current(self, engine: str) -> Collection:
        return await self._context.state.get(Collection, STATE, engine) or Collection()

    async def view(self, engine: EngineView) -> TrainingView:
        """For the status, in standby too."""
        collection = await self.current(engine.engine)
        return self._shown(collection, await self._stockroom.stock(engine.info, collection.since_ms))

    async def reconcile(self, view: EngineView, deployment: Deployment | None, now_ms: int) -> TrainingView:
        """Take the engine's training cycle one step further. Raises `Unavailable`, `Superseded`."""
        collection = await self.current(view.engine)
        if view.trend.version == view.info.version:
            collection, _ = await self._apply(view, collection, TrendJudged(now_ms, view.trend.drifting))
        stock = await self._stockroom.stock(view.info, collection.since_ms)
        if self._context.config.training.enabled:
            collection, _ = await self._apply(view, collection, RowsStored(now_ms, self._ripe_rows(stock)))
        if collection.phase is Phase.TRAINING:
            collection = await self._training(view, collection, deployment, stock, now_ms)
        return self._shown(collection, stock)

    async def request(self, view: EngineView, event: CollectionEvent) -> Job:
        """An operator asks for a training. Raises `Conflict` when one is under way, `Refused` when there is nothing to train on."""
        collection = await self.current(view.engine)
        stock = await self._stockroom.stock(view.info, collection.since_ms)
        counted, _ = await self._apply(view, collection, RowsStored(event.now_ms, stock.fresh_rows))
        after, rejected = await self._apply(view, counted, event)
        if rejected:
            raise Conflict(rejected) if after.phase is Phase.TRAINING else Refused(f"engine {view.engine}: {rejected}")
        return await self._submitted(view, after, stock)

    async def _apply(self, view: EngineView, before: Collection, event: CollectionEvent) -> tuple[Collection, str]:
        """One step of the machine and its actions, stored. Gives the state and why the event was rejected, if it was."""
        context = self._context
        after, actions = machine.step(before, event, self._rules())
        rejected = ""
        for action in actions:
            match action:
                case StartTraining(recipe):
                    # The id is stored with the phase: whoever goes on from here submits the same job.
                    after, _ = machine.step(after, JobSubmitted(event.now_ms, new_id("job")))
                    await context.announce("training-started", view.engine, f"{recipe} training on {after.rows} rows")
                case AnnounceDrift():
                    trend = view.trend
                    message = (
                        f"acceptance fell: {trend.short.value or 0:.2f} short against {trend.long.value or 0:.2f} long"
                    )
                    await context.announce(
                        "drift-detected", view.engine, message, short=trend.short.value, long=trend.long.value
                    )
                case RestartTrend():
                    pass  # the monitor starts anew with every version that serves
                case Reject(why):
                    rejected = why
        if after != before:
            await context.state.put(STATE, view.engine, after, context.leadership.require())
            failpoints.hit(f"collection.{after.phase}")
        return after, rejected

    async def _training(
        self, view: EngineView, collection: Collection, deployment: Deployment | None, stock: Stock, now_ms: int
    ) -> Collection:
        job = await self._context.jobs.get(collection.job)
        if job is None:
            try:
                await self._submitted(view, collection, stock)
            except Refused as exc:
                return await self._ended(view, collection, None, Outcome.FAILED, str(exc), now_ms)
            return collection
        match job.state:
            case JobState.QUEUED | JobState.RUNNING:
                return collection
            case JobState.FAILED | JobState.CANCELLED:
                why = job.error or f"job {job.id} was {job.state}"
                return await self._ended(view, collection, None, Outcome.FAILED, why, now_ms)
            case JobState.SUCCEEDED:
                return await self._succeeded(view, collection, job, deployment, now_ms)

    async def _submitted(self, view: EngineView, collection: Collection, stock: Stock) -> Job:
        context, info = self._context, view.info
        target = context.known_target()
        served = await anyio.to_thread.run_sync(context.drafts.get, info.version)
        settings = context.config.training
        spec = JobSpec(
            kind=JobKind.TRAIN,
            engine=view.engine,
            target=target.digest,
            target_dir=str(context.config.target.path.absolute()),
            lineage=served.lineage,
            draft=served.version,
            draft_dir=str(context.drafts.path(served.version)),
            shards=stock.fresh,
            replay=stock.replay,
            held_out=stock.held_out,
            recipe=machine.recipe(collection),
            gamma=max(1, min(context.config.speculation.gamma_max, info.gamma_max)),
            budget_s=settings.budget_s,
            options={"adapt_vocabulary": Capability.SWAP_VOCABULARY in info.capabilities},
        )
        failpoints.hit("dispatcher.submitting")
        job = await context.jobs.submit(spec, context.leadership.require(), settings.max_attempts, collection.job)
        failpoints.hit("dispatcher.submitted")
        return job

    async def _succeeded(
        self, view: EngineView, collection: Collection, job: Job, deployment: Deployment | None, now_ms: int
    ) -> Collection:
        """The job gave a draft: store it, judge it, and follow its deployment to the end."""
        result = job.result
        if result is None or result.incumbent is None or result.candidate is None:
            why = f"job {job.id}: its result has no staged draft with two evaluations"
            return await self._ended(view, collection, job, Outcome.FAILED, why, now_ms)
        if deployment is not None and deployment.version == result.version and deployment.created_ms >= job.finished_ms:
            return await self._deployed(view, collection, job, deployment, now_ms)
        try:
            draft = await self._stored(job, result, now_ms)
        except Refused as exc:
            return await self._ended(view, collection, job, Outcome.FAILED, str(exc), now_ms)
        failpoints.hit("dispatcher.stored")
        decision = gate.judge(result.incumbent, result.candidate, self._context.config.gate)
        if decision.verdict is gate.Verdict.PASS:
            return await self._deploying(view, collection, job, draft, decision, now_ms)
        await self._announce_gate(view, draft, decision)
        outcome = Outcome.WORSE if decision.verdict is gate.Verdict.FAIL else Outcome.UNDECIDED
        return await self._ended(view, collection, job, outcome, decision.reason, now_ms)

    async def _deploying(
        self,
        view: EngineView,
        collection: Collection,
        job: Job,
        draft: Draft,
        decision: gate.GateDecision,
        now_ms: int,
    ) -> Collection:
        if view.info.version != job.spec.draft:
            why = f"the engine serves {view.info.version[:12] or 'no draft'} now, the gate compared with {job.spec.draft[:12]}"
            return await self._ended(view, collection, job, Outcome.UNDECIDED, why, now_ms)
        try:
            await self._deployer.begin(view, draft, "gate")
        except Conflict:
            return collection  # an operator's deployment is under way: it ends in a cycle to come
        except Refused as exc:
            return await self._ended(view, collection, job, Outcome.FAILED, str(exc), now_ms)
        await self._announce_gate(view, draft, decision)
        await self._suspect_fault(view, job)
        return collection

    async def _deployed(
        self, view: EngineView, collection: Collection, job: Job, deployment: Deployment, now_ms: int
    ) -> Collection:
        if not deployment.state.final:
            return collection
        if deployment.state is DeploymentState.LIVE:
            why = f"{deployment.version[:12]} is live"
            return await self._ended(view, collection, job, Outcome.DEPLOYED, why, now_ms)
        blamed = (await anyio.to_thread.run_sync(self._context.drafts.get, deployment.version)).quarantined
        outcome = Outcome.ROLLED_BACK if blamed else Outcome.FAILED
        return await self._ended(view, collection, job, outcome, deployment.error, now_ms)

    async def _ended(
        self,
        view: EngineView,
        collection: Collection,
        job: Job | None,
        outcome: Outcome,
        why: str,
        now_ms: int,
    ) -> Collection:
        """A cycle is over. Its samples go when they taught us something: consumed, a bounded part kept as replay."""
        if job is not None and outcome in (Outcome.DEPLOYED, Outcome.WORSE, Outcome.ROLLED_BACK):
            await self._stockroom.retire(view.engine, job.spec.shards)
        failpoints.hit("dispatcher.retired")
        await self._context.announce("training-ended", view.engine, f"{outcome}: {why}", job=collection.job)
        after, _ = await self._apply(view, collection, TrainingEnded(now_ms, outcome))
        return after

    async def _stored(self, job: Job, result: JobResult, now_ms: int) -> Draft:
        """The job's draft in the store; the same record when it is there already."""
        context = self._context
        target = context.known_target()

        def add() -> Draft:
            return context.drafts.add(
                context.staged_dir(result.staged),
                lineage=job.spec.lineage,
                parent=job.spec.draft,
                origin=DraftOrigin.TRAINED,
                target=target,
                job=job.id,
                evaluation=result.candidate,
                now_ms=now_ms,
            )

        try:
            return await anyio.to_thread.run_sync(context.drafts.get, result.version)
        except Refused:
            draft = await anyio.to_thread.run_sync(add)
        if draft.version != result.version:
            raise Refused(f"job {job.id}: staged draft is {draft.version[:12]}, its result says {result.version[:12]}")
        await context.announce("draft-added", draft.version, f"{draft.lineage}@{draft.number} from job {job.id}")
        return draft

    async def _announce_gate(self, view: EngineView, draft: Draft, decision: gate.GateDecision) -> None:
        await self._context.announce(
            "gate-decided",
            view.engine,
            f"{draft.lineage}@{draft.number}: {decision.verdict}: {decision.reason}",
            version=draft.version,
            verdict=decision.verdict.value,
            incumbent=round(decision.incumbent, 4),
            candidate=round(decision.candidate, 4),
            gain=round(decision.gain, 4),
            lower=round(decision.lower, 4),
            requests=decision.requests,
            tokens=decision.tokens,
        )

    async def _suspect_fault(self, view: EngineView, job: Job) -> None:
        """The incumbent scores well offline on the very traffic on which it serves badly: that is no drift, and training cannot mend it."""
        result = job.result
        if result is None or result.incumbent is None or view.live.steps < FAULT_TRIALS:
            return
        served, scored = view.live.length(result.incumbent.gamma), result.incumbent.length
        if scored - served > FAULT_GAP:
            message = (
                f"the served draft scores {scored:.2f} on held-out samples, served it gives {served:.2f}:"
                " suspect the engine (layer ids, a swap half applied, sampling), not the traffic"
            )
            await self._context.announce("engine-fault-suspected", view.engine, message, scored=scored, served=served)

    def _rules(self) -> CollectionRules:
        settings = self._context.config.training
        return CollectionRules(
            min_rows=settings.min_rows,
            max_rows=AHEAD * settings.min_rows,
            cool_down_ms=round(settings.cool_down_s * 1000),
        )

    def _ripe_rows(self, stock: Stock) -> int:
        """Rows as the machine may count them: below its threshold until the gate could judge what comes out."""
        least = self._context.config.training.min_rows
        return stock.fresh_rows if stock.judgeable else min(stock.fresh_rows, least - 1)

    def _shown(self, collection: Collection, stock: Stock) -> TrainingView:
        settings = self._context.config.training
        capture = settings.enabled and machine.capture_wanted(collection, self._rules())
        if not settings.enabled:
            return TrainingView(collection, stock, capture, "training is disabled in the configuration")
        match collection.phase:
            case Phase.TRAINING:
                reason = f"job {collection.job}, or its draft's gate and deployment, is under way"
            case Phase.STOPPED:
                reason = "the last training gave nothing better: waiting for drift"
            case Phase.COLLECTING:
                reason = f"{stock.fresh_rows} of {settings.min_rows} rows"
                if stock.fresh_rows >= settings.min_rows and not stock.judgeable:
                    reason += ", waiting for more held-out requests"
        return TrainingView(collection, stock, capture, reason)
