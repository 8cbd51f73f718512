"""The publisher on a real server: what arrives, what waits for credit, what a dead Redis costs."""

import time
import tracemalloc
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from tests.conftest import Valkey
from tests.dataplane import CREDIT_BYTES, Producer, states_of, tokens_of
from tests.proxy import proxied
from tests.support import eventually
from tided.engine import link
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.model.engines import TapTotals
from tided.wire import keys
from tided.wire.samples import SampleHeader, check_payload, decode_header


def entries(client: redis.Redis) -> list[tuple[SampleHeader, bytes, int]]:
    """Header, payload and bytes of each entry; the checksums are verified."""
    found: list[tuple[SampleHeader, bytes, int]] = []
    for _, fields in cast("list[Any]", client.xrange(keys.samples("e1"))):
        header = decode_header(fields[b"h"])
        check_payload(header, fields[b"p"])
        found.append((header, fields[b"p"], len(fields[b"h"]) + len(fields[b"p"])))
    return found


def credit_reads(client: redis.Redis) -> int:
    """How often the publisher looked whether there is credit: nobody else reads a string key here."""
    return int(cast("Any", client.info("commandstats")).get("cmdstat_get", {"calls": 0})["calls"])


async def test_chunks_arrive_numbered_and_the_credit_counts_their_bytes(valkey: Valkey) -> None:
    producer = Producer.start(valkey.url)
    for i in range(20):
        producer.request(f"r{i:03d}")
    assert producer.close()
    found = entries(valkey.client)
    assert [header.seq for header, _, _ in found] == list(range(len(found)))
    assert sum(header.rows for header, _, _ in found) == len(producer.sent)
    assert int(cast("bytes", valkey.client.get(keys.credit("e1")))) == sum(size for _, _, size in found)
    assert found[-1][0].totals.tapped == len(producer.sent)
    assert producer.tap.totals() == TapTotals(tapped=len(producer.sent), sent=len(producer.sent))


async def test_without_credit_the_ring_fills_and_sheds_and_the_account_is_exact(valkey: Valkey) -> None:
    producer = Producer.start(valkey.url, slots=2)
    producer.tap.set_capture(True, 1)
    valkey.client.set(keys.credit("e1"), 1)
    capacity = producer.tap.settings.slot_rows
    tokens = tokens_of("big", 4 * capacity)
    producer.tap.begin("big", tokens[:5], False)
    producer.tap.record([("big", 0, len(tokens))], tokens, states_of(tokens))
    assert producer.tap.totals() == TapTotals(len(tokens), 0, 2 * capacity, 2 * capacity)
    assert entries(valkey.client) == []
    producer.tap.set_capture(True, CREDIT_BYTES)
    await eventually(lambda: producer.tap.totals().sent == 2 * capacity)
    producer.close()
    last = entries(valkey.client)[-1][0].totals
    assert last.tapped == len(tokens)
    assert last.shed == 2 * capacity
    assert producer.tap.totals() == TapTotals(len(tokens), 2 * capacity, 2 * capacity)


async def test_an_empty_stream_takes_one_chunk_whatever_the_credit(valkey: Valkey) -> None:
    producer = Producer.start(valkey.url)
    producer.tap.set_capture(True, 1)
    producer.request("one", step=12)  # one record, so that no flush can come between its rows
    await eventually(lambda: producer.tap.totals().sent == len(producer.sent))
    looked = credit_reads(valkey.client)
    producer.request("two")
    await eventually(lambda: credit_reads(valkey.client) > looked + 2)
    assert producer.tap.totals().ring > 0
    producer.publisher.close(0.05)


async def test_totals_that_changed_without_rows_are_told_too(valkey: Valkey) -> None:
    producer = Producer.start(valkey.url)
    producer.tap.begin("secret", [1, 2], True)
    producer.tap.record([("secret", 0, 4)], [1, 2, 3, 4], states_of([1, 2, 3, 4]))
    await eventually(lambda: entries(valkey.client))
    header = entries(valkey.client)[0][0]
    assert (header.rows, header.requests, header.totals.skipped) == (0, (), 4)
    producer.close()


async def test_a_chunk_whose_reply_was_lost_is_sent_again_under_the_same_number(valkey: Valkey, tmp_path: Path) -> None:
    with proxied(tmp_path, valkey.url) as proxy:
        producer = Producer.start(proxy.url)
        producer.request("one")
        await eventually(lambda: producer.tap.totals().ring == 0)
        proxy.mode = "mute"
        producer.request("two")
        # Both in the stream, and the reply to the second lost.
        await eventually(
            lambda: proxy.dropped and sum(h.rows for h, _, _ in entries(valkey.client)) == len(producer.sent)
        )
        proxy.mode = "forward"
        proxy.cut()
        await eventually(lambda: producer.tap.totals().ring == 0)
        assert producer.publisher.errors
        assert producer.close()
    numbers = [header.seq for header, _, _ in entries(valkey.client)]
    assert len(set(numbers)) < len(numbers)
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(max(numbers) + 1))
    assert sum({h.seq: h.rows for h, _, _ in entries(valkey.client)}.values()) == len(producer.sent)


async def test_a_dead_redis_never_holds_the_engine_up(valkey: Valkey, tmp_path: Path) -> None:
    with proxied(tmp_path, valkey.url) as proxy:
        producer = Producer.start(proxy.url, slots=2)
        proxy.mode = "refuse"
        proxy.cut()
        took_s: list[float] = []
        for i in range(300):
            started_s = time.perf_counter()
            producer.request(f"r{i:03d}", rows=200, step=200)
            took_s.append(time.perf_counter() - started_s)
        # A connection attempt or a command's timeout would take seconds, each time that the ring is full (84 times).
        assert sorted(took_s)[-40] < 0.5
        totals = producer.tap.totals()
        assert totals.tapped == len(producer.sent) == totals.sent + totals.shed + totals.ring
        assert totals.shed > 0
        proxy.mode = "forward"
        await eventually(lambda: producer.tap.totals().ring == 0)
        assert producer.close()
        totals = producer.tap.totals()
    assert (
        sum({h.seq: h.rows for h, _, _ in entries(valkey.client)}.values())
        == totals.sent
        == totals.tapped - totals.shed
    )


async def test_closing_without_redis_ends_in_time_and_counts_the_rest_as_shed(tmp_path: Path) -> None:
    producer = Producer.start(f"unix://{tmp_path / 'none.sock'}")
    producer.request("one")
    started_s = time.monotonic()
    assert producer.publisher.close(0.3) is False
    assert time.monotonic() - started_s < 20.0
    totals = producer.tap.totals()
    assert (totals.sent, totals.ring, totals.shed) == (0, 0, len(producer.sent))


def test_the_payload_goes_to_the_socket_uncopied(valkey: Valkey) -> None:
    """The packer argument is semi-private in redis-py: should it stop to work, this fails."""
    size = 8 << 20
    payload = memoryview(bytearray(size))
    client = link.connect(valkey.url)
    client.ping()
    tracemalloc.start()
    client.xadd("probe", {"h": b"h", "p": cast("Any", payload)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert client.xrange("probe")[0][1][b"p"] == payload  # pyright: ignore
    client.delete("probe")
    client.close()
    assert peak < size // 8


def test_a_command_is_never_repeated_by_the_client(valkey: Valkey) -> None:
    client = link.connect(valkey.url)
    client.ping()
    connection = cast("Any", client.connection_pool.get_connection())
    assert connection.retry.get_retries() == 0


@pytest.mark.parametrize("states", [3, 4])
async def test_real_row_sizes_fill_chunks_of_the_wire_size(valkey: Valkey, states: int) -> None:
    import torch

    tap = Tap(TapSettings("e1", "i-1", "ab" * 32, states=states, hidden=576, has_last=states == 4, ring_slots=4))
    tap.set_capture(True, CREDIT_BYTES)
    publisher = Publisher(valkey.url, tap)
    publisher.start()
    rows = torch.randn(700, states, 576)
    tap.begin("a", [1], False)
    tap.record([("a", 0, 700)], range(700), rows)
    assert publisher.close(60.0)
    sent = b"".join(payload for _, payload, _ in entries(valkey.client))
    assert sent == rows.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
