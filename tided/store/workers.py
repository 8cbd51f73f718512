"""Workers as Redis knows them: a heartbeat under a TTL, and an operator's mark on it.

A *cordoned* worker is given no job (the claim script looks) until it is uncordoned: a restart changes nothing. One that *drains* is
cordoned too, and what it runs may go on for its `drain_s`, and is then given back.
"""

from dataclasses import replace
from enum import IntEnum

import structlog
from redis.asyncio import Redis

from tided.model.errors import Refused
from tided.model.jobs import WorkerInfo, WorkerMark
from tided.store import scripts
from tided.store.client import translated
from tided.store.replies import raw
from tided.wire import keys
from tided.wire.control import decode, encode

_log = structlog.get_logger()


class Beat(IntEnum):
    """What a heartbeat tells the worker."""

    REPLACED = 0  # another process has registered under this name: stop
    NOTED = 1
    CORDONED = 2  # noted; it will get no job
    DRAIN = 3  # and what runs shall end, or be given back


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

    async def registry(self) -> tuple[list[WorkerInfo], list[str]]:
        """Workers whose heartbeat is fresh, and the names of those that fell silent within a day without signing off.

        One that this tided cannot read is logged, and is in neither.
        """
        fresh: list[WorkerInfo] = []
        silent: list[str] = []
        for name, record, mark in await scripts.workers(self._redis):
            try:
                if record:
                    info = decode(WorkerInfo, record)
                    drains = info.draining or mark == WorkerMark.DRAIN
                    fresh.append(replace(info, cordoned=bool(mark), draining=drains))
                else:
                    silent.append(name)
            except Refused as exc:
                _log.warning("worker-unreadable", worker=name, why=str(exc))
        return fresh, silent

    async def list(self) -> list[WorkerInfo]:
        """Workers whose heartbeat is fresh, by name."""
        return sorted((await self.registry())[0], key=lambda info: info.worker)

    async def mark(self, worker: str, mark: WorkerMark, epoch: int) -> None:
        """Set or take back an operator's mark. Raises `Superseded` for an old epoch."""
        if mark is WorkerMark.NONE:
            await scripts.delete(self._redis, keys.cordon(worker), epoch)
        else:
            await scripts.put(self._redis, keys.cordon(worker), mark.value.encode(), epoch)

    async def marked(self, worker: str) -> WorkerMark:
        """Also of a worker that is not there."""
        with translated():
            stored = raw(await self._redis.get(keys.cordon(worker)))
        return WorkerMark(stored.decode()) if stored else WorkerMark.NONE

    async def _beat(self, info: WorkerInfo, *, take: bool) -> Beat:
        ttl_ms = round(self.ttl_s * 1000)
        return Beat(
            await scripts.heartbeat(self._redis, info.worker, info.incarnation, encode(info), ttl_ms, take=take)
        )
