"""Who leads. Keeps the leader's lease, and says at any moment under which epoch this tided may act, if at all."""

import anyio
import structlog

from tided.model.errors import Superseded, Unavailable
from tided.store.engines import EngineStore
from tided.store.lease import LeaderLease

STANDBY_POLL_S = 0.5
RENEWALS_PER_TTL = 4

_log = structlog.get_logger()


class Leadership:
    """Acquires and renews the lease in `run()`; everybody else asks `epoch`, or `require()`, right before acting."""

    def __init__(self, lease: LeaderLease, engines: EngineStore, ttl_s: float) -> None:
        self._lease = lease
        self._engines = engines
        self._ttl_s = ttl_s
        self.problem = "not connected yet"
        """Why this tided neither leads nor could ask for the lease; "" when Redis answered."""
        self.elections = 0

    @property
    def epoch(self) -> int | None:
        """The epoch to act under; None in standby, and from the moment at which the lease could have run out."""
        return self._lease.epoch

    @property
    def leads(self) -> bool:
        return self.epoch is not None

    def require(self) -> int:
        """The epoch, or `Unavailable`: ask the leader instead."""
        epoch = self.epoch
        if epoch is None:
            if self.problem:
                raise Unavailable(f"tided cannot lead now: {self.problem}")
            raise Unavailable("this tided is in standby: another one leads; ask that one, or wait until it ends")
        return epoch

    async def step_down(self, reason: Superseded) -> None:
        """Somebody has seen a newer epoch: stop acting now, and stand again for a higher one. Raises `Unavailable`."""
        _log.warning("stepping-down", why=str(reason))
        await self._lease.release()

    async def run(self) -> None:
        """Hold the lease whenever it can be had. Returns only by cancellation, and then gives the lease up."""
        try:
            while True:
                try:
                    await self._once()
                    self.problem = ""
                except Unavailable as exc:
                    if not self.problem:
                        _log.warning("redis-lost", why=str(exc))
                    self.problem = str(exc)
                await anyio.sleep(self._ttl_s / RENEWALS_PER_TTL if self.leads else STANDBY_POLL_S)
        finally:
            with anyio.move_on_after(1.0, shield=True):
                await self._give_up()

    async def _once(self) -> None:
        if self.leads:
            if not await self._lease.renew():
                _log.warning("lease-lost", why="another tided has taken over, or Redis lost the lease")
            return
        highest = max((info.epoch for info in await self._engines.list()), default=0)
        epoch = await self._lease.acquire(highest)
        if epoch is not None:
            self.elections += 1
            _log.info("leading", epoch=epoch)

    async def _give_up(self) -> None:
        try:
            await self._lease.release()
        except Unavailable as exc:
            _log.warning("lease-not-released", why=str(exc))
