"""Training from samples to a judged draft, for all engines of a target: `tided.machine.collection` with its IO.

One decision and one job at a time for a target, from what all its engines stored. A draft that passes the gate goes onto one engine
first, its canary (`tided.services.canaries`); from there the others follow (`tided.services.pools`), or none does.

Level-triggered and safe to repeat at every point. A job's id is stored before the job is submitted, so that a leader which died in
between submits the same job and not a second one; a finished job's draft has one version whoever adds it; the gate is a pure
function of the evaluations; what became of the version on its canary is stored before the cycle ends.
"""

import anyio.to_thread

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
from tided.model.engines import Capability
from tided.model.errors import Conflict, Refused
from tided.model.ids import new_id
from tided.model.jobs import Job, JobKind, JobSpec, JobState, Needs
from tided.services.canaries import Canaries
from tided.services.context import Context
from tided.services.finishing import Ending, Finishing
from tided.services.pools import Heads, Member, Pool
from tided.services.scout import Scout
from tided.services.stock import Stock, Stockroom
from tided.services.training_view import TrainingView, ripe_rows, rules_of, view_of

STATE = "collection"
TAUGHT = (Outcome.DEPLOYED, Outcome.POOLED, Outcome.WORSE, Outcome.ROLLED_BACK)
"""A cycle that ends so has used its samples up."""


class Dispatcher:
    """Runs Algorithm 1 for each target and turns its jobs into drafts."""

    def __init__(self, context: Context, heads: Heads, canaries: Canaries, scout: Scout) -> None:
        self._context = context
        self._heads = heads
        self._canaries = canaries
        self._finishing = Finishing(context, canaries, scout)
        self._stockroom = Stockroom(context)

    async def reap(self) -> list[Job]:
        """Take back the jobs whose worker stopped renewing, and tell of those that failed. Raises `Unavailable`, `Superseded`."""
        context = self._context
        reaped = await context.jobs.reap(context.leadership.require())
        for job in reaped:
            kind = {JobState.FAILED: "job-failed", JobState.QUEUED: "job-requeued"}.get(job.state)
            if kind is not None:  # that one was cancelled is in the audit
                await context.announce(kind, job.id, job.error)
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
        await self._canaries.tidy(pool)
        collection = await self.current(target)
        incumbent = await self._heads.incumbent(pool)
        collection, _ = await self._apply(pool, collection, DriftAnswered(now_ms, pool.answered))
        low = _low(pool, collection, incumbent)
        drifts = collection.drifts
        collection, _ = await self._apply(pool, collection, TrendJudged(now_ms, low, _since_ms(pool, low)))
        stock = await self._stockroom.stock(target, collection.since_ms, pool.domain)
        settings = self._context.training_for(target)
        if collection.drifts == drifts:  # the scout looks at a drift first
            if settings.enabled:
                rows = ripe_rows(stock, settings, pool, now_ms)
                collection, _ = await self._apply(pool, collection, RowsStored(now_ms, rows))
            if collection.phase is Phase.TRAINING:
                collection = await self._training(pool, collection, stock, now_ms)
        return view_of(collection, stock, settings, now_ms, pool)

    async def request(self, pool: Pool, event: CollectionEvent) -> Job:
        """An operator asks for a training. Raises `Conflict` when one is under way, `Refused` when there is nothing to train on."""
        collection = await self.current(pool.digest)
        stock = await self._stockroom.stock(pool.digest, collection.since_ms, pool.domain)
        counted, _ = await self._apply(pool, collection, RowsStored(event.now_ms, stock.fresh_rows))
        if counted.phase is Phase.TRAINING and collection.phase is not Phase.TRAINING:
            return await self._submitted(pool, counted, stock)  # it was about to begin by itself
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
                    after, _ = machine.step(after, JobSubmitted(event.now_ms, new_id("job"), pool.domain))
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
                return await self._ended(pool, collection, None, Ending(Outcome.FAILED, str(exc)), now_ms)
            return collection
        match job.state:
            case JobState.QUEUED | JobState.RUNNING:
                ending = None
            case JobState.FAILED | JobState.CANCELLED:
                ending = Ending(Outcome.FAILED, job.error or f"job {job.id} was {job.state}")
            case JobState.SUCCEEDED:
                ending = await self._finishing.reconcile(pool, job, _home(pool, collection), now_ms)
        return collection if ending is None else await self._ended(pool, collection, job, ending, now_ms)

    async def _submitted(self, pool: Pool, collection: Collection, stock: Stock) -> Job:
        context, target = self._context, pool.target
        incumbent = await anyio.to_thread.run_sync(context.drafts.get, await self._heads.incumbent(pool))
        settings = context.training_for(pool.digest)
        batch = {"batch_tokens": settings.batch_tokens} if settings.batch_tokens else {}
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
            options={"adapt_vocabulary": pool.can(Capability.SWAP_VOCABULARY)} | batch,
            priority=context.priority_of(pool.digest),
            needs=Needs(settings.device, settings.devices, settings.memory_bytes),
        )
        failpoints.hit("dispatcher.submitting")
        job = await context.submit(spec, settings.max_attempts, collection.job)
        failpoints.hit("dispatcher.submitted")
        return job

    async def _ended(
        self, pool: Pool, collection: Collection, job: Job | None, ending: Ending, now_ms: int
    ) -> Collection:
        """A cycle is over. Its samples go when they taught us something: consumed, a bounded part kept as replay."""
        if job is not None and ending.outcome in TAUGHT:
            # What was deployed all the same is the present domain's draft.
            domain = pool.domain if ending.outcome is Outcome.DEPLOYED else _home(pool, collection)
            await self._stockroom.retire(pool.digest, job.spec.shards, domain, pool.domains)
        failpoints.hit("dispatcher.retired")
        message = f"{ending.outcome}: {ending.why}"
        await self._context.announce("training-ended", pool.target.name, message, job=collection.job)
        event = TrainingEnded(now_ms, ending.outcome, ending.gain, _worker_ms(job))
        after, _ = await self._apply(pool, collection, event)
        return after


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


def _home(pool: Pool, collection: Collection) -> int:
    """The domain whose traffic the training under way is for: the present one, unless the traffic is another by now. Where the question was
    open as it began and no drift came since, a later answer to that question is about the same traffic."""
    known = collection.domain in pool.domains
    another = pool.domain and collection.domain and (collection.moved or known)
    return collection.domain if another else pool.domain


def _since_ms(pool: Pool, low: tuple[str, ...]) -> int:
    """When the first of these began to fall, 0 if that is not known: what was captured meanwhile is of the new traffic."""
    return min((m.suspicion.onset_ms for m in pool.members if m.view.engine in low and m.suspicion.onset_ms), default=0)


def _worker_ms(job: Job | None) -> int:
    """What its newest attempt took."""
    return max(job.finished_ms - job.started_ms, 0) if job is not None and job.started_ms else 0
