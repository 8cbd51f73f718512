"""The engine that gets a draft before the others: `tided.machine.canary` with its IO, for the target whose training gave the draft.

A draft that passed the gate goes onto the one engine that finishes most requests, among those that are in order and serve what the gate
compared with. While its deployment is watched the others keep the incumbent. Live there, it becomes the target's head, which the others
follow. In quarantine, it is nobody's. What needs no canary does not come here: a pooled draft has served before
(`tided.services.scout`), and an operator knows.

Level-triggered: the canary is stored before an engine is chosen, and a deployment of its version that is found under way is taken for
its own, so a leader that died between the two places it once. The head moves before the canary is stored as passed, to the same place
each time.
"""

from collections.abc import Sequence

import anyio.to_thread

from tided.machine import canary as machine
from tided.machine.canary import (
    Announce,
    CanaryAbsent,
    CanaryEvent,
    CanaryRules,
    DeploymentSeen,
    HeadMoved,
    NowhereToGo,
    Placed,
    Promote,
    TimePassed,
    VersionBlamed,
)
from tided.model import failpoints
from tided.model.deployments import Canary, CanaryState, Deployment, DeploymentState
from tided.model.drafts import Draft, DraftOrigin
from tided.model.errors import Conflict, Refused
from tided.model.jobs import Job
from tided.services.context import Context
from tided.services.deployer import Deployer, fits
from tided.services.monitor import Monitor
from tided.services.pools import Head, Heads, Member, Pool

STATE = "canary"
GATE = "gate"
"""Reason of a canary's deployment."""


class Canaries:
    """Keeps the newest canary of each target in the leader's state."""

    def __init__(self, context: Context, monitor: Monitor, deployer: Deployer, heads: Heads) -> None:
        self._context = context
        self._monitor = monitor
        self._deployer = deployer
        self._heads = heads

    async def current(self, target: str) -> Canary | None:
        """The newest canary of a target, by its digest; final or not."""
        return await self._context.state.get(Canary, STATE, target)

    async def of(self, pool: Pool, job: Job) -> Canary | None:
        """That of a job's draft."""
        canary = await self.current(pool.digest)
        return canary if canary is not None and canary.job == job.id else None

    async def begin(self, pool: Pool, job: Job, draft: Draft, now_ms: int) -> Canary:
        """Note that the job's draft is to prove itself; `reconcile` chooses the engine."""
        canary = Canary(
            target=pool.target.name,
            version=draft.version,
            incumbent=job.spec.draft,
            job=job.id,
            state=CanaryState.CHOOSING,
            started_ms=now_ms,
            updated_ms=now_ms,
            deadline_ms=now_ms + self._rules().choose_ms,
        )
        await self._context.state.put(STATE, pool.digest, canary, self._context.leadership.require())
        failpoints.hit("canary.begun")
        return canary

    async def reconcile(self, pool: Pool, canary: Canary, now_ms: int) -> Canary:
        """Take a canary one step further. Raises `Unavailable`, `Superseded`."""
        if canary.state.final:
            return canary
        head = await self._heads.current(pool.digest)
        if head is not None and head.version == canary.version and head.since_ms >= canary.started_ms:
            return await self._apply(pool, canary, HeadMoved(now_ms))
        event = await (self._choice if canary.state is CanaryState.CHOOSING else self._watched)(pool, canary, now_ms)
        canary = await self._apply(pool, canary, event) if event is not None else canary
        return await self._apply(pool, canary, TimePassed(now_ms))

    async def tidy(self, pool: Pool) -> None:
        """Take back what is still on its way onto engines on which the canary is not any more: one that was given up came back."""
        canary = await self.current(pool.digest)
        if canary is None or canary.state is CanaryState.PASSED:
            return
        for member in pool.members:
            deployment = member.deployment
            if deployment is not None and _stray(deployment, canary):
                async with self._deployer.lock(member.view.engine):
                    newest = await self._deployer.current(member.view.engine)
                    if newest is not None and _stray(newest, canary):
                        why = "another engine is its canary, or none any more"
                        await self._deployer.take_back(newest, why, quarantine=False)

    # --- what there is to tell the machine ---

    async def _choice(self, pool: Pool, canary: Canary, now_ms: int) -> CanaryEvent | None:
        """Put it onto the engine where the watch says most, and soonest."""
        draft = await anyio.to_thread.run_sync(self._context.drafts.get, canary.version)
        if draft.quarantined:
            return VersionBlamed(now_ms, f"it is in quarantine: {draft.quarantined}")
        for member in pool.members:
            deployment = member.deployment
            if deployment is not None and _its_own(deployment, canary) and not deployment.state.final:
                alone = not self._followers(pool, member, draft)
                return Placed(now_ms, member.view.engine, deployment.id, alone)
        fit = [member for member in pool.members if member.view.info.version == canary.incumbent]
        fit = [member for member in fit if member.view.engine not in canary.tried]
        refused = f"no engine that is in order serves {canary.incumbent[:12]}, which the gate compared with"
        trial_pays = await self._trained(canary.incumbent)
        waiting = False
        for member in self._busiest(fit):
            others = self._followers(pool, member, draft)
            try:
                async with self._deployer.lock(member.view.engine):
                    begun = await self._deployer.begin(member.view, draft, GATE, trial=others and trial_pays)
            except Conflict:
                waiting = True  # an operator's deployment is under way: it ends in a cycle to come
            except Refused as exc:
                refused = str(exc)
            else:
                failpoints.hit("canary.placed")
                return Placed(now_ms, member.view.engine, begun.id, not others)
        return None if waiting else NowhereToGo(now_ms, refused)

    async def _watched(self, pool: Pool, canary: Canary, now_ms: int) -> CanaryEvent | None:
        member = next((member for member in pool.members if member.view.engine == canary.engine), None)
        if member is None:
            return CanaryAbsent(now_ms, gone=canary.engine not in self._monitor.views)
        deployment = await self._deployer.current(canary.engine)
        if deployment is None or deployment.id != canary.deployment:
            return CanaryAbsent(now_ms, gone=True)  # nobody knows what became of it
        draft = await self._context.find_draft(canary.version)
        blamed = draft is not None and bool(draft.quarantined)
        return DeploymentSeen(now_ms, deployment.state, blamed, deployment.withdrawn, deployment.error)

    def _busiest(self, members: Sequence[Member]) -> list[Member]:
        """By requests finished of late, then by tokens a second, then by name."""
        now_s = self._context.clock()

        def rank(member: Member) -> tuple[float, float, str]:
            view = member.view
            return -view.finished(now_s), -(view.tokens_per_s(now_s) or 0.0), view.engine

        return sorted(members, key=rank)

    def _followers(self, pool: Pool, canary: Member, draft: Draft) -> bool:
        """Whether any other engine could follow."""
        return any(member is not canary and fits(member.view.info, draft) for member in pool.members)

    async def _trained(self, version: str) -> bool:
        """Whether a longer watch can show anything: what version 0 accepts is next to nothing, and nothing accepts less."""
        draft = await self._context.find_draft(version)
        return draft is not None and draft.origin is not DraftOrigin.INIT

    # --- the machine ---

    async def _apply(self, pool: Pool, canary: Canary, event: CanaryEvent) -> Canary:
        """One step of the machine: its actions first (all are safe to repeat), then its state, fenced."""
        context = self._context
        after, actions = machine.step(canary, event, self._rules())
        for action in actions:
            match action:
                case Promote(version):
                    deployment = await self._deployer.current(canary.engine)
                    since_ms = deployment.created_ms if deployment is not None else canary.started_ms
                    await self._heads.move(pool.digest, Head(version, since_ms))
                    failpoints.hit("canary.promoted")
                case Announce(kind, message):
                    where = after.engine or canary.engine
                    await context.announce(kind, canary.target, message, version=canary.version, engine=where)
        if after != canary:
            await context.state.put(STATE, pool.digest, after, context.leadership.require())
            failpoints.hit(f"canary.{after.state}")
        return after

    def _rules(self) -> CanaryRules:
        rules = self._deployer.rules()
        # A deployment of somebody else's that is in the way swaps, is watched, and may have to be restored.
        return CanaryRules(
            choose_ms=2 * rules.swap_deadline_ms + rules.watch_ms, absent_ms=max(rules.watch_ms, rules.canary_ms)
        )


def _its_own(deployment: Deployment, canary: Canary) -> bool:
    return (
        deployment.reason == GATE
        and deployment.version == canary.version
        and deployment.created_ms >= canary.started_ms
        and deployment.engine not in canary.tried
    )


def _stray(deployment: Deployment, canary: Canary) -> bool:
    """Whether it goes on though the canary is not, or not there: one that is being restored is over already."""
    over = deployment.state.final or deployment.state is DeploymentState.RESTORING
    expected = not canary.state.final and _its_own(deployment, canary)
    return deployment.reason == GATE and not over and not expected
