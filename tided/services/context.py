"""What the services of one tided share: the stores, the configuration in force, and whether this tided leads."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread
import structlog
from redis.asyncio import Redis

from tided.config import Config
from tided.draft.target import describe
from tided.model.errors import Refused, TideError
from tided.model.records import Event, TargetInfo
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


@dataclass(slots=True)
class Context:
    """`config` is replaced whole on reload; `target` is None, with `target_problem` set, when it cannot be read."""

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
    target: TargetInfo | None = None
    target_problem: str = ""
    clock: Callable[[], float] = time.monotonic
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, config: Config, redis: Redis, leadership: Leadership) -> "Context":
        """Stores over one Redis client and the configured directories. Raises `Unavailable` when a directory cannot be made."""
        samples = config.samples
        return cls(
            config=config,
            redis=redis,
            leadership=leadership,
            engines=EngineStore(redis),
            jobs=JobStore(redis, config.jobs.lease_s, config.jobs.keep_s),
            workers=WorkerStore(redis),
            events=EventStore(redis),
            state=StateStore(redis),
            samples=SampleStore(config.samples_dir, samples.held_out_fraction, samples.max_bytes, samples.max_age_s),
            drafts=DraftStore(config.drafts_dir),
        )

    async def read_target(self) -> None:
        """Identify the configured target. What is wrong with it is kept, not raised: engines serve on without us."""
        try:
            self.target = await anyio.to_thread.run_sync(describe, self.config.target.path)
            self.target_problem = ""
        except TideError as exc:
            if not self.target_problem:
                _log.warning("target-unreadable", why=str(exc))
            self.target_problem = f"target.path: {exc}"

    def known_target(self) -> TargetInfo:
        """Raises `Refused` while the configured target cannot be read."""
        if self.target is None:
            raise Refused(self.target_problem or "target.path: not read yet")
        return self.target

    def staged_dir(self, staged: str) -> Path:
        """Where a worker staged a draft. Raises `Refused` for nothing or a relative path."""
        path = Path(staged)
        if not staged or not path.is_absolute():
            raise Refused(f"staged draft {staged!r}: expected an absolute directory on the shared filesystem")
        return path

    async def now_ms(self) -> int:
        return await redis_time_ms(self.redis)

    async def announce(self, kind: str, subject: str, message: str, **data: object) -> None:
        """Log what happened and store it for `tidectl events`. Raises `Unavailable`."""
        _log.info(kind, subject=subject, message=message)
        await self.events.append(Event(kind, await self.now_ms(), subject, message, dict(data)))
