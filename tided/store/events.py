"""What happened, for `tidectl events` and the audit log: a stream bounded by its length."""

from dataclasses import replace

import anyio
import structlog
from redis.asyncio import Redis

from tided.model.errors import Refused
from tided.model.events import Event
from tided.store import scripts
from tided.store.client import translated
from tided.store.replies import entries, raw
from tided.wire import keys
from tided.wire.control import decode, encode

MAXLEN = 10_000
POLL_S = 0.1

_log = structlog.get_logger()


class EventStore:
    """All methods raise `Unavailable` while Redis cannot be reached. Ids grow in the order of appending."""

    def __init__(self, redis: Redis, maxlen: int = MAXLEN) -> None:
        self._redis = redis
        self._maxlen = maxlen

    async def append(self, event: Event, epoch: int | None = None) -> Event:
        """Store an event; the same with its id. At least the newest `maxlen` are kept.

        `epoch`: of the leader that tells it; None for what any tided may tell. Raises `Superseded`.
        """
        message = encode(event)
        if epoch is not None:
            entry_id = await scripts.tell(self._redis, keys.events(), message, epoch, self._maxlen)
        else:
            with translated():
                entry_id = await self._redis.xadd(keys.events(), {"m": message}, maxlen=self._maxlen, approximate=True)
        return replace(event, id=(raw(entry_id) or b"").decode())

    async def read(self, after_id: str = "0", limit: int = 100, block_s: float = 0.0) -> list[Event]:
        """Events after `after_id` ("0": from the oldest kept), oldest first; waits up to `block_s` for the first one."""
        deadline = anyio.current_time() + block_s
        while True:
            with translated():
                found = entries(await self._redis.xrange(keys.events(), min=f"({after_id}", count=limit))
            if found or anyio.current_time() >= deadline:
                return _decoded(found)
            await anyio.sleep(POLL_S)

    async def newest(self, limit: int = 100) -> list[Event]:
        """The newest events, oldest first."""
        with translated():
            found = entries(await self._redis.xrevrange(keys.events(), count=limit))
        return _decoded(found[::-1])


def _decoded(found: list[tuple[str, bytes]]) -> list[Event]:
    events: list[Event] = []
    for entry_id, message in found:
        try:
            events.append(replace(decode(Event, message), id=entry_id))
        except Refused as exc:
            _log.warning("event-unreadable", entry=entry_id, why=str(exc))
    return events
