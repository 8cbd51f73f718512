"""The data plane end to end: tap -> publisher -> Valkey -> collector -> shard on disk, against memcpy in the same run.

    python -m bench.dataplane [--turns 5] [--megabytes 256]

Three processes as in production: this one is the producer (rows of gpt-oss-120b's size), Valkey runs with its append-only file,
tided-collector writes fsynced shards. A turn ends when the last row is acknowledged. On a busy machine CPU seconds a GB are the
stable figure; MB/s are what this machine gives with all three on its cores. Nothing is shed: the producer waits for the ring.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.report import Claim, at_most, publish
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.store.client import closing, connect
from tided.store.ledger import read_ledger
from tided.store.samples import SampleStore, Split
from tided.store.valkey import EmbeddedValkey

TARGET = "00" * 32
STATES, HIDDEN = 3, 2880
REQUEST_ROWS, STEP_ROWS = 600, 60
CREDIT_BYTES = 128 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    megabytes_s: float
    memcpy_megabytes_s: float
    producer_s_gb: float
    server_s_gb: float
    collector_s_gb: float


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memcpy_megabytes_s(size: int) -> float:
    """Speed of one core that copies blocks of a chunk's size between two large buffers."""
    source, sink = np.ones(size, np.uint8), np.ones(size, np.uint8)
    started_s = time.perf_counter()
    for at in range(0, size, 1 << 20):
        sink[at : at + (1 << 20)] = source[at : at + (1 << 20)]
    return size / 1e6 / (time.perf_counter() - started_s)


def send(tap: Tap, requests: range) -> None:
    """Record whole requests as fast as the ring takes them."""
    rows = torch.randn(STEP_ROWS, STATES, HIDDEN).to(torch.bfloat16)
    ids = list(range(STEP_ROWS))
    room = (tap.settings.ring_slots - 2) * tap.settings.slot_rows
    for number in requests:
        name = f"r{number}"
        tap.begin(name, [number, number >> 16], False)
        for at in range(0, REQUEST_ROWS, STEP_ROWS):
            while tap.totals().ring > room:
                time.sleep(0.0005)
            tap.record([(name, at, STEP_ROWS)], ids, rows)
        tap.end(name, "stop", [1, 2])


def record_us(tap: Tap, calls: int = 2000, batch: int = 8) -> float:
    """Median microseconds of one `record` of a decode step: `batch` requests, two accepted rows each."""
    for i in range(batch):
        tap.begin(f"d{i}", [i], False)
    rows = torch.randn(2 * batch, STATES, HIDDEN).to(torch.bfloat16)
    ids = list(range(2 * batch))
    took: list[float] = []
    for call in range(calls):
        segments = [(f"d{i}", 2 * call, 2) for i in range(batch)]
        started_s = time.perf_counter()
        tap.record(segments, ids, rows)
        took.append(time.perf_counter() - started_s)
        while tap.totals().ring > tap.settings.slot_rows:
            time.sleep(0.0005)
    for i in range(batch):
        tap.end(f"d{i}", "stop", [])
    return statistics.median(took) * 1e6


async def stored(url: str, rows: int) -> None:
    """Return when `rows` rows are acknowledged. Raises if any was lost, shed or doubled."""
    async with closing(connect(url)) as client:
        while (totals := await read_ledger(client, "bench")).stored < rows:  # noqa: ASYNC110 - a counter in Redis
            await asyncio.sleep(0.005)
    if (totals.stored, totals.shed, totals.lost, totals.duplicated) != (rows, 0, 0, 0):
        raise RuntimeError(f"the account is wrong: {totals}")


def start_collector(directory: Path, url: str) -> subprocess.Popen[bytes]:
    config = directory / "config.toml"
    config.write_text(f"[capture]\ncredit_bytes = {CREDIT_BYTES}\n[samples]\nshard_age_s = 0.2\n")
    command = [sys.executable, "-m", "tided.services.collector", "--config", str(config)]
    return subprocess.Popen([*command, "--redis", url, "--root", str(directory / "samples")])


async def measure(turns: int, megabytes: int) -> tuple[list[Turn], float]:
    """The turns, and the microseconds of one `record`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tided-bench-") as name:
        directory = Path(name)
        server = EmbeddedValkey(directory / "valkey", 1 << 30)
        await server.start()
        collector = start_collector(directory, server.url)
        tap = Tap(TapSettings("bench", "i-1", TARGET, STATES, HIDDEN, ring_slots=32))
        tap.set_capture(True, CREDIT_BYTES)
        publisher = Publisher(server.url, tap)
        publisher.start()
        store = SampleStore(directory / "samples", 0.15, 1 << 40, 86400)
        found: list[Turn] = []
        try:
            send(tap, range(10))  # the collector is up and has found the engine
            await stored(server.url, 10 * REQUEST_ROWS)
            each = max(megabytes * 1_000_000 // (REQUEST_ROWS * tap.settings.row_bytes), 1)
            for turn in range(turns):
                first = 10 + turn * each
                pids = (os.getpid(), server.pid, collector.pid)
                memcpy = memcpy_megabytes_s(256 << 20)
                before = [cpu_s(pid) for pid in pids]
                started_s = time.perf_counter()
                await asyncio.to_thread(send, tap, range(first, first + each))
                await stored(server.url, (first + each) * REQUEST_ROWS)
                took_s = time.perf_counter() - started_s
                size_mb = each * REQUEST_ROWS * tap.settings.row_bytes / 1e6
                cpu = [(after - was) / (size_mb / 1000) for after, was in zip(map(cpu_s, pids), before, strict=True)]
                found.append(Turn(size_mb / took_s, memcpy, *cpu))
                store.consume([shard.path for shard in store.shards(Split.TRAIN)])
            record = await asyncio.to_thread(record_us, tap)
        finally:
            publisher.close()
            collector.terminate()
            collector.wait(20)
            await server.stop()
    return found, record


def claims_of(turns: Sequence[Turn], record: float) -> list[Claim]:
    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    speed = [turn.megabytes_s for turn in turns]
    ratio = [turn.megabytes_s / turn.memcpy_megabytes_s for turn in turns]
    claims = [
        Claim("dataplane.mb_s", "tap to fsynced shard, one engine", median(speed), "MB/s", runs=speed),
        Claim("dataplane.memcpy_ratio", "the same against memcpy in the same run", median(ratio), runs=ratio),
    ]
    for part in ("producer", "server", "collector"):
        runs = [getattr(turn, f"{part}_s_gb") for turn in turns]
        claims.append(Claim(f"dataplane.{part}_cpu", f"CPU of the {part}", median(runs), "s/GB", runs=runs))
    claims.append(
        at_most("dataplane.record_us", "one record(): batch 8, two rows of 17,280 B each", round(record, 1), 200, "us")
    )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description="The data plane end to end, against memcpy.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    options = parser.parse_args()
    publish("dataplane", claims_of(*asyncio.run(measure(options.turns, options.megabytes))))


if __name__ == "__main__":
    main()
