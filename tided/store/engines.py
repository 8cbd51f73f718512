"""Engines as Redis knows them: heartbeats, reports, commands and replies. Writer on the other side: `tided.engine.agent`.

Commands are fenced by the engine itself, which keeps the highest epoch seen: its keys may live in another cluster slot than ours.
"""

from typing import TypeVar

import anyio
import structlog
from redis.asyncio import Redis

from tided.model.engines import EngineInfo, Observation
from tided.model.errors import Refused, Unavailable
from tided.model.ids import new_id
from tided.store.client import redis_time_ms, translated
from tided.store.replies import entries, raw
from tided.wire import keys
from tided.wire.control import Body, Command, Reply, decode, encode_command

COMMANDS_MAXLEN = 1_000
COMMANDS_TTL_S = 3_600
POLL_S = 0.02
SCAN_COUNT = 5_000
"""Keys that one step of a scan looks at: about a millisecond of the server. Ten thousand jobs are as many keys."""

_log = structlog.get_logger()
T = TypeVar("T")


class EngineStore:
    """All methods raise `Unavailable` while Redis cannot be reached. A cursor is a stream id; "" means "from now on"."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.unreadable: dict[str, str] = {}
        """Heartbeats that `list` last found and could not read: key -> why."""

    async def observations(self, engine: str, cursor: str = "", limit: int = 100) -> tuple[list[Observation], str]:
        """Reports after `cursor`, oldest first, and the cursor to go on from. An unreadable report is logged and passed over."""
        return await self._after(keys.observations(engine), Observation, cursor, limit)

    async def replies(self, engine: str, cursor: str = "", limit: int = 100) -> tuple[list[Reply], str]:
        """Replies after `cursor`, as `observations`."""
        return await self._after(keys.replies(engine), Reply, cursor, limit)

    async def send(self, engine: str, body: Body, epoch: int, ttl_s: float) -> Command:
        """Put a command into the engine's stream; an engine that reads it later than `ttl_s` from now ignores it."""
        command = Command(new_id("cmd"), epoch, await redis_time_ms(self._redis) + round(ttl_s * 1000), body)
        name = keys.commands(engine)
        with translated():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xadd(name, {"m": encode_command(command)}, maxlen=COMMANDS_MAXLEN, approximate=True)
                pipe.expire(name, COMMANDS_TTL_S)
                await pipe.execute()
        return command

    async def wait_reply(self, engine: str, command_id: str, timeout_s: float) -> Reply:
        """The engine's reply to a command, sent before or after this call. Raises `Unavailable` when none comes in time."""
        cursor = "0"
        with anyio.move_on_after(timeout_s):
            while True:
                replies, cursor = await self.replies(engine, cursor)
                for reply in replies:
                    if reply.command == command_id:
                        return reply
                if not replies:
                    await anyio.sleep(POLL_S)
        raise Unavailable(f"engine {engine} did not answer command {command_id} within {timeout_s:g} s")

    async def _after(self, stream: str, cls: type[T], cursor: str, limit: int) -> tuple[list[T], str]:
        with translated():
            if not cursor:
                newest = entries(await self._redis.xrevrange(stream, count=1))
                return [], newest[0][0] if newest else "0"
            found = entries(await self._redis.xrange(stream, min=f"({cursor}", count=limit))
        records: list[T] = []
        for cursor, message in found:
            try:
                records.append(decode(cls, message))
            except Refused as exc:
                _log.warning("entry-unreadable", stream=stream, entry=cursor, why=str(exc))
        return records, cursor

    async def list(self) -> list[EngineInfo]:
        """Engines whose heartbeat is fresh, by name. One that this tided cannot read is noted in `unreadable` and left out."""
        found: list[EngineInfo] = []
        unreadable: dict[str, str] = {}
        with translated():
            names = [
                bytes(key) async for key in self._redis.scan_iter(match=keys.ENGINE_INFO_PATTERN, count=SCAN_COUNT)
            ]
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.get(name)
                records = [raw(record) for record in await pipe.execute()]
        for name, record in zip(names, records, strict=True):
            if record is None:
                continue
            try:
                info = decode(EngineInfo, record)
                if keys.info(info.engine).encode() != name:
                    raise Refused("the heartbeat names another engine than its key")
                found.append(info)
            except Refused as exc:
                unreadable[name.decode(errors="replace")] = str(exc)
        for name in unreadable.keys() - self.unreadable.keys():
            _log.warning("engine-unreadable", key=name, why=unreadable[name])
        self.unreadable = unreadable
        return sorted(found, key=lambda info: info.engine)
