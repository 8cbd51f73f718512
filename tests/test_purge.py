"""`tidectl purge` reaches what waits in the stream, what the collector holds and what is on disk, and every row stays accounted for."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio

from tests.conftest import Valkey
from tests.control import leading, settings
from tests.dataplane import Producer, collector_process, producing, store_at, stored_rows, tokens_of
from tests.support import eventually
from tided.model.errors import Refused
from tided.model.status import SampleTotals
from tided.services import plane
from tided.store import purge
from tided.store.client import connect
from tided.store.ledger import read_ledger
from tided.wire import keys

pytestmark = pytest.mark.real

HOLDING = "[samples]\nheld_out_fraction = 0.3\nshard_age_s = 3600\n"
"""A collector that keeps what it has read."""


@pytest.fixture
async def client(valkey: Valkey) -> AsyncIterator[redis.asyncio.Redis]:
    connected = connect(valkey.url)
    yield connected
    await connected.aclose()


async def sent(producer: Producer) -> None:
    """All that the producer has recorded is in the stream."""

    def out() -> bool:
        totals = producer.tap.totals()
        return totals.ring == 0 and totals.sent == len(producer.sent)

    await eventually(out)


async def settled(client: redis.asyncio.Redis, **counts: int) -> SampleTotals:
    """The ledger once it has these counts, with nothing waiting and nothing marked."""

    async def look() -> SampleTotals | None:
        totals = await read_ledger(client, "e1")
        over = await client.xlen(keys.samples("e1")) == 0 and not await purge.marked(client, "e1")
        return totals if over and all(getattr(totals, name) == n for name, n in counts.items()) else None

    return await eventually(look)


async def test_what_waits_is_discarded_and_what_comes_later_is_stored(
    valkey: Valkey, client: redis.asyncio.Redis, tmp_path: Path
) -> None:
    """Nobody collects when the purge is asked for; one request goes on beyond it."""
    root = tmp_path / "samples"
    with producing(valkey.url) as producer:
        for i in range(5):
            producer.request(f"early-{i}", rows=12)
        tokens = tokens_of("across", 14)
        producer.tap.begin("across", tokens[:5], False)
        producer.rows("across", tokens, 0, 8)
        await sent(producer)
        await purge.mark(client, "e1")
        producer.rows("across", tokens, 8, 4)
        producer.tap.end("across", "stop", tokens[12:])
        producer.request("late", rows=12)
        await sent(producer)
        with collector_process(valkey.url, root):
            totals = await settled(client, purged=68, stored=16)
            await eventually(lambda: len(stored_rows(root)) == 16)
    assert (totals.tapped, totals.lost, totals.unknown, totals.in_flight, totals.stream_bytes) == (84, 0, 0, 0, 0)
    assert {(request, position) for request, position, _ in stored_rows(root)} == {
        *(("late", i) for i in range(12)),
        *(("across", i) for i in range(8, 12)),
    }
    assert store_at(root).ledger().stored == 16


@pytest.mark.parametrize("failpoint", ["collector.purging", "collector.committed", "collector.acknowledged"])
async def test_kill_9_in_the_middle_of_it(
    failpoint: str, valkey: Valkey, client: redis.asyncio.Redis, tmp_path: Path
) -> None:
    """Before the mark is taken up or after: whatever had become durable goes too, and nothing counts twice."""
    root = tmp_path / "samples"
    with producing(valkey.url) as producer:
        for i in range(8):
            producer.request(f"r{i}", rows=12)
        await sent(producer)
        if failpoint == "collector.purging":
            await purge.mark(client, "e1")
        with collector_process(valkey.url, root, failpoint) as process:
            await eventually(lambda: process.poll() is not None)
            assert process.returncode == -signal.SIGKILL
        await purge.mark(client, "e1")
        with collector_process(valkey.url, root):
            totals = await settled(client, in_flight=0)
            ledger = store_at(root).ledger()
    assert totals.tapped == 96 == totals.stored + totals.purged
    assert (totals.lost, totals.unknown, totals.duplicated) == (0, 0, 0)
    assert (ledger.stored, ledger.purged) == (totals.stored, totals.stored)
    assert stored_rows(root) == []


async def test_the_leader_purges_disk_and_stream_and_says_how_much(
    valkey: Valkey, client: redis.asyncio.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, tmp_path / "none")
    root = config.samples_dir
    async with leading(valkey, config) as control:
        with producing(valkey.url) as producer:
            producer.request("stored", rows=12)
            with collector_process(valkey.url, root):
                await eventually(lambda: len(stored_rows(root)) == 12)
            producer.request("waiting", rows=12)
            await sent(producer)
            monkeypatch.setattr(plane, "PURGE_WAIT_S", 0.0)
            alone = await control.plane.purge(None, "uid:0")
            assert (alone["rows"], alone["shards"]) == (12, 1)
            assert alone["waiting_bytes"] > 0, "nobody collects: it goes once somebody does"
            monkeypatch.setattr(plane, "PURGE_WAIT_S", 60.0)
            with collector_process(valkey.url, root, config=HOLDING):
                await settled(client, purged=12)
                producer.request("held", rows=12)
                await sent(producer)
                done = await control.plane.purge("e1", "uid:0")
            assert (done["rows"], done["waiting_bytes"]) == (12, 0)
            with pytest.raises(Refused):
                await control.plane.purge("no such name", "uid:0")
    totals, ledger = await read_ledger(client, "e1"), store_at(root).ledger()
    assert (totals.stored, totals.purged, totals.in_flight, totals.lost) == (12, 24, 0, 0)
    assert (ledger.stored, ledger.purged) == (12, 12)
    assert stored_rows(root) == []
