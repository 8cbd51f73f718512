"""One engine's collector in this process on a real Valkey: doubles, poison, losses, dead producers, a full disk, cancelled reads."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import msgpack
import pytest
import redis.asyncio

from tests.conftest import Valkey
from tests.dataplane import Producer, producing, states_of, store_at, stored_rows, stored_runs, tokens_of
from tests.support import eventually
from tests.test_agent import FakeEngine
from tests.test_samples import full_disk
from tided.model.errors import Unavailable
from tided.model.status import SampleTotals
from tided.services import collector, engine_collector
from tided.services.assembly import Limits
from tided.services.collector import Collector
from tided.services.engine_collector import MAX_DELIVERIES, CollectorSettings, EngineCollector
from tided.store.client import connect, connect_blocking
from tided.store.ledger import read_ledger
from tided.store.pressing import press
from tided.wire import keys
from tided.wire.control import encode
from tided.wire.samples import decode_header

STREAM = keys.samples("e1")
LIMITS = Limits(shard_rows=4096, shard_age_s=0.02, hold_s=60.0)


@asynccontextmanager
async def collecting(url: str, root: Path, limits: Limits = LIMITS) -> AsyncGenerator[EngineCollector]:
    """A collector of engine e1 that drains when the block ends."""
    one = EngineCollector("e1", CollectorSettings(url, limits), store_at(root))
    stopping = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.run, stopping)
        try:
            yield one
        finally:
            stopping.set()


@pytest.fixture
async def client(valkey: Valkey) -> AsyncGenerator[redis.asyncio.Redis]:
    async with connect(valkey.url) as found:
        yield found


@pytest.fixture
def fast_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (collector, engine_collector):
        monkeypatch.setattr(module, "UPKEEP_S", 0.05)
    monkeypatch.setattr(engine_collector, "BLOCK_S", 0.05)


def packed(plain: dict[str, Any]) -> bytes:
    return cast("bytes", msgpack.packb(plain))


async def settled(client: redis.asyncio.Redis, **expected: int) -> SampleTotals:
    """The ledger once it has the expected counts and nothing waits in the stream."""

    async def look() -> SampleTotals | None:
        totals = await read_ledger(client, "e1")
        return totals if all(getattr(totals, name) == n for name, n in expected.items()) else None

    found = await eventually(look)
    assert found.tapped == found.stored + found.shed + found.lost + found.unknown + found.in_flight
    return found


async def sent_entries(client: redis.asyncio.Redis, producer: Producer) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The stream once all that the producer has said is in it: its rows and its requests' ends, which may come a chunk later."""

    async def said() -> list[Any]:
        entries = cast("list[Any]", await client.xrange(STREAM))
        ends = [end for _, fields in entries if fields[b"h"][:1] != b"\xc1" for end in decode_header(fields[b"h"]).ends]
        return entries if len(ends) == producer.ended and producer.tap.totals().ring == 0 else []

    return await eventually(said)


async def test_a_double_is_dropped_and_counted(valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis) -> None:
    with producing(valkey.url) as producer:
        producer.request("one")
        entries = await sent_entries(client, producer)
        for _, fields in entries:
            await client.xadd(STREAM, cast("Any", fields))
            await client.incrby(keys.credit("e1"), sum(len(value) for value in fields.values()))
        async with collecting(valkey.url, tmp_path):
            totals = await settled(client, stored=12, duplicated=12, in_flight=0)
            for _, fields in entries:  # and once more, when the first is long stored
                await client.xadd(STREAM, cast("Any", fields))
            totals = await settled(client, stored=12, duplicated=24)
    assert totals.stream_bytes == 0
    assert sorted(stored_rows(tmp_path)) == sorted(producer.sent)


async def test_exactly_the_poison_entry_is_set_aside(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        producer.request("one")
        await sent_entries(client, producer)
        await client.xadd(STREAM, {"h": b"\xc1 secret prompt", "p": b"payload"})
        await client.incrby(keys.credit("e1"), 22)
        producer.request("two")
        async with collecting(valkey.url, tmp_path):
            totals = await settled(client, stored=24, dead=1)
    (dead,) = cast("list[Any]", await client.xrange(keys.dead("e1")))
    assert b"msgpack" in dead[1][b"reason"]
    assert b"secret" not in b"".join(dead[1].values())
    assert totals.stream_bytes == 0
    assert sorted(stored_rows(tmp_path)) == sorted(producer.sent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": 2}, "schema version"),
        ({"zstd": True}, "unknown field"),
        ({"engine": "e2"}, "another engine"),
        ({"crc32": 1}, "checksum"),
    ],
)
async def test_what_does_not_fit_is_refused_beside_what_does(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis, change: dict[str, Any], words: str
) -> None:
    with producing(valkey.url) as producer:
        producer.request("one")
        entries = await sent_entries(client, producer)
        plain = {**msgpack.unpackb(entries[0][1][b"h"]), "seq": 1000, **change}
        await client.xadd(STREAM, {"h": packed(plain), "p": entries[0][1][b"p"]})
        async with collecting(valkey.url, tmp_path):
            await settled(client, stored=12, dead=1)
    (dead,) = cast("list[Any]", await client.xrange(keys.dead("e1")))
    assert words in dead[1][b"reason"].decode()


async def test_an_entry_that_kills_its_readers_is_set_aside_after_n_deliveries(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        for name in ("one", "two", "three"):
            producer.request(name)
            entries = await sent_entries(client, producer)
        await client.xgroup_create(STREAM, keys.SAMPLES_GROUP, id="0")
        await client.xreadgroup(keys.SAMPLES_GROUP, "collector", {STREAM: ">"})
        toxic = entries[1][0]
        await client.xclaim(STREAM, keys.SAMPLES_GROUP, "collector", 0, [toxic], retrycount=MAX_DELIVERIES)
        rows = decode_header(entries[1][1][b"h"]).rows
        async with collecting(valkey.url, tmp_path):
            await settled(client, stored=36 - rows, dead=1, lost=rows)
    (dead,) = cast("list[Any]", await client.xrange(keys.dead("e1")))
    assert dead[1][b"entry"] == toxic


async def test_a_cancelled_read_loses_nothing(valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis) -> None:
    await client.xgroup_create(STREAM, keys.SAMPLES_GROUP, id="0", mkstream=True)
    reader = connect_blocking(valkey.url, 10.0)
    read = asyncio.ensure_future(reader.xreadgroup(keys.SAMPLES_GROUP, "collector", {STREAM: ">"}, block=10_000))
    await eventually(lambda: valkey.client.info("clients")["blocked_clients"] == 1)  # pyright: ignore
    with producing(valkey.url) as producer:
        producer.request("one")
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        await reader.aclose()
        async with collecting(valkey.url, tmp_path):
            await settled(client, stored=12, in_flight=0, lost=0)
    assert sorted(stored_rows(tmp_path)) == sorted(producer.sent)


async def test_entries_of_a_dead_collector_are_claimed(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_collector, "CLAIM_IDLE_S", 0.0)
    with producing(valkey.url) as producer:
        producer.request("one")
        await sent_entries(client, producer)
        await client.xgroup_create(STREAM, keys.SAMPLES_GROUP, id="0")
        await client.xreadgroup(keys.SAMPLES_GROUP, "another", {STREAM: ">"})
        async with collecting(valkey.url, tmp_path):
            await settled(client, stored=12, in_flight=0)


@pytest.mark.usefixtures("fast_upkeep")
async def test_what_was_trimmed_is_counted_lost_exactly(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        for name in ("one", "two", "three"):
            producer.request(name)
            entries = await sent_entries(client, producer)
        await client.xgroup_create(STREAM, keys.SAMPLES_GROUP, id="0")
        await client.xreadgroup(keys.SAMPLES_GROUP, "collector", {STREAM: ">"}, count=1)
        lost = {
            entries[0][0]: decode_header(entries[0][1][b"h"]).rows,
            entries[1][0]: decode_header(entries[1][1][b"h"]).rows,
        }
        await client.xdel(STREAM, *lost)  # one that was pending, one that was never read
        async with collecting(valkey.url, tmp_path):
            totals = await settled(client, lost=sum(lost.values()), stored=36 - sum(lost.values()), in_flight=0)
            await eventually(lambda: valkey.client.get(keys.credit("e1")) == b"0")
            assert totals.duplicated == 0
            assert await client.xpending(STREAM, keys.SAMPLES_GROUP) is not None


@pytest.mark.usefixtures("fast_upkeep")
async def test_a_killed_producers_tail_is_unknown(valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis) -> None:
    producer = Producer.start(valkey.url)
    producer.request("one")
    await sent_entries(client, producer)
    # A chunk that says five more rows were in the ring than ever arrived: what a kill -9 leaves.
    producer.tap._tapped += 5  # pyright: ignore[reportPrivateUsage]
    producer.request("two")
    await eventually(lambda: producer.tap.totals().ring == 5)
    async with collecting(valkey.url, tmp_path):
        await settled(client, stored=24, in_flight=5, unknown=0)
        engine = FakeEngine()
        await client.set(keys.info("e1"), encode(engine.info()), ex=60)  # the same incarnation: it may still send them
        await settled(client, stored=24, in_flight=5, unknown=0)
        successor = msgpack.unpackb(encode(engine.info()))
        await client.set(keys.info("e1"), packed({**successor, "incarnation": "i-2"}), ex=60)
        await settled(client, stored=24, in_flight=0, unknown=5)
        producer.tap._tapped -= 5  # pyright: ignore[reportPrivateUsage]
        tokens = tokens_of("six", 7)
        producer.tap.begin("six", tokens[:2], False)
        producer.rows("six", tokens, 0, 5)
        await settled(client, stored=29, unknown=0, in_flight=0)  # it was not dead after all
    producer.close()


async def test_two_incarnations_add_up(valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis) -> None:
    async with collecting(valkey.url, tmp_path):
        for incarnation in ("i-1", "i-2"):
            with producing(valkey.url, incarnation) as producer:
                producer.request("one")
        await settled(client, tapped=24, stored=24, in_flight=0, duplicated=0)
    assert [(run.request, run.rows) for run in stored_runs(tmp_path)] == [("one", 12), ("one", 12)]


async def test_shed_and_opted_out_rows_are_in_the_ledger(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    producer = Producer.start(valkey.url, slots=2)
    await client.set(keys.credit("e1"), 1 << 40)  # no credit: the ring fills
    capacity = producer.tap.settings.slot_rows
    producer.request("big", rows=3 * capacity, step=3 * capacity)
    producer.tap.begin("secret", [1], True)
    producer.tap.record([("secret", 0, 3)], [1, 2, 3], states_of([1, 2, 3]))
    await client.delete(keys.credit("e1"))
    async with collecting(valkey.url, tmp_path, Limits(4096, 0.02, hold_s=0.05)):
        totals = await settled(client, tapped=3 * capacity, stored=2 * capacity, shed=capacity, skipped=3, in_flight=0)
    producer.close()
    assert totals.lost == 0


async def test_a_full_disk_acknowledges_nothing_and_recovers(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        async with collecting(valkey.url, tmp_path):
            await eventually(lambda: valkey.client.exists(STREAM))
            with full_disk():
                producer.request("one")
                entries = await sent_entries(client, producer)
                pending = cast("Any", await eventually(lambda: valkey.client.xpending(STREAM, keys.SAMPLES_GROUP)))
                await eventually(lambda: valkey.client.xpending(STREAM, keys.SAMPLES_GROUP)["pending"] == len(entries))  # pyright: ignore
                assert pending is not None
                assert (await read_ledger(client, "e1")).stored == 0
            await settled(client, stored=12, in_flight=0, duplicated=0)
    assert sorted(stored_rows(tmp_path)) == sorted(producer.sent)


async def test_redis_that_loses_its_data_is_collected_from_again(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        async with collecting(valkey.url, tmp_path):
            producer.request("one")
            await settled(client, stored=12)
            await client.flushall()
            producer.request("two")
            await settled(client, stored=12)
    assert sorted(stored_rows(tmp_path)) == sorted(producer.sent)


async def test_engines_are_found_by_heartbeat_and_by_what_they_left(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        producer.request("one")
        await sent_entries(client, producer)
    stopping = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Collector(CollectorSettings(valkey.url, LIMITS), store_at(tmp_path)).run, stopping)
        await settled(client, stored=12)
        stopping.set()


async def test_draining_stores_what_is_held(valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis) -> None:
    with producing(valkey.url) as producer:
        tokens = tokens_of("open", 10)
        async with collecting(valkey.url, tmp_path, Limits(10**6, 1000.0)) as one:
            producer.tap.begin("open", tokens[:2], False)
            producer.rows("open", tokens, 0, 10)
            await eventually(lambda: one._assembly.held_bytes > 0)  # pyright: ignore[reportPrivateUsage]
            assert (await read_ledger(client, "e1")).stored == 0
    await settled(client, stored=10, in_flight=0)
    assert sorted(stored_rows(tmp_path)) == sorted(producer.sent)


async def test_while_a_question_waits_shards_are_closed_soon(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        async with collecting(valkey.url, tmp_path, Limits(10**6, 1000.0, pressed_age_s=0.01)) as one:
            producer.request("a", rows=12)
            await eventually(lambda: one._assembly.held_bytes > 0)  # pyright: ignore[reportPrivateUsage]
            assert (await read_ledger(client, "e1")).stored == 0
            await press(client, "e1")
            await settled(client, stored=12, in_flight=0)


async def test_requests_are_whole_runs_on_their_side_of_the_split(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis
) -> None:
    with producing(valkey.url) as producer:
        async with collecting(valkey.url, tmp_path):
            for i in range(30):
                producer.request(f"r{i:03d}", rows=12)
            await settled(client, stored=360, in_flight=0)
    runs = stored_runs(tmp_path)
    assert {(run.first_position, run.rows, len(run.ids)) for run in runs} == {(0, 12, 14)}
    assert all(list(run.ids) == tokens_of(run.request, 14) for run in runs)
    assert {run.held_out for run in runs} == {True, False}


async def test_it_reads_on_while_a_commit_is_written(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes its time: what comes meanwhile is delivered already, and what is stored in the end is all of it, once."""
    go_on = threading.Event()
    async with collecting(valkey.url, tmp_path / "samples") as one:
        store = one._store  # pyright: ignore[reportPrivateUsage]
        commit, begun = store.commit, list[int]()

        def slow(*arguments: Any) -> Any:
            begun.append(1)
            assert go_on.wait(60)
            return commit(*arguments)

        monkeypatch.setattr(store, "commit", slow)
        with producing(valkey.url) as producer:
            producer.request("r1")
            await eventually(lambda: len(begun))
            producer.request("r2")

            async def delivered() -> bool:
                return (await client.xpending(STREAM, keys.SAMPLES_GROUP))["pending"] >= 2

            await eventually(delivered)
            assert len(begun) == 1
            go_on.set()
            await settled(client, stored=24)
    assert sorted(stored_rows(tmp_path / "samples")) == sorted(producer.sent)


async def test_what_was_read_ahead_of_a_failed_commit_is_not_lost(
    valkey: Valkey, tmp_path: Path, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = threading.Event()
    async with collecting(valkey.url, tmp_path / "samples") as one:
        store = one._store  # pyright: ignore[reportPrivateUsage]
        commit, tries = store.commit, list[int]()

        def failing(*arguments: Any) -> Any:
            tries.append(1)
            if len(tries) == 1:
                assert fail.wait(60)
                raise Unavailable("the disk is full")
            return commit(*arguments)

        monkeypatch.setattr(store, "commit", failing)
        with producing(valkey.url) as producer:
            producer.request("r1")
            await eventually(lambda: len(tries))
            producer.request("r2")

            async def delivered() -> bool:
                return (await client.xpending(STREAM, keys.SAMPLES_GROUP))["pending"] >= 2

            await eventually(delivered)
            fail.set()
            await settled(client, stored=24)
    assert sorted(stored_rows(tmp_path / "samples")) == sorted(producer.sent)
