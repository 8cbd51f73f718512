"""Promises 1, 2 and 12 of the data plane with real processes: kill -9 anywhere, then everything that was sent is stored once."""

import signal
from pathlib import Path

import pytest
import redis.asyncio

from tests.conftest import Valkey
from tests.dataplane import Producer, collector_process, producing, stored_rows
from tests.support import eventually
from tided.model.status import SampleTotals
from tided.store.client import connect
from tided.store.ledger import read_ledger
from tided.wire import keys


async def drained(client: redis.asyncio.Redis, tapped: int) -> SampleTotals:
    """The ledger, once all `tapped` rows are accounted for and nothing is in flight."""

    async def look() -> SampleTotals | None:
        totals = await read_ledger(client, "e1")
        return (
            totals
            if totals.tapped == tapped and totals.in_flight == 0 and await client.xlen(keys.samples("e1")) == 0
            else None
        )

    return await eventually(look)


def send(producer: Producer, first: int, count: int) -> None:
    for i in range(first, first + count):
        producer.request(f"r{i:03d}", prompt=5, rows=9 + i % 7)


async def test_what_was_sent_is_stored_and_the_ledger_adds_up(valkey: Valkey, tmp_path: Path) -> None:
    root, client = tmp_path / "samples", connect(valkey.url)
    with producing(valkey.url) as producer, collector_process(valkey.url, root) as process:
        send(producer, 0, 40)
        totals = await drained(client, len(producer.sent))
        assert (totals.stored, totals.shed, totals.lost, totals.duplicated) == (len(producer.sent), 0, 0, 0)
        await eventually(lambda: len(stored_rows(root)) == len(producer.sent))
        assert set(stored_rows(root)) == producer.sent
        assert totals.stream_bytes == 0
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: process.poll() is not None)
        assert process.returncode == 0
    await client.aclose()


@pytest.mark.parametrize(
    "failpoint",
    [
        "collector.read",
        "collector.admitted",
        "samples.staged",
        "collector.committed",
        "collector.acknowledged",
        "samples.publishing",
    ],
)
async def test_kill_9_at_every_failpoint_loses_nothing_and_stores_nothing_twice(
    valkey: Valkey, tmp_path: Path, failpoint: str
) -> None:
    root, client = tmp_path / "samples", connect(valkey.url)
    with producing(valkey.url) as producer:
        send(producer, 0, 30)
        for _ in range(2):
            with collector_process(valkey.url, root, failpoint) as process:
                await eventually(lambda: process.poll() is not None)
                assert process.returncode == -signal.SIGKILL
            send(producer, len(producer.sent), 10)
        with collector_process(valkey.url, root):
            totals = await drained(client, len(producer.sent))
            await eventually(lambda: len(stored_rows(root)) >= len(producer.sent))
            assert sorted(stored_rows(root)) == sorted(producer.sent)
            assert (totals.stored, totals.lost, totals.duplicated, totals.unknown) == (len(producer.sent), 0, 0, 0)
    await client.aclose()
