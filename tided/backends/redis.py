"""Any stack that speaks the Redis protocol of docs/protocol.md: commands and replies through `EngineStore`."""

from pathlib import Path
from typing import Any, Self

from tided.backends.base import Backend, SwapDone
from tided.model.codec import from_plain
from tided.model.engines import EngineInfo, LatencyProfile, Observation
from tided.model.errors import Conflict, Refused, Superseded
from tided.store.engines import EngineStore
from tided.wire.control import Body, Deliver, MeasureProfile, Reply, SetCapture, SetSchedule, Swap

QUICK_S = 2.0
_PAGE = 200


class RedisBackend(Backend):
    """See `Backend`."""

    def __init__(self, engine: str, store: EngineStore) -> None:
        super().__init__(engine)
        self._store = store

    @classmethod
    def of(cls, info: EngineInfo, store: EngineStore) -> Self:
        return cls(info.engine, store)

    async def observe(self, cursor: str) -> tuple[list[Observation], str]:
        return await self._store.observations(self.engine, cursor)

    async def set_schedule(self, gammas: tuple[int, ...], epoch: int) -> None:
        await self._ask(SetSchedule(gammas), epoch, QUICK_S)

    async def set_capture(self, on: bool, credit_bytes: int, epoch: int) -> None:
        await self._ask(SetCapture(on, credit_bytes), epoch, QUICK_S)

    async def send_swap(self, version: str, path: Path, epoch: int, ttl_s: float) -> str:
        return (await self._store.send(self.engine, Swap(version, str(path)), epoch, ttl_s)).id

    async def send_draft(self, version: str, size: int, epoch: int, ttl_s: float) -> str:
        return (await self._store.send(self.engine, Deliver(version, size), epoch, ttl_s)).id

    async def swap_outcome(self, version: str, command: str) -> SwapDone | None:
        reply = await self._reply(command)
        if reply is None:
            return None
        self._check(reply, None)
        read_back, pause_s = reply.data.get("version"), reply.data.get("seconds")
        if not isinstance(read_back, str) or not isinstance(pause_s, int | float):
            raise Conflict(f"engine {self.engine}: its reply to a swap does not say which version it loaded")
        if read_back != version:
            raise Conflict(f"engine {self.engine}: asked to swap to {version[:12]}, it reads back {read_back[:12]}")
        return SwapDone(read_back, float(pause_s))

    async def measure_profile(self, epoch: int, deadline_s: float) -> LatencyProfile:
        reply = await self._ask(MeasureProfile(), epoch, deadline_s)
        profile: Any = reply.data.get("profile", reply.data)
        return from_plain(LatencyProfile, profile, f"engine {self.engine}: profile")

    async def _ask(self, body: Body, epoch: int, timeout_s: float) -> Reply:
        command = await self._store.send(self.engine, body, epoch, timeout_s)
        reply = await self._store.wait_reply(self.engine, command.id, timeout_s)
        self._check(reply, epoch)
        return reply

    async def _reply(self, command: str) -> Reply | None:
        cursor = "0"
        while True:
            replies, cursor = await self._store.replies(self.engine, cursor, _PAGE)
            for reply in replies:
                if reply.command == command:
                    return reply
            if not replies:
                return None

    def _check(self, reply: Reply, epoch: int | None) -> None:
        if reply.ok:
            return
        if epoch is not None and reply.epoch > epoch:
            raise Superseded(f"engine {self.engine} has seen epoch {reply.epoch}; this leader's is {epoch}")
        raise Refused(f"engine {self.engine}: {reply.error}")
