"""What becomes of a training job that succeeded: its draft goes into the store, before the gate, and onto a canary; or into the pool of
drafts, where the traffic that it is for has gone meanwhile.

Level-triggered, like the rest of the cycle: the draft has one version whoever adds it, the gate is a pure function of the evaluations, and
what became of the version on its canary is stored.
"""

from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from tided.machine.collection import Outcome
from tided.model import failpoints
from tided.model.deployments import Canary, CanaryState
from tided.model.drafts import Draft, DraftOrigin
from tided.model.errors import Refused
from tided.model.jobs import Job, JobResult
from tided.services import gate
from tided.services.canaries import Canaries
from tided.services.context import Context
from tided.services.pools import Pool
from tided.services.scout import Scout

_OUTCOMES = {
    CanaryState.PASSED: Outcome.DEPLOYED,
    CanaryState.FAILED: Outcome.ROLLED_BACK,
    CanaryState.WITHDRAWN: Outcome.FAILED,
}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a training cycle ended. `gain`: by which share the gate found the draft better; 1.0 where it was not asked."""

    outcome: Outcome
    why: str
    gain: float = 1.0


class Finishing:
    """Takes one job at a time to its end, a step in each cycle."""

    def __init__(self, context: Context, canaries: Canaries, scout: Scout) -> None:
        self._context = context
        self._canaries = canaries
        self._scout = scout

    async def reconcile(self, pool: Pool, job: Job, domain: int, now_ms: int) -> Ending | None:
        """One step further; None while it goes on. `domain`: of the traffic that it trained for. Raises `Unavailable`, `Superseded`."""
        result = job.result
        if result is None or result.incumbent is None or result.candidate is None:
            return Ending(Outcome.FAILED, f"job {job.id}: its result has no staged draft with two evaluations")
        canary, decision = await self._canaries.of(pool, job), None
        if canary is None:
            decision = gate.judge(result.incumbent, result.candidate, self._context.config.gate)
            try:
                draft = await self._stored(pool, job, result, now_ms)
            except Refused as exc:
                return Ending(Outcome.FAILED, str(exc), decision.gain_share)
            if draft is None:
                return None  # it is on its way to this host
            failpoints.hit("dispatcher.stored")
            if decision.verdict is not gate.Verdict.PASS:
                await self._announce_gate(pool, draft, decision)
                outcome = Outcome.WORSE if decision.verdict is gate.Verdict.FAIL else Outcome.UNDECIDED
                return Ending(outcome, decision.reason, decision.gain_share)
            first = await self._first(job)
            pooled = await self._scout.home(pool.digest, draft.version)  # a leader before us came so far
            if not pooled and (pool.hold or (pool.domain and pool.questioned and not first)):
                return None  # which draft shall serve, or whether the traffic is still the same: just being found out
            if pooled or (domain != pool.domain and not first):
                if not pooled:
                    await self._announce_gate(pool, draft, decision)
                    await self._scout.keep(pool, draft, domain, now_ms)
                    failpoints.hit("dispatcher.pooled")
                name = f"{draft.lineage}@{draft.number}"
                why = (
                    f"{name} is kept as the draft of domain {pooled or domain}: traffic is of domain {pool.domain} now"
                )
                return Ending(Outcome.POOLED, why, decision.gain_share)
            if all(member.view.info.version != job.spec.draft for member in pool.members):
                serves = pool.members[0].view.info.version[:12] or "no draft"
                why = f"{serves} is served now, the gate compared with {job.spec.draft[:12]}"
                return Ending(Outcome.UNDECIDED, why, decision.gain_share)
            await self._announce_gate(pool, draft, decision)
            canary = await self._canaries.begin(pool, job, draft, now_ms)
        canary = await self._canaries.reconcile(pool, canary, now_ms)
        outcome = _OUTCOMES.get(canary.state)
        if outcome is None:
            return None
        # Its watch takes many cycles: what the gate said is computed again at its end only.
        decision = decision or gate.judge(result.incumbent, result.candidate, self._context.config.gate)
        return Ending(outcome, _why(canary), decision.gain_share)

    async def _first(self, job: Job) -> bool:
        """Whether its draft is the first: then any is better, on any traffic."""
        parent = await self._context.find_draft(job.spec.draft)
        return parent is not None and parent.origin is DraftOrigin.INIT

    async def _stored(self, pool: Pool, job: Job, result: JobResult, now_ms: int) -> Draft | None:
        """The job's draft in the store; the same record when it is there already, None while it is on its way to this host."""
        context = self._context

        def add(staged: Path) -> Draft:
            return context.drafts.add(
                staged,
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
            staged = context.exchange.taken(result)
            if staged is None:
                return None
            draft = await anyio.to_thread.run_sync(add, staged)
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


def _why(canary: Canary) -> str:
    if canary.state is not CanaryState.PASSED:
        return canary.reason
    return (
        f"{canary.version[:12]} is live on {canary.engine}"
        if canary.engine
        else f"{canary.version[:12]}: {canary.reason}"
    )
