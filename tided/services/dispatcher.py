"""Training from samples to a judged draft, for all engines of a target: `tided.machine.collection` with its IO.

One decision and one job at a time for a target, from what all its engines stored. A draft that passes the gate goes onto one engine
first, its canary; when it is live there it becomes the target's head, which the others follow (`tided.services.pools`).

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
    DriftAnswered,
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
    Needs,
)
from tided.services import gate
from tided.services.context import Context
from tided.services.deployer import Deployer
from tided.services.pools import Head, Heads, Member, Pool
from tided.services.stock import Stock, Stockroom

STATE = "collection"
AHEAD = 3
"""While a training is under way, up to so many times `min_rows` are captured ahead."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TrainingView:
    """What the controller and the status read: the machine's state, and what is in stock for it."""

    collection: Collection
    stock: Stock
    capture: bool
    reason: str


class Dispatcher:
    """Runs Algorithm 1 for each target and turns its jobs into drafts."""

    def __init__(self, context: Context, deployer: Deployer, heads: Heads) -> None:
        self._context = context
        self._deployer = deployer
        self._heads = heads
        self._stockroom = Stockroom(context)

    async def reap(self) -> list[Job]:
        """Take back the jobs whose worker stopped renewing. Raises `Unavailable`, `Superseded`."""
        context = self._context
        reaped = await context.jobs.reap(context.leadership.require())
        for job in reaped:
            kind = "job-failed" if job.state is JobState.FAILED else "job-requeued"
            await context.announce(kind, job.id, job.error or f"attempt {job.attempt} was taken back")
        return reaped

    async def current(self, target: str) -> Collection:
        """A target's training cycle, by its digest."""
        return await self._context.state.get(Collection, STATE, target) or Collection()

    async def view(self, target: str) -> TrainingView:
        """For the status, in standby too."""
        collection = await self.current(target)
        stock = await self._stockroom.stock(target, collection.since_ms)
        return self._shown(target, collection, stock, await self._context.now_ms())

    async def reconcile(self, pool: Pool, now_ms: int) -> TrainingView:
        """Take the target's training cycle one step further. Raises `Unavailable`, `Superseded`."""
        target = pool.digest
        collection = await self.current(target)
        incumbent = await self._heads.incumbent(pool)
        collection, _ = await self._apply(pool, collection, DriftAnswered(now_ms, pool.answered))
        low = _low(pool, collection, incumbent)
        collection, _ = await self._apply(pool, collection, TrendJudged(now_ms, low, _since_ms(pool, low)))
        stock = await self._stockroom.stock(target, collection.since_ms, pool.domain)
        if self._context.training_for(target).enabled:
            rows = self._ripe_rows(pool, stock)
            collection, _ = await self._apply(pool, collection, RowsStored(now_ms, rows))
        if collection.phase is Phase.TRAINING:
            collection = await self._training(pool, collection, stock, now_ms)
        return self._shown(target, collection, stock, now_ms, pool)

    async def request(self, pool: Pool, event: CollectionEvent) -> Job:
        """An operator asks for a training. Raises `Conflict` when one is under way, `Refused` when there is nothing to train on."""
        collection = await self.current(pool.digest)
        stock = await self._stockroom.stock(pool.digest, collection.since_ms, pool.domain)
        counted, _ = await self._apply(pool, collection, RowsStored(event.now_ms, stock.fresh_rows))
        after, rejected = await self._apply(pool, counted, event)
        if rejected:
            raise Conflict(rejected) if after.phase is Phase.TRAINING else Refused(f"{pool.target.name}: {rejected}")
        return await self._submitted(pool, after, stock)

    async def _apply(self, pool: Pool, before: Collection, event: CollectionEvent) -> tuple[Collection, str]:
        """One step of the machine and its actions, stored. Gives the state and why the event was rejected, if it was."""
        context, name = self._context, pool.target.name
        after, actions = machine.step(before, event, self._rules(pool.digest))
        rejected = ""
        for action in actions:
            match action:
                case StartTraining(recipe):
                    # The id is stored with the phase: whoever goes on from here submits the same job.
                    after, _ = machine.step(after, JobSubmitted(event.now_ms, new_id("job")))
                    await context.announce("training-started", name, f"{recipe} training on {after.rows} rows")
                case AnnounceDrift(engines):
                    for member in pool.members:
                        if member.view.engine in engines:
                            await self._announce_drift(member)
                case RestartTrend():
                    pass  # the monitor starts anew with every version that serves
                case Reject(why):
                    rejected = why
        if after != before:
            await context.state.put(STATE, pool.digest, after, context.leadership.require())
            failpoints.hit(f"collection.{after.phase}")
        return after, rejected

    async def _announce_drift(self, member: Member) -> None:
        trend = member.view.trend
        short, long = trend.short.value, trend.long.value
        message = f"acceptance fell: {short or 0:.2f} short against {long or 0:.2f} long"
        await self._context.announce("drift-detected", member.view.engine, message, short=short, long=long)

    async def _training(self, pool: Pool, collection: Collection, stock: Stock, now_ms: int) -> Collection:
        job = await self._context.jobs.get(collection.job)
        if job is None:
            try:
                await self._submitted(pool, collection, stock)
            except Refused as exc:
                return await self._ended(pool, collection, None, Outcome.FAILED, str(exc), now_ms)
            return collection
        match job.state:
            case JobState.QUEUED | JobState.RUNNING:
                return collection
            case JobState.FAILED | JobState.CANCELLED:
                why = job.error or f"job {job.id} was {job.state}"
                return await self._ended(pool, collection, job, Outcome.FAILED, why, now_ms)
            case JobState.SUCCEEDED:
                return await self._succeeded(pool, collection, job, now_ms)

    async def _submitted(self, pool: Pool, collection: Collection, stock: Stock) -> Job:
        context, target = self._context, pool.target
        incumbent = await anyio.to_thread.run_sync(context.drafts.get, await self._heads.incumbent(pool))
        settings = context.training_for(pool.digest)
        spec = JobSpec(
            kind=JobKind.TRAIN,
            engine=pool.names,
            target=target.info.digest,
            target_dir=str(target.path.absolute()),
            lineage=incumbent.lineage,
            draft=incumbent.version,
            draft_dir=str(context.drafts.path(incumbent.version)),
            shards=stock.fresh,
            replay=stock.replay,
            held_out=stock.held_out,
            recipe=machine.recipe(collection),
            gamma=pool.drafted(context.config.speculation.gamma_max),
            budget_s=settings.budget_s,
            options={"adapt_vocabulary": pool.can(Capability.SWAP_VOCABULARY)},
            priority=context.priority_of(pool.digest),
            needs=Needs(settings.device, settings.devices, settings.memory_bytes),
        )
        failpoints.hit("dispatcher.submitting")
        job = await context.jobs.submit(spec, context.leadership.require(), settings.max_attempts, collection.job)
        failpoints.hit("dispatcher.submitted")
        return job

    async def _succeeded(self, pool: Pool, collection: Collection, job: Job, now_ms: int) -> Collection:
        """The job gave a draft: store it, judge it, and follow its canary's deployment to the end."""
        result = job.result
        if result is None or result.incumbent is None or result.candidate is None:
            why = f"job {job.id}: its result has no staged draft with two evaluations"
            return await self._ended(pool, collection, job, Outcome.FAILED, why, now_ms)
        canary = _canary(pool, job, result)
        if canary is not None:
            return await self._deployed(pool, collection, job, canary, now_ms)
        try:
            draft = await self._stored(pool, job, result, now_ms)
        except Refused as exc:
            return await self._ended(pool, collection, job, Outcome.FAILED, str(exc), now_ms)
        failpoints.hit("dispatcher.stored")
        decision = gate.judge(result.incumbent, result.candidate, self._context.config.gate)
        if decision.verdict is gate.Verdict.PASS:
            return await self._deploying(pool, collection, job, draft, decision, now_ms)
        await self._announce_gate(pool, draft, decision)
        outcome = Outcome.WORSE if decision.verdict is gate.Verdict.FAIL else Outcome.UNDECIDED
        return await self._ended(pool, collection, job, outcome, decision.reason, now_ms)

    async def _deploying(
        self, pool: Pool, collection: Collection, job: Job, draft: Draft, decision: gate.GateDecision, now_ms: int
    ) -> Collection:
        """Onto the busiest engine that serves what the gate compared with: there the watch says most, and soonest."""
        if pool.hold:
            return collection  # which draft shall serve is just being found out
        fit = [member for member in pool.members if member.view.info.version == job.spec.draft]
        if not fit:
            serves = pool.members[0].view.info.version[:12] or "no draft"
            why = f"{serves} is served now, the gate compared with {job.spec.draft[:12]}"
            return await self._ended(pool, collection, job, Outcome.UNDECIDED, why, now_ms)
        now_s = self._context.clock()
        waiting, refused = False, ""
        for member in sorted(fit, key=lambda member: -(member.view.tokens_per_s(now_s) or 0.0)):
            try:
                async with self._deployer.lock(member.view.engine):
                    await self._deployer.begin(member.view, draft, "gate")
            except Conflict:
                waiting = True  # an operator's deployment is under way: it ends in a cycle to come
            except Refused as exc:
                refused = str(exc)
            else:
                await self._announce_gate(pool, draft, decision)
                return collection
        return collection if waiting else await self._ended(pool, collection, job, Outcome.FAILED, refused, now_ms)

    async def _deployed(
        self, pool: Pool, collection: Collection, job: Job, deployment: Deployment, now_ms: int
    ) -> Collection:
        if not deployment.state.final:
            return collection
        if deployment.state is DeploymentState.LIVE:
            await self._heads.move(pool.digest, Head(deployment.version, deployment.created_ms))
            why = f"{deployment.version[:12]} is live on {deployment.engine}"
            return await self._ended(pool, collection, job, Outcome.DEPLOYED, why, now_ms)
        blamed = (await anyio.to_thread.run_sync(self._context.drafts.get, deployment.version)).quarantined
        outcome = Outcome.ROLLED_BACK if blamed else Outcome.FAILED
        return await self._ended(pool, collection, job, outcome, deployment.error, now_ms)

    async def _ended(
        self, pool: Pool, collection: Collection, job: Job | None, outcome: Outcome, why: str, now_ms: int
    ) -> Collection:
        """A cycle is over. Its samples go when they taught us something: consumed, a bounded part kept as replay."""
        if job is not None and outcome in (Outcome.DEPLOYED, Outcome.WORSE, Outcome.ROLLED_BACK):
            await self._stockroom.retire(pool.digest, job.spec.shards, pool.domain, pool.domains)
        failpoints.hit("dispatcher.retired")
        await self._context.announce("training-ended", pool.target.name, f"{outcome}: {why}", job=collection.job)
        gain, worker_ms = self._gain(job), _worker_ms(job)
        after, _ = await self._apply(pool, collection, TrainingEnded(now_ms, outcome, gain, worker_ms))
        return after

    def _gain(self, job: Job | None) -> float:
        """By which share the gate found the job's draft better; 1.0 where it found nothing."""
        result = job.result if job is not None else None
        if result is None or result.incumbent is None or result.candidate is None:
            return 1.0
        decision = gate.judge(result.incumbent, result.candidate, self._context.config.gate)
        return decision.gain / decision.incumbent if decision.incumbent > 0.0 else 1.0

    async def _stored(self, pool: Pool, job: Job, result: JobResult, now_ms: int) -> Draft:
        """The job's draft in the store; the same record when it is there already."""
        context = self._context

        def add() -> Draft:
            return context.drafts.add(
                context.staged_dir(result.staged),
                lineage=job.spec.lineage,
                parent=job.spec.draft,
                origin=DraftOrigin.TRAINED,
                target=pool.target.info,
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

    async def _announce_gate(self, pool: Pool, draft: Draft, decision: gate.GateDecision) -> None:
        await self._context.announce(
            "gate-decided",
            pool.target.name,
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

    def _rules(self, target: str) -> CollectionRules:
        settings = self._context.training_for(target)
        return CollectionRules(
            min_rows=settings.min_rows,
            max_rows=AHEAD * settings.min_rows,
            cool_down_ms=round(settings.cool_down_s * 1000),
            jobs_per_hour=settings.jobs_per_hour,
            worker_ms_per_hour=round(settings.worker_s_per_hour * 1000),
            job_ms=round(settings.budget_s * 1000),
            plateau_gain=settings.plateau_gain,
        )

    def _ripe_rows(self, pool: Pool, stock: Stock) -> int:
        """Rows as the machine may count them: below its threshold until the gate could judge what comes out, and while something speaks
        against any training."""
        least = self._context.training_for(pool.digest).min_rows
        ripe = stock.judgeable and not _hindrance(pool)
        return stock.fresh_rows if ripe else min(stock.fresh_rows, least - 1)

    def _shown(
        self, target: str, collection: Collection, stock: Stock, now_ms: int, pool: Pool | None = None
    ) -> TrainingView:
        settings = self._context.training_for(target)
        # Without samples nobody can say whether an engine is at fault, or no more.
        asked = pool is not None and bool(pool.suspected or pool.questioned)
        rules = self._rules(target)
        capture = settings.enabled and (asked or machine.capture_wanted(collection, rules))
        if not settings.enabled:
            return TrainingView(collection, stock, capture, "training is disabled in the configuration")
        match collection.phase:
            case Phase.TRAINING:
                reason = f"job {collection.job}, or its draft's gate and deployment, is under way"
            case Phase.STOPPED:
                reason = "the last training gave nothing better: waiting for drift"
                if machine.plateaued(collection, rules):
                    gains = ", ".join(f"{gain:.1%}" for gain in collection.gains)
                    reason = f"the last trainings gained next to nothing ({gains}): waiting for drift"
            case Phase.COLLECTING:
                reason = f"{stock.fresh_rows} of {settings.min_rows} rows"
                if stock.fresh_rows >= settings.min_rows and not stock.judgeable:
                    reason += ", waiting for more held-out requests"
                elif stock.fresh_rows >= settings.min_rows and now_ms < collection.not_before_ms:
                    reason += f", cooling down for {(collection.not_before_ms - now_ms) / 1000:.0f} s"
                if over := machine.over_budget(collection, now_ms, rules):
                    reason += f", {over}"
        hindrance = _hindrance(pool) if pool is not None else ""
        if collection.phase is not Phase.TRAINING and hindrance:
            reason += f", not training {hindrance}"
        return TrainingView(collection, stock, capture, reason)


def _hindrance(pool: Pool) -> str:
    """Until or while what no training may begin, or "": what a suspected engine serves badly, no training mends."""
    if pool.suspected:
        return f"while a fault of {', '.join(pool.suspected)} is suspected"
    if pool.questioned:
        return f"until a score says why the acceptance of {', '.join(pool.questioned)} has fallen"
    return f"while {pool.hold}" if pool.hold else ""


def _low(pool: Pool, collection: Collection, incumbent: str) -> tuple[str, ...]:
    """Engines whose acceptance has drifted. Only one that serves the incumbent can be judged now; of others it stays as it was. What
    falls at an engine is no drift until it is known that the engine is not the cause; what is known of an earlier version says nothing."""
    judged = {
        member.view.engine: member.suspicion.drifted
        for member in pool.members
        if member.view.trend.version == member.view.info.version == member.suspicion.version == incumbent
    }
    unchanged = [engine for engine in collection.low if engine not in judged]
    return tuple(sorted([*unchanged, *(engine for engine, drifting in judged.items() if drifting)]))


def _since_ms(pool: Pool, low: tuple[str, ...]) -> int:
    """When the first of these began to fall, 0 if that is not known: what was captured meanwhile is of the new traffic."""
    return min((m.suspicion.onset_ms for m in pool.members if m.view.engine in low and m.suspicion.onset_ms), default=0)


def _canary(pool: Pool, job: Job, result: JobResult) -> Deployment | None:
    """The deployment of the job's draft onto one engine; of several (a canary that died), the one that got furthest."""
    found = [
        member.deployment
        for member in pool.members
        if member.deployment is not None
        and member.deployment.version == result.version
        and member.deployment.created_ms >= job.finished_ms
    ]
    return min(found, key=_progress, default=None)


def _worker_ms(job: Job | None) -> int:
    """What its newest attempt took."""
    return max(job.finished_ms - job.started_ms, 0) if job is not None and job.started_ms else 0


def _progress(deployment: Deployment) -> tuple[bool, bool]:
    return deployment.state is not DeploymentState.LIVE, deployment.state.final
