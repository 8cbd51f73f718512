"""What the leader must remember about engines and targets across restarts, and the policy setting. Every write is fenced."""

from typing import TypeVar

from redis.asyncio import Redis

from tided.model.policy import PolicySetting
from tided.store import scripts
from tided.store.client import translated
from tided.store.replies import raw
from tided.wire import keys
from tided.wire.control import decode, encode

T = TypeVar("T")


class StateStore:
    """All methods raise `Unavailable` while Redis cannot be reached; writes raise `Superseded` for an old epoch."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(self, name: str, about: str, record: object, epoch: int) -> None:
        """Store a frozen dataclass as the `name` of an engine, or of a target by its digest."""
        await scripts.put(self._redis, keys.state(name, about), encode(record), epoch)

    async def get(self, cls: type[T], name: str, about: str) -> T | None:
        """The `name` of an engine or target; None if there is none. Raises `Refused` for a record of another schema."""
        return await self._read(cls, keys.state(name, about))

    async def delete(self, name: str, about: str, epoch: int) -> None:
        await scripts.delete(self._redis, keys.state(name, about), epoch)

    async def put_policy(self, setting: PolicySetting, epoch: int) -> None:
        await scripts.put(self._redis, keys.policy(), encode(setting), epoch)

    async def policy(self) -> PolicySetting:
        """What the operator set; the default (auto) if nothing."""
        return await self._read(PolicySetting, keys.policy()) or PolicySetting()

    async def _read(self, cls: type[T], key: str) -> T | None:
        with translated():
            data = raw(await self._redis.get(key))
        return decode(cls, data) if data is not None else None
