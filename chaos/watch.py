"""What must be seen while it happens, for afterwards it is gone: epochs, and every shard that was ever published."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from redis.asyncio import Redis

from tided.model.errors import TideError
from tided.store.client import connect, translated
from tided.store.engines import EngineStore
from tided.store.samples import Split
from tided.wire import keys

EVERY_S = 0.2
SHARDS_EVERY_S = 0.05


class Watch:
    """`back`: each time a number that only grows was seen to shrink. `shards`: links to all shards, also to those that are consumed."""

    def __init__(self, url: str, samples: Path, kept: Path) -> None:
        self.back: list[str] = []
        self.epochs: set[int] = set()
        self._url, self._samples, self._kept = url, samples, kept
        self._highest: dict[str, int] = {}

    @property
    def shards(self) -> list[Path]:
        return sorted(self._kept.iterdir())

    async def run(self) -> None:
        """Until cancelled."""
        self._kept.mkdir()
        async with asyncio.TaskGroup() as group:
            group.create_task(_every(SHARDS_EVERY_S, self.link))
            group.create_task(self._epochs())

    def link(self) -> None:
        """Keep a link to every shard that is there now."""
        for split in Split:
            for shard in (self._samples / split).glob("*.safetensors"):
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    (self._kept / shard.name).hardlink_to(shard)

    async def _epochs(self) -> None:
        redis = connect(self._url)
        try:
            while True:
                with contextlib.suppress(TideError, OSError):
                    await self._look(redis)
                await asyncio.sleep(EVERY_S)
        finally:
            await redis.aclose()

    async def _look(self, redis: Redis) -> None:
        stored = await _number(redis, keys.epoch())
        if stored is not None:
            self.epochs.add(stored)
            self._grows("the stored epoch", stored)
        for info in await EngineStore(redis).list():
            self._grows(f"the epoch that {info.incarnation} of {info.engine} has seen", info.epoch)

    def _grows(self, what: str, value: int) -> None:
        before = self._highest.get(what, 0)
        if value < before:
            self.back.append(f"{what} went from {before} to {value}")
        self._highest[what] = max(before, value)


async def _number(redis: Redis, key: str) -> int | None:
    with translated():
        found = await redis.get(key)
    return int(found) if found is not None else None


async def _every(seconds: float, what: Callable[[], None]) -> None:
    while True:
        await asyncio.to_thread(what)
        await asyncio.sleep(seconds)
