"""An engine that speaks the Redis protocol and nothing else: no model. It can lie, refuse, or die in mid-swap."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import redis.asyncio

from tests.conftest import Valkey
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.model.engines import Capability, EngineInfo, LatencyProfile, Observation, RequestStats, StepCounts, TapTotals
from tided.model.ids import new_id
from tided.wire import keys
from tided.wire.control import Command, Reply, SetCapture, SetSchedule, Swap, decode_command, encode

PROFILE = LatencyProfile((1, 2, 4, 8, 16, 40), (0.05, 0.05, 0.052, 0.06, 0.09, 0.19), (1, 8), (0.005, 0.01))


class Swaps(StrEnum):
    """How the double swaps."""

    WELL = "well"
    LYING_REPLY = "lying-reply"  # says another version than asked for
    LYING_BEAT = "lying-beat"  # says it did, and goes on serving the old one
    REFUSING = "refusing"
    DYING = "dying"  # disappears in the middle of the swap


@dataclass
class EngineDouble:
    """Runs inside a test's event loop. `commands` are those it has read, in order."""

    url: str
    info: EngineInfo
    swaps: Swaps = Swaps.WELL
    commands: list[Command] = field(default_factory=list[Command])
    dead: bool = False
    stubborn: frozenset[str] = frozenset()  # versions whose swap is refused
    _seq: int = 0

    async def run(self) -> None:
        client = redis.asyncio.Redis.from_url(self.url)
        stream = keys.commands(self.info.engine)
        newest = cast("list[Any]", await client.xrevrange(stream, count=1))
        cursor = cast("bytes", newest[0][0]) if newest else b"0"
        try:
            while not self.dead:
                await self._beat(client)
                found = cast("list[Any]", await client.xread({stream: cursor}, count=10, block=20) or [])
                for _, entries in found:
                    for entry, fields in entries:
                        cursor = entry
                        await self._apply(client, decode_command(fields[b"m"]))
        finally:
            await client.delete(keys.info(self.info.engine))
            await client.aclose()

    async def report(
        self,
        *,
        alpha: float,
        requests: int = 0,
        gamma: int = 4,
        running: int = 1,
        temperature: float | None = None,
        at_ms: int = 0,
    ) -> None:
        """Observations as if `requests` had finished, each of 40 steps in which a drafted token is accepted with `alpha`."""
        steps = max(requests, 1) * 40
        histogram, reached = list[int](), float(steps)
        for _ in range(gamma):
            histogram.append(round(reached * (1 - alpha)))
            reached *= alpha
        histogram.append(steps - sum(histogram))
        accepted = sum(k * n for k, n in enumerate(histogram)) // max(requests, 1)
        stats = RequestStats(20, 41 + accepted, 40, 40 * gamma, accepted, self.info.version, temperature)
        self._seq += 1
        observation = Observation(
            engine=self.info.engine,
            incarnation=self.info.incarnation,
            seq=self._seq,
            at_ms=at_ms,
            version=self.info.version,
            running=running,
            waiting=0,
            steps=(StepCounts(1, gamma, steps, 1.0, tuple(histogram)),),
            requests=(stats,) * requests,
            tap=TapTotals(),
        )
        client = redis.asyncio.Redis.from_url(self.url)
        name = keys.observations(self.info.engine)
        await client.xadd(name, {"m": encode(observation)})
        await client.expire(name, 600)
        await client.aclose()

    def kinds(self) -> list[str]:
        return [type(command.body).__name__ for command in self.commands]

    async def _beat(self, client: redis.asyncio.Redis) -> None:
        await client.set(keys.info(self.info.engine), encode(self.info), ex=10)

    async def _apply(self, client: redis.asyncio.Redis, command: Command) -> None:
        self.commands.append(command)
        if command.epoch < self.info.epoch:
            await self._reply(client, Reply(command.id, self.info.epoch, False, "an old epoch", {}))
            return
        self.info = replace(self.info, epoch=command.epoch)
        error, data = "", {}
        match command.body:
            case SetSchedule(gammas):
                self.info = replace(self.info, gammas=gammas)
            case SetCapture(on):
                self.info = replace(self.info, capturing=on)
            case Swap(version, path):
                if self.swaps is Swaps.DYING:
                    self.dead = True
                    return
                error, data = self._swap(version, Path(path))
            case _:
                error = "not in this double"
        await self._beat(client)
        await self._reply(client, Reply(command.id, self.info.epoch, not error, error, data))

    def _swap(self, version: str, path: Path) -> tuple[str, dict[str, object]]:
        if self.swaps is Swaps.REFUSING or version in self.stubborn:
            return "this checkpoint does not load", {}
        if self.swaps is Swaps.LYING_REPLY:
            return "", {"version": "0" * 64, "seconds": 0.01}
        if self.swaps is Swaps.WELL:
            read = checkpoint.load(path)
            self.info = replace(self.info, version=read.version, vocab_id=read.vocab_id)
        return "", {"version": version, "seconds": 0.01}

    async def _reply(self, client: redis.asyncio.Redis, reply: Reply) -> None:
        name = keys.replies(self.info.engine)
        await client.xadd(name, {"m": encode(reply)}, maxlen=1000)
        await client.expire(name, 600)


def describe_double(target: Path, draft: Path | None, engine: str = "double") -> EngineInfo:
    """The heartbeat of an engine that serves `target` with `draft`."""
    loaded = checkpoint.load(draft) if draft is not None else None
    return EngineInfo(
        engine=engine,
        incarnation=new_id("run"),
        kind="transformers",
        url="",
        target=describe(target),
        version=loaded.version if loaded else "",
        vocab_id=loaded.vocab_id if loaded else "",
        gamma_max=4,
        max_batch=4,
        capabilities=tuple(Capability),
        gammas=(0,),
        capturing=False,
        epoch=0,
        profile=PROFILE,
    )


@contextlib.asynccontextmanager
async def running_double(
    valkey: Valkey | str, info: EngineInfo, swaps: Swaps = Swaps.WELL
) -> AsyncGenerator[EngineDouble]:
    """A double that runs while the body does."""
    double = EngineDouble(valkey if isinstance(valkey, str) else valkey.url, info, swaps)
    task = asyncio.create_task(double.run())
    try:
        yield double
    finally:
        double.dead = True  # not cancelled: redis-py can swallow a cancellation that meets a reply
        await task
