"""Engines that serve one target, and the draft that they share: the target's head.

The head moves when a version has proved itself on one engine (its canary) or an operator deploys one onto all. Every other engine
follows by its own deployment, watched as any other. A version that went into quarantine, wherever that happened, is nobody's head any
more: then it is the nearest version from which it descends that is good.
"""

from collections import Counter
from dataclasses import dataclass, field

from tided.model.deployments import Deployment
from tided.model.drafts import Draft
from tided.model.engines import Capability, EngineInfo
from tided.model.errors import Refused
from tided.policies.suspicion import Suspicion
from tided.services.context import Context, Target
from tided.services.deployer import RESTART, ROLLBACK, check_fit, desired_version
from tided.services.monitor import EngineView

STATE = "head"
SHARED = "shared"
"""Reason of a deployment that brings an engine onto its target's head."""
POOLED = "pool"
"""The same where the head is a draft of an earlier domain."""


@dataclass(frozen=True, slots=True)
class Member:
    """An engine that is in order, with its newest deployment, and what its acceptance gives reason to suspect. `resting`: the policy lets
    it draft nothing at the batch size that it runs."""

    view: EngineView
    deployment: Deployment | None
    suspicion: Suspicion = field(default_factory=Suspicion)
    resting: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """The engines of a target that are connected and in order, by name; never none.

    What `tided.services.scout` says of them: `hold`, why no training may begin, or ""; `domain`, the number of the present one, 0 without
    a pool of drafts, and `domains`, all that are known; `answered`, how many drifts were answered by going back to a pooled draft.
    """

    target: Target
    members: tuple[Member, ...]
    hold: str = ""
    domain: int = 0
    domains: frozenset[int] = frozenset({0})
    answered: int = 0

    @property
    def digest(self) -> str:
        return self.target.info.digest

    @property
    def suspected(self) -> tuple[str, ...]:
        """Names of the engines among them that accept less than their draft could give."""
        return tuple(member.view.engine for member in self.members if member.suspicion.suspected)

    @property
    def questioned(self) -> tuple[str, ...]:
        """Names of those whose acceptance has fallen, it is not known why."""
        return tuple(member.view.engine for member in self.members if member.suspicion.questioned)

    def wary(self, now_ms: int) -> tuple[str, ...]:
        """Names of those that may be asked about soon, or are."""
        return tuple(member.view.engine for member in self.members if member.suspicion.wary(now_ms))

    @property
    def settled(self) -> bool:
        """Whether no deployment is under way."""
        return all(member.deployment is None or member.deployment.state.final for member in self.members)

    @property
    def names(self) -> str:
        """Of its engines, as a job has them."""
        return ",".join(member.view.engine for member in self.members)

    @property
    def infos(self) -> tuple[EngineInfo, ...]:
        return tuple(member.view.info for member in self.members)

    def drafted(self, most: int) -> int:
        """For how many drafted tokens a draft is trained and scored: what its engines can draft, in 1..`most`."""
        return max(1, min(most, max(member.view.info.gamma_max for member in self.members)))

    def can(self, capability: Capability) -> bool:
        """Whether all of them can."""
        return all(capability in member.view.info.capabilities for member in self.members)


@dataclass(frozen=True, slots=True)
class Head:
    """`since_ms`: a deployment that is older than this says nothing against the head. `reason`: of the deployments that bring engines
    onto it. `baseline_length`: of a pooled draft, the acceptance length that it has to beat."""

    version: str
    since_ms: int
    reason: str = SHARED
    baseline_length: float = 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The version that an engine should serve ("" when nothing says so), why, and what keeps it from the head, or ""."""

    version: str
    reason: str = RESTART
    problem: str = ""
    baseline_length: float = 0.0


class Heads:
    """Keeps the head of each target in the leader's state."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def move(self, target: str, head: Head) -> None:
        """Raises `Superseded`, `Unavailable`."""
        context = self._context
        await context.state.put(STATE, target, head, context.leadership.require())

    async def current(self, target: str) -> Head | None:
        return await self._context.state.get(Head, STATE, target)

    async def incumbent(self, pool: Pool) -> str:
        """The version that the pool's next draft is to be better than: the head where an engine serves it, else what most serve.

        What an engine serves on trial, and is not the head, is nobody's incumbent: there it is what would be restored.
        """
        head = await self.current(pool.digest)
        draft = await self._good(head.version) if head is not None else None
        if draft is not None and any(member.view.info.version == draft.version for member in pool.members):
            return draft.version
        served = Counter(_settled_version(member) for member in pool.members)
        return min(served, key=lambda version: (-served[version], version))

    async def wanted(self, view: EngineView, deployment: Deployment | None) -> Wanted:
        """What an engine without a deployment under way should serve."""
        own = Wanted(desired_version(deployment))
        head = await self.current(view.info.target.digest)
        if head is None or Capability.SWAP not in view.info.capabilities:
            return own
        draft = await self._good(head.version)
        if draft is None or draft.version == (own.version or view.info.version):
            return own
        present = await self._context.find_draft(own.version or view.info.version)
        blamed = present is not None and bool(present.quarantined)
        behind = deployment is None or deployment.created_ms < head.since_ms
        if not blamed and not behind:
            return own
        try:
            check_fit(view.info, draft)
        except Refused as exc:
            return Wanted(own.version, problem=f"engine {view.engine} cannot share its target's draft: {exc}")
        return Wanted(draft.version, ROLLBACK if blamed else head.reason, baseline_length=head.baseline_length)

    async def _good(self, version: str) -> Draft | None:
        """The version, or the nearest one that it descends from, that is not in quarantine."""
        draft = await self._context.find_draft(version)
        while draft is not None and draft.quarantined:
            draft = await self._context.find_draft(draft.parent)
        return draft


def _settled_version(member: Member) -> str:
    """What an engine serves for good, as far as that is known."""
    deployment, version = member.deployment, member.view.info.version
    if deployment is None or deployment.state.final or deployment.version != version:
        return version
    return deployment.previous or version
