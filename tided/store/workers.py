"""Workers as Redis knows them: a heartbeat under a TTL, and the operator's wish that one drains."""

from enum import IntEnum

import structlog
from redis.asyncio import Redis

from tided.model.errors import Refused
from tided.model.records import WorkerInfo
from tided.store import scripts
from tided.store.client import translated
from tided.store.replies import raw
from tided.wire import keys
from tided.wire.control import decode, encode

DRAIN_MS = 86_400_000

_log = structlog.get_logger()


class Beat(IntEnum):
    """What a heartbeat tells the worker."""

    REPLACED = 0  # another process has registered under this name: stop
    NOTED = 1
    DRAIN = 2  # noted; claim nothing more


class WorkerStore:
    """All methods raise `Unavailable` while Redis cannot be reached."""

    def __init__(self, redis: Redis, ttl_s: float = 10.0) -> None:
        self._redis = redis
        self.ttl_s = ttl_s

    async def register(self, info: WorkerInfo) -> Beat:
        """The first heartbeat: takes the name over from an earlier process, which hears of it and stops."""
        return await self._beat(info, take=True)

    async def heartbeat(self, info: WorkerInfo) -> Beat:
        """Say that the worker lives, at least three times a TTL."""
        return await self._beat(info, take=False)

    async def remove(self, info: WorkerInfo) -> None:
        """Sign off."""
        await scripts.remove_worker(self._redis, info.worker, info.incarnation)

    async def list(self) -> list[WorkerInfo]:
        """Workers whose heartbeat is fresh, by name. One that this tided cannot read is logged and left out."""
        found: list[WorkerInfo] = []
        with translated():
            names = [bytes(key) async for key in self._redis.scan_iter(match=keys.WORKER_PATTERN, count=500)]
            records = [raw(await self._redis.hget(name, "info")) for name in names]
        for name, record in zip(names, records, strict=True):
            try:
                if record is not None:
                    found.append(decode(WorkerInfo, record))
            except Refused as exc:
                _log.warning("worker-unreadable", key=name.decode(errors="replace"), why=str(exc))
        return sorted(found, key=lambda info: info.worker)

    async def set_draining(self, worker: str, draining: bool, epoch: int) -> None:
        """Ask a worker to claim nothing (for at most a day), or to claim again. Raises `Superseded` for an old epoch."""
        if draining:
            await scripts.put(self._redis, keys.drain(worker), b"1", epoch, DRAIN_MS)
        else:
            await scripts.delete(self._redis, keys.drain(worker), epoch)

    async def _beat(self, info: WorkerInfo, *, take: bool) -> Beat:
        ttl_ms = round(self.ttl_s * 1000)
        return Beat(
            await scripts.heartbeat(self._redis, info.worker, info.incarnation, encode(info), ttl_ms, take=take)
        )
