"""A draft reaches an engine that shares no filesystem with tided: over Redis, in parts, whole or not at all, whoever leads meanwhile."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from tests.conftest import Valkey
from tests.control import variant
from tests.dataplane import settings
from tests.support import eventually
from tests.test_agent import FakeEngine, Talk
from tided.draft import bundle, checkpoint
from tided.draft.target import describe
from tided.engine.agent import EngineAgent
from tided.engine.fetch import cache_dir
from tided.engine.tap import Tap
from tided.model.drafts import Draft, DraftOrigin
from tided.model.engines import Capability, EngineInfo
from tided.services.courier import Courier
from tided.services.leadership import Leadership
from tided.store.client import connect
from tided.store.drafts import DraftStore
from tided.store.engines import EngineStore
from tided.store.lease import LeaderLease
from tided.wire import fetch, keys
from tided.wire.control import Deliver, SetSchedule, Swap, encode

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real


class SwappingEngine(FakeEngine):
    def info(self) -> EngineInfo:
        return replace(super().info(), capabilities=(Capability.SWAP,))


@asynccontextmanager
async def engine_on_another_host(talk: Talk, url: str, directory: Path | None) -> AsyncGenerator[SwappingEngine]:
    engine = SwappingEngine()
    agent = EngineAgent(url, "e1", "i-1", engine, Tap(settings()), report_interval_s=0.05, drafts_dir=directory)
    agent.start()
    try:
        await eventually(talk.info)
        yield engine
    finally:
        agent.close(60.0)


@asynccontextmanager
async def leader(valkey: Valkey, drafts: DraftStore) -> AsyncGenerator[Courier]:
    """A tided that leads, as far as engines that fetch see it."""
    async with connect(valkey.url) as redis:
        lease = LeaderLease(redis, "test", 600.0)
        assert await lease.acquire(0) is not None
        courier = Courier(valkey.url, drafts, Leadership(lease, EngineStore(redis), 600.0))
        async with anyio.create_task_group() as group:
            group.start_soon(courier.run)
            courier.attend("e1")
            yield courier
            group.cancel_scope.cancel()
        await lease.release()


@pytest.fixture
async def talk(valkey: Valkey) -> Talk:
    return Talk(valkey)


@pytest.fixture
def store(tmp_path: Path) -> DraftStore:
    return DraftStore(tmp_path / "tided" / "drafts")


def add(store: DraftStore, directory: Path, target: Path) -> Draft:
    origin = DraftOrigin.IMPORTED
    return store.add(directory, lineage="tiny", parent="", origin=origin, target=describe(target), now_ms=1)


def large(first: Path, to: Path) -> Path:
    """A draft of many parts: a wider MLP."""
    loaded = checkpoint.load(first)
    config = replace(loaded.config, intermediate=80_000)
    tensors = dict(loaded.tensors)
    for name, (_, shape) in checkpoint.expected_tensors(config).items():
        if ".mlp." in name:
            tensors[name] = np.zeros(shape, np.uint16)
    checkpoint.write(to, config, tensors)
    return to


def deliver(draft: Path) -> Deliver:
    return Deliver(checkpoint.version_of(draft), bundle.size_of(draft))


async def test_a_draft_is_fetched_checked_and_swapped_to(
    valkey: Valkey, talk: Talk, store: DraftStore, first: Path, target: Path, tmp_path: Path
) -> None:
    draft = add(store, large(first, tmp_path / "large"), target)
    assert draft.bytes > 2 * fetch.WINDOW_BYTES
    most = 0
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host") as engine:
        assert Capability.FETCH in (await eventually(talk.info)).capabilities
        async with leader(valkey, store):
            command = talk.send(Deliver(draft.version, draft.bytes + 8))

            def answered() -> bool:
                nonlocal most
                most = max(most, valkey.client.llen(keys.parts("e1", command)))
                return any(reply.command == command for reply in talk.replies())

            await eventually(answered)
        assert (await talk.reply(command)).ok, await talk.reply(command)
    (applied,) = engine.applied
    assert isinstance(applied, Swap)
    assert Path(applied.path) == tmp_path / "host" / draft.version
    assert checkpoint.verify(Path(applied.path)) == applied.version == draft.version
    assert most * fetch.PART_BYTES <= 2 * fetch.WINDOW_BYTES + fetch.PART_BYTES  # what Redis held at any time
    assert not valkey.client.exists(keys.parts("e1", command))


async def test_what_is_in_the_cache_needs_nobody(
    valkey: Valkey, talk: Talk, store: DraftStore, first: Path, target: Path, tmp_path: Path
) -> None:
    """Restoring the draft before needs no tided that still has it; what the disk has changed is fetched again."""
    draft = add(store, first, target)
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host") as engine:
        async with leader(valkey, store):
            assert (await talk.reply(talk.send(deliver(first)))).ok
        assert (await talk.reply(talk.send(deliver(first)))).ok
        weights = tmp_path / "host" / draft.version / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        async with leader(valkey, store):
            assert (await talk.reply(talk.send(deliver(first)))).ok
        assert weights.read_bytes() == content
        assert len(engine.applied) == 3


async def test_a_draft_that_was_changed_is_refused_and_leaves_nothing(
    valkey: Valkey, talk: Talk, store: DraftStore, first: Path, target: Path, tmp_path: Path
) -> None:
    draft = add(store, first, target)
    weights = store.path(draft.version) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host") as engine:
        async with leader(valkey, store):
            reply = await talk.reply(talk.send(deliver(first)))
        assert not reply.ok
        assert "it was changed on the way or in tided's store" in reply.error
        assert engine.applied == []
        assert list((tmp_path / "host").iterdir()) == []


async def test_another_leader_goes_on_where_the_first_ended(
    valkey: Valkey,
    talk: Talk,
    store: DraftStore,
    first: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one takes a request with it. Schedules are obeyed meanwhile."""
    monkeypatch.setattr("tided.engine.fetch.ASK_AGAIN_S", 0.2)
    draft = add(store, large(first, tmp_path / "large"), target)
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host") as engine:
        command = talk.send(Deliver(draft.version, draft.bytes + 8))
        await eventually(lambda: valkey.client.lpop(keys.fetches("e1")))
        assert (await talk.reply(talk.send(SetSchedule((2,))))).ok
        assert engine.applied == [SetSchedule((2,))]
        async with leader(valkey, store):
            assert (await talk.reply(command)).ok
        assert [type(body) for body in engine.applied] == [SetSchedule, Swap]


async def test_what_does_not_come_in_time_is_an_answer(valkey: Valkey, talk: Talk, first: Path, tmp_path: Path) -> None:
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host") as engine:
        reply = await talk.reply(talk.send(deliver(first), expires_in_ms=2000))
        assert not reply.ok
        assert "0 of" in reply.error
        assert engine.applied == []


async def test_a_later_swap_ends_a_fetch(
    valkey: Valkey, talk: Talk, store: DraftStore, first: Path, target: Path, tmp_path: Path
) -> None:
    other = variant(first, tmp_path / "other", 1)
    add(store, other, target)
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host") as engine:
        waiting = talk.send(deliver(first))
        await eventually(lambda: valkey.client.exists(keys.fetches("e1")))
        later = talk.send(deliver(other))
        reply = await talk.reply(waiting)
        assert not reply.ok
        assert "another swap was asked for" in reply.error
        async with leader(valkey, store):
            assert (await talk.reply(later)).ok
        assert [body.version for body in engine.applied if isinstance(body, Swap)] == [checkpoint.version_of(other)]


async def test_an_old_epoch_fetches_nothing(valkey: Valkey, talk: Talk, first: Path, tmp_path: Path) -> None:
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host"):
        await talk.reply(talk.send(SetSchedule((1,)), epoch=7))
        reply = await talk.reply(talk.send(deliver(first), epoch=6))
        assert "epoch 6 is over" in reply.error
        assert not valkey.client.exists(keys.fetches("e1"))


async def test_an_engine_without_a_cache_says_so(valkey: Valkey, talk: Talk, first: Path) -> None:
    async with engine_on_another_host(talk, valkey.url, None):
        assert Capability.FETCH not in (await eventually(talk.info)).capabilities
        reply = await talk.reply(talk.send(deliver(first)))
        assert "fetches no drafts" in reply.error


@pytest.mark.parametrize("bad", [b"nonsense", b"", encode(SetSchedule((1,)))])
async def test_requests_that_are_none_end_nothing(
    valkey: Valkey, talk: Talk, store: DraftStore, first: Path, target: Path, tmp_path: Path, bad: bytes
) -> None:
    add(store, first, target)
    outside, too_much = fetch.FetchRequest("c9", "../../etc", 0, 10), fetch.FetchRequest("c9", "a" * 64, -1, 1 << 40)
    valkey.client.rpush(keys.fetches("e1"), bad, encode(outside), encode(too_much))
    valkey.client.expire(keys.fetches("e1"), 60)
    async with engine_on_another_host(talk, valkey.url, tmp_path / "host"), leader(valkey, store):
        assert (await talk.reply(talk.send(deliver(first)))).ok


def test_where_drafts_are_kept() -> None:
    assert cache_dir("e", {"TIDED_CACHE_DIR": "/x/y"}) == Path("/x/y")
    assert cache_dir("e", {"HOME": "/home/u"}) == Path("/home/u/.cache/tided/drafts/e")
    assert cache_dir("e", {"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}) == Path("/c/tided/drafts/e")
    assert cache_dir("e", {}).is_absolute()
