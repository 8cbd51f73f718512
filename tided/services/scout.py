"""Which pooled draft the newest traffic wants: `tided.policies.domains` with its IO, for all engines of a target.

After a drift the draft that serves and those of all known domains are judged on the newest requests, held-out and training side alike: what
is that new was never trained on. As a rule the score that told the drift from a fault (`tided.services.faults`) says all of it; where
nobody asked for one, a score job is submitted as soon as a few requests are in stock. If one draft surely accepts more than what serves
(the gate's bootstrap, at a confidence that pays for the choice among several) it becomes the target's head at once, on all engines: it has
served before, so it needs no canary. Its watch and the way back stay. Training waits for the answer, with a deadline, and goes on from it.

Acceptance may also rise when traffic comes back for which a pooled draft is better still. Then the same question is asked, and training
does not wait: nothing is lost meanwhile.

While an engine drafts nothing, nobody sees what its draft would accept. The same job says so now and then, on states that are tapped for
it: shadow acceptance. What the serving draft scores goes to the speculation policy as evidence, and a pooled draft can win there as well.

Level-triggered and safe to repeat, as the dispatcher: a job's id is stored before it is submitted; the choice is a pure function of its
result; a switch is stored before the head moves, and moves it once.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tided.machine.collection import Collection
from tided.model import failpoints
from tided.model.deployments import DeploymentState
from tided.model.drafts import Draft, DraftOrigin, Evaluation
from tided.model.engines import Capability, EngineInfo
from tided.model.errors import Conflict, Refused
from tided.model.ids import new_id
from tided.model.jobs import Candidate, Job, JobKind, JobSpec, JobState
from tided.policies.domains import DomainRules, Domains
from tided.services import gate
from tided.services.context import Context
from tided.services.deployer import fits
from tided.services.pools import POOLED, Head, Heads, Member, Pool
from tided.services.stock import Newest, Stockroom

STATE = "scouting"
SCORED_TOKENS = 2_000
"""Tokens that each draft is scored on at most: seconds of one core for a whole pool."""
MAX_ATTEMPTS = 2


class Stage(StrEnum):
    IDLE = "idle"
    SAMPLING = "sampling"  # waits for enough new requests
    SCORING = "scoring"
    SWITCHING = "switching"  # engines are on their way onto a pooled draft


class Cause(StrEnum):
    DRIFT = "drift"
    UNANSWERED = "unanswered"  # a drift that neither the pool nor a training has answered yet
    RISE = "rise"  # acceptance rose: what serves does better on this traffic, and a pooled draft may do better still
    SHADOW = "shadow"  # an engine drafts nothing


@dataclass(frozen=True, slots=True)
class Scouting:
    """`drifts`: of the target's, how many were looked at; `answered`: how many, when a pooled draft was gone back to last. `since_ms`:
    from then on samples count, or deployments are the switch's. `asked_ms`: when drafts were to be scored last; `grown`: the pool has got
    another one since. `job`: that score. `heard`: the newest score that told a drift from a fault. `serving`: the draft that the others are
    compared with, which scored `over`; `winner`: the one that is switched to; `moved`: the head is on it."""

    domains: Domains = field(default_factory=Domains)
    stage: Stage = Stage.IDLE
    cause: Cause = Cause.DRIFT
    drifts: int = 0
    answered: int = 0
    since_ms: int = 0
    deadline_ms: int = 0
    asked_ms: int = 0
    grown: bool = False
    job: str = ""
    heard: str = ""
    serving: str = ""
    over: float = 0.0
    winner: str = ""
    moved: bool = False

    @property
    def asking(self) -> bool:
        return self.stage in (Stage.SAMPLING, Stage.SCORING)

    def ended(self) -> "Scouting":
        return replace(self, stage=Stage.IDLE, job="", winner="", moved=False, deadline_ms=0)


@dataclass(frozen=True, slots=True)
class Choice:
    """The pooled draft that surely beats what serves, or None, and how each compared."""

    winner: Evaluation | None
    decisions: tuple[tuple[Evaluation, gate.GateDecision], ...]


class Scout:
    """Keeps a `Scouting` for each target in the leader's state."""

    def __init__(self, context: Context, heads: Heads) -> None:
        self._context = context
        self._heads = heads
        self._stockroom = Stockroom(context)
        self._resting: dict[str, float] = {}  # engine -> since when (the context's clock)

    def forget(self, engines: set[str]) -> None:
        for engine in engines:
            self._resting.pop(engine, None)

    async def current(self, target: str) -> Scouting:
        """Of a target, by its digest."""
        return await self._context.state.get(Scouting, STATE, target) or Scouting()

    async def reconcile(self, pool: Pool, collection: Collection, now_ms: int) -> tuple[Pool, bool]:
        """Take the target's scouting one step further: the pool with what was found out, and whether engines should tap for it.

        Raises `Unavailable`, `Superseded`.
        """
        before = await self.current(pool.digest)
        scouting = await self._begun(pool, before, collection, now_ms)
        match scouting.stage:
            case Stage.SAMPLING:
                scouting = await self._sampling(pool, scouting, now_ms)
            case Stage.SCORING:
                scouting = await self._scoring(pool, scouting, now_ms)
            case Stage.SWITCHING:
                scouting = await self._switching(pool, scouting, now_ms)
            case Stage.IDLE:
                pass
        await self._put(pool, before, scouting)
        found = replace(pool, hold=_hold(pool, scouting), answered=scouting.answered)
        if self._enabled:
            found = replace(found, domain=scouting.domains.here, domains=scouting.domains.numbers)
        return found, scouting.stage is Stage.SAMPLING

    @property
    def _enabled(self) -> bool:
        return self._context.config.pool.enabled

    async def _put(self, pool: Pool, before: Scouting, after: Scouting) -> None:
        if after != before:
            await self._context.state.put(STATE, pool.digest, after, self._context.leadership.require())

    # --- when to ask ---

    async def _begun(self, pool: Pool, scouting: Scouting, collection: Collection, now_ms: int) -> Scouting:
        """Take note of what serves, and of a question that has come up."""
        serving = await self._context.find_draft(await self._heads.incumbent(pool))
        if self._enabled and pool.settled and scouting.stage is not Stage.SWITCHING:
            scouting = await self._accounted(scouting, serving, now_ms)
        drifted = collection.drifts > scouting.drifts
        if drifted and scouting.stage is not Stage.SWITCHING:
            await self._abandon(scouting)
            domains = scouting.domains.drifted(now_ms)
            scouting = replace(scouting.ended(), drifts=collection.drifts, domains=domains)
        if not self._enabled and scouting.asking and scouting.cause is not Cause.SHADOW:
            await self._abandon(scouting)
            scouting = scouting.ended()
        if scouting.stage is not Stage.IDLE or serving is None or not self._can_tap(pool):
            return scouting
        others = scouting.domains.others(serving.version) if self._enabled else ()
        if drifted and await self._fitting(others, pool.infos):
            unheard = any(member.suspicion.unheard for member in pool.members)
            cause = Cause.UNANSWERED if unheard else Cause.DRIFT  # where nobody scores, training waits no longer
            # Samples of since the drift was noted, not since it was looked at: some may be there already.
            asking = self._asking(scouting, cause, collection.since_ms, now_ms)
            answer = await self._answer(pool, serving.version)
            return _told(asking, answer, serving.version) if answer else asking
        if collection.drifting and others:  # it may have fallen again: the traffic has moved on
            answer = await self._answer(pool, serving.version)
            if answer not in ("", scouting.heard):
                asking = self._asking(scouting, Cause.UNANSWERED, collection.since_ms, now_ms)
                return _told(asking, answer, serving.version)
        since_asked_ms, every_ms = now_ms - scouting.asked_ms, self._shadow_every_ms(pool)
        if every_ms and since_asked_ms >= every_ms:
            return self._asking(scouting, Cause.SHADOW, now_ms, now_ms)
        rises = any(member.view.rises for member in pool.members)
        moved = Cause.UNANSWERED if collection.drifting else Cause.RISE if rises else None
        due = scouting.grown or since_asked_ms >= self._context.config.pool.retry_s * 1000
        if moved and due and await self._fitting(others, pool.infos):
            # A draft that was not among those scored is held against what is there of this traffic.
            stored = scouting.grown and moved is Cause.UNANSWERED
            return self._asking(scouting, moved, collection.since_ms if stored else now_ms, now_ms)
        return scouting

    def _asking(self, scouting: Scouting, cause: Cause, since_ms: int, now_ms: int) -> Scouting:
        deadline_ms = now_ms + round(self._context.config.pool.deadline_s * 1000)
        return replace(
            scouting,
            stage=Stage.SAMPLING,
            cause=cause,
            since_ms=since_ms,
            deadline_ms=deadline_ms,
            asked_ms=now_ms,
            grown=False,
        )

    async def _answer(self, pool: Pool, serving: str) -> str:
        """The score that has said why acceptance fell, if it has pooled drafts beside the serving one, on enough to choose by; or ""."""
        for member in pool.members:
            found = member.suspicion
            if found.answered_by and found.version == serving:  # the trend may be level again by now
                job = await self._context.jobs.get(found.answered_by)
                if job is not None and job.state is JobState.SUCCEEDED and job.spec.candidates and self._suffices(job):
                    return job.id
        return ""

    def _suffices(self, job: Job) -> bool:
        """A fall may be explained by fewer requests than a choice of drafts takes."""
        score = job.result.candidate if job.result is not None else None
        return score is not None and gate.enough(len(score.groups), sum(score.tokens), self._gate())

    def _shadow_every_ms(self, pool: Pool) -> int:
        """How often to ask because an engine drafts nothing; 0 while none has done so for that long."""
        now_s, every_s = self._context.clock(), self._context.config.speculation.shadow_every_s
        for member in pool.members:
            engine = member.view.engine
            if not member.resting:
                self._resting.pop(engine, None)
            elif member.view.running:
                self._resting.setdefault(engine, now_s)
        since_s = [self._resting[member.view.engine] for member in pool.members if member.view.engine in self._resting]
        return round(every_s * 1000) if since_s and now_s - min(since_s) >= every_s else 0

    @staticmethod
    def _can_tap(pool: Pool) -> bool:
        return any(Capability.TAP in member.view.info.capabilities for member in pool.members)

    async def _accounted(self, scouting: Scouting, serving: Draft | None, now_ms: int) -> Scouting:
        """The domains, with what serves for good now and without what must not serve any more. Version 0 is nobody's draft."""
        domains = scouting.domains
        if serving is None or serving.version == domains.served:
            return scouting
        blamed = [version for version in domains.others(serving.version) if not await self._good(version)]
        if serving.origin is DraftOrigin.INIT:
            domains = replace(domains, served=serving.version)
        else:
            length = serving.evaluation.length if serving.evaluation is not None else 0.0
            domains = domains.deployed(serving.version, length, now_ms, self._rules())
        return replace(scouting, domains=domains.without(frozenset(blamed)))

    # --- asking ---

    async def _sampling(self, pool: Pool, scouting: Scouting, now_ms: int) -> Scouting:
        settings = self._context.config.pool
        if now_ms >= scouting.deadline_ms:
            return scouting.ended()
        newest = await self._stockroom.newest(
            pool.digest, scouting.since_ms, settings.min_rows, settings.min_requests, SCORED_TOKENS
        )
        if newest is None or pool.suspected or not pool.settled:
            return scouting  # what is deployed meanwhile may not stay
        serving = await self._heads.incumbent(pool)
        scoring = replace(scouting, stage=Stage.SCORING, job=new_id("job"), serving=serving)
        # The id first: a leader that goes on from here submits this very job.
        await self._put(pool, scouting, scoring)
        failpoints.hit("scout.submitting")
        await self._submit(pool, scoring, newest)
        failpoints.hit("scout.submitted")
        return scoring

    async def _submit(self, pool: Pool, scouting: Scouting, newest: Newest) -> None:
        context, target = self._context, pool.target
        others = scouting.domains.others(scouting.serving) if self._enabled else ()
        # A prompt is scored whole: enough tokens that there are enough of them.
        tokens = max(SCORED_TOKENS, round(2 * context.config.pool.min_requests * newest.tokens_per_request))
        spec = JobSpec(
            kind=JobKind.SCORE,
            engine=pool.names,
            target=target.info.digest,
            target_dir=str(target.path.absolute()),
            lineage=target.name,
            draft=scouting.serving,
            draft_dir=str(context.drafts.path(scouting.serving)),
            held_out=newest.shards,
            gamma=pool.drafted(context.config.speculation.gamma_max),
            candidates=await self._fitting(others, pool.infos),
            options={"held_out_tokens": tokens},
            priority=self._context.priority_of(target.info.digest),
        )
        await context.submit(spec, MAX_ATTEMPTS, scouting.job)

    async def _scoring(self, pool: Pool, scouting: Scouting, now_ms: int) -> Scouting:
        job = await self._context.jobs.get(scouting.job)
        if job is None:  # the leader before us stored its id and died
            return replace(scouting, stage=Stage.SAMPLING, job="")
        if job.state is JobState.SUCCEEDED:
            return await self._scored(pool, scouting, job, now_ms)
        if job.state.final or now_ms >= scouting.deadline_ms:
            await self._abandon(scouting)
            return scouting.ended()
        return scouting

    async def _abandon(self, scouting: Scouting) -> None:
        """Nobody waits for the score that is under way any more."""
        if scouting.job:
            with suppress(Conflict, Refused):  # it has ended, or never came to be
                await self._context.jobs.cancel(scouting.job, self._context.leadership.require())

    # --- the answer ---

    async def _scored(self, pool: Pool, scouting: Scouting, job: Job, now_ms: int) -> Scouting:
        if not pool.settled and now_ms < scouting.deadline_ms:
            return scouting
        result, serving = job.result, await self._heads.incumbent(pool)
        if result is None or result.candidate is None or serving != job.spec.draft or pool.suspected:
            return scouting.ended()
        for member in pool.members:
            if member.resting and member.view.version == serving:
                member.view.hear(result.candidate)
        # What has left the pool since the job was submitted is not gone back to.
        pooled = scouting.domains.others(serving)
        scores = [score for score in result.scores if score.version in pooled]
        choice = choose(result.candidate, scores, self._gate())
        lengths = {score.version: score.length for score in (result.candidate, *scores) if score.tokens}
        if serving not in lengths:
            return scouting.ended()  # nothing was scored
        best = choice.winner.version if choice.winner is not None else serving
        domains = replace(scouting.domains, served=serving).scored(lengths, best, now_ms, self._rules())
        await self._announce(pool, scouting, choice, result.candidate, domains)
        if choice.winner is None:
            return replace(scouting.ended(), domains=domains)
        deployment = self._context.config.deployment
        wait_s = self._context.config.pool.deadline_s + deployment.swap_deadline_s + deployment.watch_s
        switching = replace(
            scouting,
            domains=domains,
            stage=Stage.SWITCHING,
            job="",
            over=max(1.0, result.candidate.length),
            winner=best,
            since_ms=now_ms,
            deadline_ms=now_ms + round(wait_s * 1000),
        )
        await self._put(pool, scouting, switching)
        failpoints.hit("scout.switching")
        return await self._switching(pool, switching, now_ms)

    async def _switching(self, pool: Pool, scouting: Scouting, now_ms: int) -> Scouting:
        """Move the head; engines follow it. If it fails on one, or on none succeeds, all go back."""
        if not scouting.moved:
            await self._heads.move(pool.digest, Head(scouting.winner, scouting.since_ms, POOLED, scouting.over))
            failpoints.hit("scout.moved")
            return replace(scouting, moved=True)
        head = await self._heads.current(pool.digest)
        if head is None or head.version != scouting.winner:
            return scouting.ended()  # an operator wants another one
        serves = any(member.view.info.version == scouting.winner for member in pool.members)
        late = now_ms >= scouting.deadline_ms
        failed = next((member for member in pool.members if _failed(member, scouting)), None)
        if failed is not None or (late and not serves):
            await self._heads.move(pool.digest, Head(scouting.serving, now_ms))
            why = (
                failed.deployment.error if failed is not None and failed.deployment is not None else "no engine took it"
            )
            message = f"{await self._name(scouting.winner)} is not kept: {why}"
            await self._context.announce("pool-switch-undone", pool.target.name, message, version=scouting.winner)
            return replace(scouting.ended(), domains=scouting.domains.unknown(scouting.serving))
        if serves:
            scouting = replace(scouting, answered=scouting.drifts)
        return scouting.ended() if (serves and pool.settled) or late else scouting

    async def _announce(
        self, pool: Pool, scouting: Scouting, choice: Choice, serving: Evaluation, domains: Domains
    ) -> None:
        scores = [f"{await self._name(serving.version)} {serving.length:.2f} (serves)"]
        scores += [f"{await self._name(score.version)} {score.length:.2f}" for score, _ in choice.decisions]
        known = f"domain {domains.current}" if domains.current else "no domain that is known"
        requests = len(serving.groups)
        message = f"acceptance length on {requests} requests: {', '.join(scores)}; {known}"
        lengths = {score.version: round(score.length, 4) for score in (serving, *(s for s, _ in choice.decisions))}
        await self._context.announce(
            "pool-scored",
            pool.target.name,
            message,
            cause=scouting.cause.value,
            domain=domains.current,
            lengths=lengths,
        )
        for score, decision in choice.decisions:
            if choice.winner is score:
                message = f"{await self._name(serving.version)} -> {await self._name(score.version)}: {decision.reason}"
                await self._context.announce(
                    "pool-switched",
                    pool.target.name,
                    message,
                    version=score.version,
                    previous=serving.version,
                    gain=round(decision.gain, 4),
                    lower=round(decision.lower, 4),
                )

    # --- drafts ---

    async def home(self, target: str, version: str) -> int:
        """The number of the domain whose draft this is, of a target by its digest; 0 if it is of none."""
        found = (await self.current(target)).domains.of(version)
        return found.number if found is not None else 0

    async def keep(self, pool: Pool, draft: Draft, domain: int, now_ms: int) -> None:
        """A trained draft is that of a domain that is not the present one. What is being asked is asked again, with this draft, and an
        unanswered drift at once. Safe to repeat."""
        before = await self.current(pool.digest)
        length = draft.evaluation.length if draft.evaluation is not None else 0.0
        domains = before.domains.kept(draft.version, domain, length, now_ms, self._rules())
        after = replace(before, domains=domains, grown=True)
        if after.asking:
            await self._abandon(after)
            after = after.ended()
        await self._put(pool, before, after)

    async def rivals(self, target: str, serving: str, engines: Sequence[EngineInfo]) -> tuple[Candidate, ...]:
        """The pooled drafts of a target, by digest, that all these engines could serve instead of `serving`."""
        domains = (await self.current(target)).domains
        return await self._fitting(domains.others(serving) if self._enabled else (), engines)

    async def _fitting(self, versions: Sequence[str], engines: Sequence[EngineInfo]) -> tuple[Candidate, ...]:
        path = self._context.drafts.path
        return tuple(
            [Candidate(version, str(path(version))) for version in versions if await self._fits(version, engines)]
        )

    async def _fits(self, version: str, engines: Sequence[EngineInfo]) -> bool:
        """Whether every engine could take it."""
        draft = await self._context.find_draft(version)
        return draft is not None and not draft.quarantined and all(fits(info, draft) for info in engines)

    async def _good(self, version: str) -> bool:
        draft = await self._context.find_draft(version)
        return draft is not None and not draft.quarantined

    async def _name(self, version: str) -> str:
        draft = await self._context.find_draft(version)
        return f"{draft.lineage}@{draft.number}" if draft is not None else version[:12]

    def _rules(self) -> DomainRules:
        settings = self._context.config.pool
        return DomainRules(settings.size, settings.same, settings.alike)

    def _gate(self) -> gate.GateConfig:
        config = self._context.config
        return config.gate.model_copy(
            update={"min_requests": config.pool.min_requests, "min_tokens": config.pool.min_rows}
        )


def choose(serving: Evaluation, scores: Sequence[Evaluation], config: gate.GateConfig) -> Choice:
    """The longest of the pooled drafts that surely accept more than the serving one; to choose among n takes n times the certainty."""
    strict = config.model_copy(update={"confidence": 1.0 - (1.0 - config.confidence) / max(1, len(scores))})
    decisions = tuple((score, gate.judge(serving, score, strict)) for score in scores)
    better = [(score, decision) for score, decision in decisions if decision.verdict is gate.Verdict.PASS]
    winner = max(better, key=lambda pair: pair[1].gain, default=None)
    return Choice(winner[0] if winner is not None else None, decisions)


def _told(asking: Scouting, answer: str, serving: str) -> Scouting:
    """The question, with a score that has been made already."""
    return replace(asking, stage=Stage.SCORING, job=answer, heard=answer, serving=serving)


def _hold(pool: Pool, scouting: Scouting) -> str:
    """Why no training may begin, or ""."""
    if scouting.stage is Stage.SWITCHING:
        serves = any(member.view.info.version == scouting.winner for member in pool.members)
        return "" if serves else "a pooled draft is being switched to"
    if scouting.asking and scouting.cause is Cause.DRIFT:
        return "drafts of earlier domains are scored on the newest requests"
    return ""


def _failed(member: Member, scouting: Scouting) -> bool:
    deployment = member.deployment
    if deployment is None or deployment.version != scouting.winner or deployment.created_ms < scouting.since_ms:
        return False
    return deployment.state in (DeploymentState.ROLLED_BACK, DeploymentState.FAILED)
