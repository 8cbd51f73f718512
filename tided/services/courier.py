"""Answers engines that fetch a draft over Redis (tided.wire.fetch).

Nothing is remembered: a request says all, so whoever leads can answer it.
"""

import time
from typing import Any, cast

import anyio
import anyio.to_thread
import structlog
from redis.asyncio import Redis

from tided.draft import bundle
from tided.model.errors import Refused, TideError
from tided.services.leadership import Leadership
from tided.store.client import closing, connect_blocking, translated
from tided.store.drafts import DraftStore
from tided.wire import fetch, keys
from tided.wire.control import decode

ATTEND_S = 10.0
"""So long after it was last said that an engine may ask, it is listened to."""
_BLOCK_S = 1.0
_RETRY_S = 0.5

_log = structlog.get_logger()


class Courier:
    """`attend` is called in every cycle in which an engine may fetch; `run` listens to those engines."""

    def __init__(self, redis_url: str, drafts: DraftStore, leadership: Leadership) -> None:
        self._redis_url, self._drafts, self._leadership = redis_url, drafts, leadership
        self._until_s: dict[str, float] = {}
        self._changed = anyio.Event()

    def attend(self, engine: str) -> None:
        """The engine may ask for a draft now, and for a while."""
        if engine not in self._until_s:
            self._changed.set()
        self._until_s[engine] = time.monotonic() + ATTEND_S

    async def run(self) -> None:
        """For ever."""
        listened: set[str] = set()
        async with anyio.create_task_group() as group:
            while True:
                for engine in self._until_s.keys() - listened:
                    listened.add(engine)
                    group.start_soon(self._listen, engine, listened)
                await self._changed.wait()
                self._changed = anyio.Event()

    async def _listen(self, engine: str, listened: set[str]) -> None:
        try:
            while time.monotonic() < self._until_s[engine]:
                try:
                    async with closing(connect_blocking(self._redis_url, _BLOCK_S)) as redis:
                        await self._answer_all(redis, engine)
                except TideError as exc:
                    _log.warning("draft-not-sent", engine=engine, why=str(exc))
                    await anyio.sleep(_RETRY_S)
        finally:
            listened.discard(engine)
            self._until_s.pop(engine, None)

    async def _answer_all(self, redis: Redis, engine: str) -> None:
        while time.monotonic() < self._until_s[engine]:
            with translated("draft"):
                asked = cast("Any", await redis.blpop([keys.fetches(engine)], timeout=_BLOCK_S))
            if asked is not None and self._leadership.leads:
                try:
                    await self._answer(redis, engine, fetch.check(decode(fetch.FetchRequest, asked[1])))
                except Refused as exc:
                    _log.warning("draft-not-sent", engine=engine, why=str(exc))  # the engine's command will expire

    async def _answer(self, redis: Redis, engine: str, request: fetch.FetchRequest) -> None:
        path = await anyio.to_thread.run_sync(self._drafts.path, request.version)
        data = await anyio.to_thread.run_sync(bundle.read, path, request.offset, request.bytes)
        parts = keys.parts(engine, request.command)
        for part in fetch.parts(request.offset, data):
            with translated("draft"):
                pipeline = redis.pipeline(transaction=True)
                pipeline.rpush(parts, part)
                pipeline.expire(parts, fetch.TTL_S)
                await pipeline.execute()
