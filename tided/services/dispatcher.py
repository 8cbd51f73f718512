"""Training from samples to a judged draft, for all engines of a target: `tided.machine.collection` with its IO.

One decision and one job at a time for a target, from what all its engines stored. A draft that passes the gate goes onto one engine
first, its canary; when it is live there it becomes the target's head, which the others follow (`tided.services.pools`).

Level-triggered and safe to repeat at every point. A job's id is stored before the job is submitted, so that a leader which died in
between submits the same job and not a second one; a finished job's draft has one version whoever adds it; the gate is a pure
function of the evaluations; whether the version was deployed is read from the newest deployment.
"""

import anyio.to_thread
import structlog

from tided.machine import collection as machine
from tided.machine.collection import (
    AnnounceDrift,
    Collection,
    CollectionEvent,
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
from tided.services.training_view import TrainingView, ripe_rows, rules_of, view_of

STATE = "collection"

_log = structlog.get_logger()


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
        return view_of(collection, stock, self._context.training_for(target), await self._context.now_ms())

    async def reconcile(self, pool: Pool, now_ms: int) -> TrainingView:
        """Take the target's training cycle one step further. Raises `Unavailable`, `Superseded`."""
        target = pool.digest
        collection = await self.current(target)
        incumbent = await self._heads.incumbent(pool)
        collection, _ = await self._apply(pool, collection, DriftAnswered(now_ms, pool.answered))
        low = _low(pool, collection, incumbent)
        collection, _ = await self._apply(pool, collection, TrendJudged(now_ms, low, _since_ms(pool, low)))
        stock = await self._stockroom.stock(target, collection.since_ms, pool.domain)
        settings = self._context.training_for(target)
        if settings.enabled:
            rows = ripe_rows(stock, settings, pool)
            collection, _ = await self._apply(pool, collection, RowsStored(now_ms, rows))
        if collection.phase is Phase.TRAINING:
            collection = await self._training(pool, collection, stock, now_ms)
        return view_of(collection, stock, settings, now_ms, pool)

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
        after, actions = machine.step(before, event, rules_of(context.training_for(pool.digest)))
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
        decision = gate.judge(result.incumbent, result.candidate, self._context.config.gate)
        canary = _canary(pool, job, result)
        if canary is not None:
            return await self._deployed(pool, collection, job, canary, decision, now_ms)
        try:
            draft = await self._stored(pool, job, result, now_ms)
        except Refused as exc:
            return await self._ended(pool, collection, job, Outcome.FAILED, str(exc), now_ms, decision.gain_share)
        failpoints.hit("dispatcher.stored")
        if decision.verdict is gate.Verdict.PASS:
            return await self._deploying(pool, collection, job, draft, decision, now_ms)
        await self._announce_gate(pool, draft, decision)
        outcome = Outcome.WORSE if decision.verdict is gate.Verdict.FAIL else Outcome.UNDECIDED
        return await self._ended(pool, collection, job, outcome, decision.reason, now_ms, decision.gain_share)

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
            return await self._ended(pool, collection, job, Outcome.UNDECIDED, why, now_ms, decision.gain_share)
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
        if waiting:
            return collection
        return await self._ended(pool, collection, job, Outcome.FAILED, refused, now_ms, decision.gain_share)

    async def _deployed(
        self,
        pool: Pool,
        collection: Collection,
        job: Job,
        deployment: Deployment,
        decision: gate.GateDecision,
        now_ms: int,
    ) -> Collection:
        if not deployment.state.final:
            return collection
        if deployment.state is DeploymentState.LIVE:
            await self._heads.move(pool.digest, Head(deployment.version, deployment.created_ms))
            why = f"{deployment.version[:12]} is live on {deployment.engine}"
            return await self._ended(pool, collection, job, Outcome.DEPLOYED, why, now_ms, decision.gain_share)
        blamed = (await anyio.to_thread.run_sync(self._context.drafts.get, deployment.version)).quarantined
        outcome = Outcome.ROLLED_BACK if blamed else Outcome.FAILED
        return await self._ended(pool, collection, job, outcome, deployment.error, now_ms, decision.gain_share)

    async def _ended(
        self,
        pool: Pool,
        collection: Collection,
        job: Job | None,
        outcome: Outcome,
        why: str,
        now_ms: int,
        gain: float = 1.0,
    ) -> Collection:
        """A cycle is over. Its samples go when they taught us something: consumed, a bounded part kept as replay.

        `gain`: by which share the gate found the draft better; 1.0 where it was not asked.
        """
        if job is not None and outcome in (Outcome.DEPLOYED, Outcome.WORSE, Outcome.ROLLED_BACK):
            await self._stockroom.retire(pool.digest, job.spec.shards, pool.domain, pool.domains)
        failpoints.hit("dispatcher.retired")
        await self._context.announce("training-ended", pool.target.name, f"{outcome}: {why}", job=collection.job)
        after, _ = await self._apply(pool, collection, TrainingEnded(now_ms, outcome, gain, _worker_ms(job)))
        return after

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
