"""The protocol's adapter: which error means what, against a double that answers, refuses or lies."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.engine_double import EngineDouble, Swaps, describe_double, running_double
from tests.support import eventually
from tided.backends.base import SwapDone, require
from tided.backends.redis import RedisBackend
from tided.backends.registry import backend_for
from tided.backends.transformers import TransformersBackend
from tided.model.engines import Capability
from tided.model.errors import Conflict, Refused, Superseded, Unavailable
from tided.store.client import connect
from tided.store.engines import EngineStore

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real


@dataclass
class Scene:
    engine: EngineDouble
    backend: RedisBackend
    store: EngineStore
    draft: Path

    async def gone(self) -> bool:
        """Whether the engine has taken its heartbeat away, as it does last."""
        return not await self.store.list()

    async def swap(self, epoch: int = 1) -> SwapDone | None:
        version = self.engine.info.version
        command = await self.backend.send_swap(version, self.draft, epoch, 5.0)
        await eventually(lambda: any(known.id == command for known in self.engine.commands))
        return await eventually(lambda: self.backend.swap_outcome(version, command))


@pytest.fixture
async def scene(valkey: Valkey, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr("tided.backends.redis.QUICK_S", 60.0)
    redis = connect(valkey.url)
    store = EngineStore(redis)
    async with running_double(valkey, describe_double(target, first)) as engine:
        await eventually(store.list)
        yield Scene(engine, RedisBackend(engine.info.engine, store), store, first)
    await redis.aclose()


async def test_schedule_and_capture_are_in_force_when_the_call_returns(scene: Scene) -> None:
    await scene.backend.set_schedule((3, 2, 0, 0), 1)
    assert scene.engine.info.gammas == (3, 2, 0, 0)
    await scene.backend.set_capture(True, 1000, 1)
    assert scene.engine.info.capturing


async def test_a_swap_is_read_back(scene: Scene) -> None:
    assert await scene.swap() == SwapDone(scene.engine.info.version, 0.01)


async def test_refused_conflict_and_superseded(scene: Scene) -> None:
    scene.engine.swaps = Swaps.REFUSING
    with pytest.raises(Refused, match="does not load"):
        await scene.swap()
    scene.engine.swaps = Swaps.LYING_REPLY
    with pytest.raises(Conflict, match="reads back"):
        await scene.swap()
    scene.engine.info = replace(scene.engine.info, epoch=10)
    with pytest.raises(Superseded, match="epoch 10"):
        await scene.backend.set_schedule((1,), 9)
    with pytest.raises(Refused, match="not in this double"):
        await scene.backend.measure_profile(11, 60.0)


async def test_an_engine_that_does_not_answer_is_unavailable(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tided.backends.redis.QUICK_S", 0.2)
    scene.engine.dead = True
    await eventually(scene.gone)
    with pytest.raises(Unavailable, match="did not answer"):
        await scene.backend.set_schedule((1,), 1)


async def test_an_outcome_that_is_not_there_yet_is_none(scene: Scene) -> None:
    assert await scene.backend.swap_outcome("0" * 64, "cmd-none") is None


def test_the_adapter_follows_the_kind_and_capabilities_are_required(target: Path, first: Path, valkey: Valkey) -> None:
    info = describe_double(target, first)
    store = EngineStore(connect(valkey.url))
    assert type(backend_for(info, store)) is TransformersBackend
    assert type(backend_for(replace(info, kind="other"), store)) is RedisBackend
    require(info, Capability.SWAP)
    with pytest.raises(Refused, match="does not declare 'swap'"):
        require(replace(info, capabilities=()), Capability.SWAP)
