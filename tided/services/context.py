"""What the services of one tided share: the stores, the configuration in force, and whether this tided leads."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread
import structlog
from redis.asyncio import Redis

from tided.config import Config, TargetConfig, TrainingConfig
from tided.draft.target import describe
from tided.model.drafts import Draft
from tided.model.engines import TargetInfo
from tided.model.errors import Refused, TideError
from tided.model.events import Event
from tided.model.jobs import Job, JobSpec
from tided.services.courier import Courier
from tided.services.exchange import Exchange
from tided.services.leadership import Leadership
from tided.store.client import redis_time_ms
from tided.store.drafts import DraftStore
from tided.store.engines import EngineStore
from tided.store.events import EventStore
from tided.store.jobs import JobStore
from tided.store.samples import SampleStore
from tided.store.state import StateStore
from tided.store.workers import WorkerStore

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Target:
    """A configured target that could be read. `name` is that of its drafts' lineage."""

    name: str
    path: Path
    info: TargetInfo


@dataclass(slots=True)
class Context:
    """`config` is replaced whole on reload. `targets` are by digest; `target_problems`, by name: why one cannot be read."""

    config: Config
    redis: Redis
    leadership: Leadership
    engines: EngineStore
    jobs: JobStore
    workers: WorkerStore
    events: EventStore
    state: StateStore
    samples: SampleStore
    drafts: DraftStore
    exchange: Exchange
    courier: Courier
    targets: dict[str, Target] = field(default_factory=dict[str, Target])
    target_problems: dict[str, str] = field(default_factory=dict[str, str])
    clock: Callable[[], float] = time.monotonic
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, config: Config, redis: Redis, leadership: Leadership) -> "Context":
        """Stores over one Redis client and the configured directories. Raises `Unavailable` when a directory cannot be made,
        `ConfigError` for a storage that cannot be opened."""
        samples = config.samples
        jobs = JobStore(redis, config.jobs.lease_s, config.jobs.keep_s)
        drafts = DraftStore(config.drafts_dir)
        return cls(
            config=config,
            redis=redis,
            leadership=leadership,
            engines=EngineStore(redis),
            jobs=jobs,
            workers=WorkerStore(redis),
            events=EventStore(redis),
            state=StateStore(redis),
            samples=SampleStore(config.samples_dir, samples.held_out_fraction, samples.max_bytes, samples.max_age_s),
            drafts=drafts,
            exchange=Exchange(config, jobs, drafts, leadership),
            courier=Courier(config.redis_url, drafts, leadership),
        )

    async def read_targets(self) -> None:
        """Identify the configured targets that are not known yet. What is wrong with one is kept, not raised: engines serve on."""
        known = {target.name for target in self.targets.values()}
        for configured in self.config.target:
            if configured.lineage not in known:
                await self._read_target(configured)

    async def _read_target(self, configured: TargetConfig) -> None:
        name = configured.lineage
        try:
            info = await anyio.to_thread.run_sync(describe, configured.path)
            twin = self.targets.get(info.digest)
            if twin is not None:
                raise Refused(f"{configured.path} is the same model as target {twin.name}: leave one of them out")
        except TideError as exc:
            if name not in self.target_problems:
                _log.warning("target-unreadable", target=name, why=str(exc))
            self.target_problems[name] = f"target.path of {name}: {exc}"
            return
        self.targets[info.digest] = Target(name, configured.path, info)
        self.target_problems.pop(name, None)

    def target_of(self, info: TargetInfo) -> Target:
        """The configured target that an engine says it serves.

        Raises `Refused` when none is that: it may be one that cannot be read.
        """
        if info.digest in self.targets:
            return self.targets[info.digest]
        if self.target_problems:
            raise Refused("; ".join(self.target_problems.values()))
        known = ", ".join(f"{target.name} ({digest[:12]})" for digest, target in self.targets.items())
        raise Refused(
            f"target {info.name} ({info.digest[:12]}) is none of the configured: {known or 'none is read yet'}"
        )

    async def find_draft(self, version: str) -> Draft | None:
        """The stored draft of a version; None for "" and for one that is not in the store."""
        if not version:
            return None
        try:
            return await anyio.to_thread.run_sync(self.drafts.get, version)
        except Refused:
            return None

    def training_for(self, target: str) -> TrainingConfig:
        """[training] as it holds for a target, by digest."""
        configured = self._configured(target)
        return self.config.training_of(configured) if configured is not None else self.config.training

    def priority_of(self, target: str) -> int:
        """How urgent the jobs of a target are, by digest."""
        configured = self._configured(target)
        return configured.priority if configured is not None else 0

    def _configured(self, target: str) -> TargetConfig | None:
        name = self.targets[target].name if target in self.targets else ""
        return next((item for item in self.config.target if item.lineage == name), None)

    async def submit(self, spec: JobSpec, max_attempts: int, job_id: str) -> Job:
        """Queue a job, with what a worker on another host needs for it. Raises `Unavailable`, `Superseded`."""
        return await self.jobs.submit(await self.exchange.lend(spec), self.leadership.require(), max_attempts, job_id)

    async def now_ms(self) -> int:
        return await redis_time_ms(self.redis)

    async def announce(self, kind: str, subject: str, message: str, **data: object) -> None:
        """Log what happened and store it for `tidectl events`, as the leader. Raises `Unavailable`, `Superseded`."""
        _log.info(kind, subject=subject, message=message)
        event = Event(kind, await self.now_ms(), subject, message, dict(data))
        await self.events.append(event, self.leadership.require())
