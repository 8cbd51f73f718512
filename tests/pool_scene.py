"""Several engines and targets under one tided, on a real Valkey, for tests (`tests.pool_fixtures`)."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.conftest import Valkey
from tests.control import Control, store_samples, variant
from tests.engine_double import EngineDouble, describe_double, running_double
from tests.support import eventually
from tests.test_services_controller import evaluation
from tided.draft import checkpoint
from tided.model.deployments import Deployment, DeploymentState
from tided.model.jobs import JobKind, JobResult
from tided.model.status import EngineStatus
from tided.store.jobs import Claim


@dataclass(frozen=True)
class Models:
    """Two targets and version 0 of each."""

    first: Path
    second: Path
    drafts: dict[Path, Path]


@dataclass
class Scene:
    control: Control
    models: Models
    valkey: Valkey
    root: Path
    stack: AsyncExitStack
    engines: dict[str, EngineDouble] = field(default_factory=dict[str, EngineDouble])

    async def connect(self, name: str, target: Path, draft: Path | None = None, **changes: object) -> EngineDouble:
        info = replace(describe_double(target, draft or self.models.drafts[target], name), **changes)  # pyright: ignore[reportArgumentType]
        engine = self.engines[name] = await self.stack.enter_async_context(running_double(self.valkey, info))

        async def seen() -> bool:
            return name in {info.engine for info in await self.control.context.engines.list()}

        await eventually(seen)
        return engine

    def samples(self, engine: str, target: Path, created_ms: int, train: int = 20, held_out: int = 10) -> None:
        store_samples(self.control.context.config, target, engine, train, held_out, created_ms)

    async def claimed(self) -> Claim:
        async def claim() -> Claim | None:
            await self.control.cycle()
            return await self.control.context.jobs.claim("w", [JobKind.TRAIN])

        return await eventually(claim)

    async def finish(self, claim: Claim, *, gain: float = 0.5, seed: int = 1) -> str:
        """A draft that is better by `gain`; its version."""
        spec = claim.job.spec
        first = next(draft for target, draft in self.models.drafts.items() if str(target) == spec.target_dir)
        staged = variant(first, self.root / f"staged-{seed}", seed)
        version = checkpoint.version_of(staged)
        old, new = evaluation(spec.draft, 1.5, 8), evaluation(version, 1.5 + gain, 8)
        await self.control.context.jobs.finish(claim, JobResult(str(staged), version, old, new, 1000, 1.0))
        return version

    async def serves(self, engine: str, version: str) -> None:
        async def served() -> bool:
            await self.control.cycle()
            return self.engines[engine].info.version == version

        await eventually(served)

    async def deployment(self, engine: str) -> Deployment | None:
        return await self.control.controller.deployer.current(engine)

    async def reaches(self, engine: str, state: DeploymentState) -> None:
        async def reached() -> bool:
            await self.control.cycle()
            found = await self.deployment(engine)
            return found is not None and found.state is state

        await eventually(reached)

    async def watched(self, engine: str, alpha: float = 0.6) -> None:
        """Once it is watched, traffic that ends the watch."""
        await self.reaches(engine, DeploymentState.WATCHING)
        await self.engines[engine].report(alpha=alpha, requests=6)

    async def status(self, engine: str) -> EngineStatus:
        found = {status.info.engine: status for status in await self.control.plane.engines()}
        return found[engine]

    async def trained(self) -> str:
        """A better draft for the engines a and b: live on its canary, then on the other. Its version."""
        await self.control.converge()
        self.samples("a", self.models.first, 1_000)
        version = await self.finish(await self.claimed())
        canary = await self.canary(version)
        for engine in sorted(self.engines, key=lambda engine: engine != canary):
            await self.serves(engine, version)
            await self.watched(engine)
            await self.reaches(engine, DeploymentState.LIVE)
        await self.control.converge()
        return version

    async def canary(self, version: str) -> str:
        async def first() -> str:
            await self.control.cycle()
            return next((name for name, engine in self.engines.items() if engine.info.version == version), "")

        return await eventually(first)
