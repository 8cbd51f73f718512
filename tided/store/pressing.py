"""That a question waits for an engine's newest samples: tided says so, and the collector closes shards soon instead of well filled.

A key that ends by itself. What a superseded leader writes here makes shards smaller for a few seconds, so it is not fenced.
"""

from redis.asyncio import Redis

from tided.store.client import translated
from tided.wire import keys

TTL_S = 10


async def press(redis: Redis, engine: str) -> None:
    """A question waits, for `TTL_S` from now."""
    with translated("samples"):
        await redis.set(keys.pressing(engine), 1, ex=TTL_S)


async def is_pressing(redis: Redis, engine: str) -> bool:
    """Whether a question waits."""
    with translated("samples"):
        return bool(await redis.exists(keys.pressing(engine)))
