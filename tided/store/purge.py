"""Purging what waits in an engine's stream: the leader marks how far, the collector, whose entries they are, discards up to there.

The mark stays until nothing up to it is left: also for a collector that starts later. Like tided.store.aside it is not fenced: what a
superseded leader marks, an operator has asked for.
"""

from typing import cast

from redis.asyncio import Redis

from tided.store import scripts
from tided.store.client import translated
from tided.wire import keys

TTL_S = 7 * 86_400

_DONE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1"


async def engines(redis: Redis) -> list[str]:
    """Engines that have, or had, samples in a stream."""
    with translated("samples"):
        found = [cast("bytes", key).decode() async for key in redis.scan_iter(match=keys.SAMPLES_PATTERN, count=1000)]
    return sorted(key.partition("{")[2].partition("}")[0] for key in found)


async def mark(redis: Redis, engine: str) -> None:
    """Everything that is in the engine's stream now is to be discarded."""
    with translated("samples"):
        if await redis.exists(keys.samples(engine)):
            newest = (await redis.xinfo_stream(keys.samples(engine)))["last-generated-id"]
            await redis.set(keys.purge(engine), newest, ex=TTL_S)


async def marked(redis: Redis, engine: str) -> str:
    """The entry up to which the stream is to be discarded, or ""."""
    with translated("samples"):
        found = cast("bytes | None", await redis.get(keys.purge(engine)))
    return found.decode() if found is not None else ""


async def left(redis: Redis, engine: str, through: str) -> bool:
    """Whether the stream still has entries up to `through`."""
    with translated("samples"):
        return bool(await redis.xrange(keys.samples(engine), max=through, count=1))


async def done(redis: Redis, engine: str, through: str) -> None:
    """Nothing up to `through` is left; a later mark stays."""
    await scripts.run(redis, _DONE, [keys.purge(engine)], [through], allow_oom=True)


def is_through(entry: str, mark: str) -> bool:
    """Whether a stream entry is at or before `mark`."""
    return _order(entry) <= _order(mark)


def _order(entry: str) -> tuple[int, int]:
    ms, _, number = entry.partition("-")
    return int(ms), int(number or 0)
