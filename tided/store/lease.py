"""The leader's lease. One daemon leads at a time; its epoch fences what an older one may still try to write."""

import os
import time
from collections.abc import Callable

from redis.asyncio import Redis

from tided.store import scripts

MARGIN = 0.1
"""Share of the TTL that the holder does not use: clock rates differ, and a decision needs time to become a write."""


def boottime_s() -> float:
    """Seconds since boot, suspension included: a machine that slept must not believe that its lease is still young."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaderLease:
    """Not thread-safe; one object a process. `holder` is for people: the object adds what makes it unique.

    The holder must act only while `remaining_s() > 0`. That is counted on a monotonic clock from *before* the request was sent,
    so it ends before the server's TTL can, whatever the network or the scheduler did in between.
    """

    def __init__(self, redis: Redis, holder: str, ttl_s: float, clock: Callable[[], float] = boottime_s) -> None:
        self._redis = redis
        self._token = f"{holder}.{os.urandom(4).hex()}"
        self._ttl_s = ttl_s
        self._clock = clock
        self._until_s = float("-inf")
        self._epoch: int | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch under which this process leads; None when it does not, or can no longer be sure that it does."""
        return self._epoch if self.remaining_s() > 0 else None

    def remaining_s(self) -> float:
        """Seconds for which this process may still act as leader; 0.0 when it may not."""
        return max(0.0, self._until_s - self._clock())

    async def acquire(self, highest_engine_epoch: int = 0) -> int | None:
        """Try to become leader: the new epoch, or None while another leads. Raises `Unavailable`."""
        sent_s = self._clock()
        self._until_s, self._epoch = float("-inf"), None
        epoch = await scripts.acquire_lease(self._redis, self._token, self._ttl_ms, highest_engine_epoch)
        if epoch is not None:
            self._epoch, self._until_s = epoch, sent_s + self._ttl_s * (1 - MARGIN)
        return epoch

    async def renew(self) -> bool:
        """Hold on for another TTL. False: the lease is lost, stop leading at once. Raises `Unavailable` (then go on till it ends)."""
        if self._epoch is None:
            return False
        sent_s = self._clock()
        kept = await scripts.renew_lease(self._redis, self._token, self._ttl_ms, self._epoch)
        self._until_s = sent_s + self._ttl_s * (1 - MARGIN) if kept else float("-inf")
        if not kept:
            self._epoch = None
        return kept

    async def release(self) -> None:
        """Stop leading now and let another begin at once. Raises `Unavailable` (then the lease runs out by itself)."""
        self._until_s, self._epoch = float("-inf"), None
        await scripts.release_lease(self._redis, self._token)

    @property
    def _ttl_ms(self) -> int:
        return round(self._ttl_s * 1000)
