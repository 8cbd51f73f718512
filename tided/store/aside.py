"""Which rows are for the self-test and never for training: tided says so before they exist, the collector asks as they arrive.

A hash in Redis with a field for each incarnation of an engine that is not trusted yet, and one for each probe's prompt group. What a
superseded leader writes here cannot do harm (rows of probes are set aside, whoever sent them), so it is not fenced.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from tided.model.ids import check_name
from tided.store.client import translated
from tided.wire import keys

TTL_S = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Aside:
    """All rows of `incarnations`, and those of prompts in `groups` (tided.model.ids.prompt_group)."""

    incarnations: frozenset[str] = frozenset()
    groups: frozenset[bytes] = frozenset()


async def read_aside(redis: Redis, engine: str) -> Aside:
    """What is set aside now."""
    with translated("self-test"):
        found = cast("list[bytes]", await cast("Any", redis.hkeys(keys.aside(engine))))
    names = [name.decode(errors="replace") for name in found]
    return Aside(
        frozenset(name[2:] for name in names if name.startswith("i:")),
        frozenset(bytes.fromhex(name[2:]) for name in names if name.startswith("g:")),
    )


async def set_aside(redis: Redis, engine: str, incarnation: str = "", groups: Iterable[bytes] = ()) -> None:
    """Set rows of an incarnation, or of prompts, aside from now on. Call it before they can exist."""
    fields = {f"g:{group.hex()}": "1" for group in groups}
    if incarnation:
        fields[f"i:{check_name(incarnation, 'incarnation')}"] = "1"
    with translated("self-test"):
        pipeline = redis.pipeline(transaction=True)
        pipeline.hset(keys.aside(engine), mapping=cast("Any", fields))
        pipeline.expire(keys.aside(engine), TTL_S)
        await pipeline.execute()


async def release(redis: Redis, engine: str, incarnation: str) -> None:
    """The incarnation is trusted: what is stored of it from now on may train. Its probes stay aside."""
    with translated("self-test"):
        await cast("Any", redis.hdel(keys.aside(engine), f"i:{incarnation}"))
