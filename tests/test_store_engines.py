"""Engines, workers and events as the daemon sees them in a real Valkey."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import Valkey
from tided.model.engines import Capability, EngineInfo, Observation, StepCounts, TapTotals, TargetInfo
from tided.model.errors import Superseded, Unavailable
from tided.model.events import Event
from tided.model.jobs import JobKind, WorkerInfo, WorkerMark
from tided.store.client import connect, redis_time_ms
from tided.store.engines import EngineStore
from tided.store.events import EventStore
from tided.store.replies import entries
from tided.store.workers import Beat, WorkerStore
from tided.wire import keys
from tided.wire.control import Reply, SetSchedule, decode_command, encode

pytestmark = pytest.mark.real

TARGET = TargetInfo("0" * 64, "tiny", 4, 32, 128, (2, 2, 1))


def info(engine: str) -> EngineInfo:
    return EngineInfo(
        engine, "i1", "transformers", "", TARGET, "", "", 4, 8, (Capability.TAP, Capability.SWAP), (3, 0), False, 7
    )


def observation(seq: int) -> Observation:
    return Observation(
        "engine-a", "i1", seq, 1, "1" * 64, 1, 0, (StepCounts(1, 3, 10, 0.5, (1, 2, 3, 4)),), (), TapTotals(tapped=9)
    )


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Any]:
    async with connect(valkey.url) as client:
        yield client


async def test_engines_are_listed_and_unreadable_ones_are_named(redis: Any, valkey: Valkey) -> None:
    store = EngineStore(redis)
    assert await store.list() == []
    for engine in ("engine-b", "engine-a"):
        valkey.client.set(keys.info(engine), encode(info(engine)), ex=60)
    valkey.client.set(keys.info("engine-c"), b"\x81\xa1v\x63", ex=60)
    valkey.client.set(keys.info("engine-d"), encode(info("engine-a")), ex=60)
    assert [found.engine for found in await store.list()] == ["engine-a", "engine-b"]
    assert sorted(store.unreadable) == ["tided:{engine-c}:info", "tided:{engine-d}:info"]
    assert "schema" in store.unreadable["tided:{engine-c}:info"]
    valkey.client.delete(keys.info("engine-c"), keys.info("engine-d"))
    await store.list()
    assert store.unreadable == {}


async def test_reports_are_read_from_now_on_in_order_and_once(redis: Any, valkey: Valkey) -> None:
    store, stream = EngineStore(redis), keys.observations("engine-a")

    def report(seq: int) -> None:
        valkey.client.xadd(stream, {"m": encode(observation(seq))})
        valkey.client.expire(stream, 60)

    empty, cursor = await store.observations("engine-a")
    assert (empty, cursor) == ([], "0")
    report(0)
    seen, cursor = await store.observations("engine-a", cursor)
    assert seen == [observation(0)]
    report(1)
    none, from_now = await store.observations("engine-a")
    assert none == []
    valkey.client.xadd(stream, {"m": b"junk"})
    report(2)
    report(3)
    assert [o.seq for o in (await store.observations("engine-a", from_now))[0]] == [2, 3]
    limited, cursor = await store.observations("engine-a", cursor, limit=2)
    assert [o.seq for o in limited] == [1]
    assert [o.seq for o in (await store.observations("engine-a", cursor))[0]] == [2, 3]


async def test_a_command_carries_its_epoch_and_expiry_and_the_stream_is_bounded(redis: Any, valkey: Valkey) -> None:
    store = EngineStore(redis)
    before_ms = await redis_time_ms(redis)
    command = await store.send("engine-a", SetSchedule((3, 0)), epoch=7, ttl_s=5.0)
    after_ms = await redis_time_ms(redis)
    ((_, message),) = entries(valkey.client.xrange(keys.commands("engine-a")))
    assert decode_command(message) == command
    assert (command.epoch, command.body) == (7, SetSchedule((3, 0)))
    assert before_ms + 5000 <= command.expires_ms <= after_ms + 5000
    assert 0 < valkey.client.ttl(keys.commands("engine-a")) <= 3600  # type: ignore[operator]


async def test_the_reply_is_found_whether_it_came_before_or_comes_after(redis: Any, valkey: Valkey) -> None:
    store, stream = EngineStore(redis), keys.replies("engine-a")

    def answer(command: str) -> None:
        valkey.client.xadd(stream, {"m": encode(Reply(command, 7, True, "", {"version": "1" * 64}))})
        valkey.client.expire(stream, 60)

    answer("cmd-other")
    answer("cmd-1")
    assert (await store.wait_reply("engine-a", "cmd-1", 60.0)).data == {"version": "1" * 64}
    waiting = asyncio.ensure_future(store.wait_reply("engine-a", "cmd-2", 60.0))
    answer("cmd-3")
    answer("cmd-2")
    assert (await waiting).command == "cmd-2"
    with pytest.raises(Unavailable, match=r"cmd-4 within 0\.05 s"):
        await store.wait_reply("engine-a", "cmd-4", 0.05)


def worker(incarnation: str, job: str = "") -> WorkerInfo:
    return WorkerInfo("w1", incarnation, "host", (JobKind.TRAIN,), "cpu", 1, job)


async def test_a_worker_is_listed_while_it_beats(redis: Any, valkey: Valkey) -> None:
    store = WorkerStore(redis, ttl_s=200)
    assert await store.register(worker("i1")) is Beat.NOTED
    assert await store.heartbeat(worker("i1", "job-1")) is Beat.NOTED
    valkey.client.hset("tided:{ctl}:worker:w9", mapping={"info": b"junk", "incarnation": "x"})
    valkey.client.zadd(keys.workers(), {"w9": 1})
    assert await store.list() == [worker("i1", "job-1")]
    assert 0 < valkey.client.pttl(keys.worker("w1")) <= 200_000  # type: ignore[operator]
    await store.remove(worker("i0"))
    assert await store.list() == [worker("i1", "job-1")]
    await store.remove(worker("i1"))
    assert await store.list() == []
    valkey.client.delete("tided:{ctl}:worker:w9")


async def test_a_worker_that_falls_silent_is_told_from_one_that_signs_off(redis: Any, valkey: Valkey) -> None:
    store = WorkerStore(redis, ttl_s=200)
    away = replace(worker("i1"), worker="away")
    for info in (worker("i1"), away, replace(worker("i1"), worker="gone")):
        await store.register(info)
    valkey.client.delete(keys.worker("gone"))
    await store.remove(away)
    assert await store.registry() == ([worker("i1")], ["gone"])


async def test_a_replaced_worker_hears_of_it(redis: Any) -> None:
    store = WorkerStore(redis)
    await store.register(worker("i1"))
    await store.register(worker("i2"))
    assert await store.heartbeat(worker("i1")) is Beat.REPLACED
    assert await store.list() == [worker("i2")]


async def test_a_worker_is_cordoned_by_the_newest_leader_only_and_until_it_is_uncordoned(
    redis: Any, valkey: Valkey
) -> None:
    store = WorkerStore(redis)
    valkey.client.set(keys.epoch(), 5)
    with pytest.raises(Superseded):
        await store.mark("w1", WorkerMark.CORDON, epoch=4)
    assert await store.register(worker("i1")) is Beat.NOTED
    await store.mark("w1", WorkerMark.CORDON, epoch=5)
    assert [(info.cordoned, info.draining) for info in await store.list()] == [(True, False)], (
        "before it has heard of it"
    )
    assert await store.heartbeat(worker("i1")) is Beat.CORDONED
    await store.mark("w1", WorkerMark.DRAIN, epoch=5)
    assert [(info.cordoned, info.draining) for info in await store.list()] == [(True, True)]
    assert await store.heartbeat(worker("i1")) is Beat.DRAIN
    assert await store.register(worker("i2")) is Beat.DRAIN, "a restart changes nothing"
    assert valkey.client.pttl(keys.cordon("w1")) == -1
    assert await store.marked("w1") is WorkerMark.DRAIN
    await store.mark("w1", WorkerMark.NONE, epoch=5)
    assert await store.marked("w1") is WorkerMark.NONE
    assert await store.heartbeat(worker("i2")) is Beat.NOTED


def event(number: int) -> Event:
    return Event("draft-swapped", number, "engine-a", "it serves another draft", {"number": number})


async def test_events_are_read_in_order_from_a_cursor_and_followed(redis: Any) -> None:
    store = EventStore(redis)
    assert await store.read() == []
    stored = [await store.append(event(n)) for n in range(5)]
    assert [e.at_ms for e in await store.read(limit=2)] == [0, 1]
    assert await store.read(stored[2].id) == stored[3:]
    assert await store.newest(2) == stored[3:]
    following = asyncio.ensure_future(store.read(stored[4].id, block_s=60))
    appended = await store.append(event(5))
    assert await following == [appended]
    assert await store.read(appended.id, block_s=0.05) == []


async def test_events_are_bounded(redis: Any, valkey: Valkey) -> None:
    store = EventStore(redis, maxlen=10)
    for n in range(400):
        await store.append(event(n))
    assert valkey.client.xlen(keys.events()) < 300  # type: ignore[operator]
    assert (await store.newest(1))[0].at_ms == 399


async def test_a_superseded_leader_tells_nothing(redis: Any, valkey: Valkey) -> None:
    store = EventStore(redis, maxlen=10)
    valkey.client.set(keys.epoch(), 7)
    told = await store.append(event(1), epoch=7)
    with pytest.raises(Superseded):
        await store.append(event(2), epoch=6)
    assert await store.read() == [told]
    for n in range(400):
        await store.append(event(n), epoch=7)
    assert valkey.client.xlen(keys.events()) < 300  # type: ignore[operator]
