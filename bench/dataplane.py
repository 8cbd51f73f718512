"""The data plane end to end: tap -> publisher -> Valkey -> collector -> shard on disk, against memcpy in the same run.

    python -m bench.dataplane [one|two|volatile|ring ...] [--turns 5] [--megabytes 2048]

Processes as in production: this one is the producer (rows of gpt-oss-120b's size), Valkey, and a collector that writes fsynced shards. A
turn ends when the last row is acknowledged, and is so long that what its last shard waits for (more rows, then the disk) hardly counts.
Arms take turns. Nothing is shed: the producer waits for the tap's ring.

    one       one engine, one Valkey with its append-only file, one tided-collector
    two       two of each, every engine with a Valkey and a collector of its own, which share this machine
    volatile  as `one`, the append-only file off: what waits in the stream dies with the server, and is counted as lost
    ring      as `volatile`, payloads through shared memory (`bench.ring`, a prototype)

On a busy machine CPU seconds a GB are the stable figure; MB/s are what this machine gives with all processes on its cores.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.report import Claim, Interval, at_most, interval, median, one_of, paired_ratio, publish
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.store.client import closing, connect
from tided.store.ledger import read_ledger
from tided.store.samples import SampleStore
from tided.store.valkey import EmbeddedValkey

TARGET = "00" * 32
STATES, HIDDEN = 3, 2880
REQUEST_ROWS, STEP_ROWS = 600, 60
CREDIT_BYTES = 128 << 20
SHARD_AGE_S = 0.2
ENGINE = "bench"
ARMS = {"one": 1, "two": 2, "volatile": 1, "ring": 1}
"""Engines of each, with as many servers and collectors."""
WHAT = {
    "one": "tap to fsynced shard",
    "two": "two Redis shards and two collectors",
    "volatile": "without the append-only file",
    "ring": "payloads through shared memory",
}
GOAL_MB_S, GOAL_MEMCPY = 500.0, 0.11
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
        while (totals := await read_ledger(client, ENGINE)).stored < rows:  # noqa: ASYNC110 - a counter in Redis
            await asyncio.sleep(0.005)
    if (totals.stored, totals.shed, totals.lost, totals.duplicated) != (rows, 0, 0, 0):
        raise RuntimeError(f"the account is wrong: {totals}")


def start_collector(directory: Path, url: str, ring: Path | None) -> subprocess.Popen[bytes]:
    config = directory / "config.toml"
    config.write_text(f"[capture]\ncredit_bytes = {CREDIT_BYTES}\n[samples]\nshard_age_s = {SHARD_AGE_S}\n")
    module = (
        ["tided.services.collector", "--config", str(config)] if ring is None else ["bench.ring", "--ring", str(ring)]
    )
    command = [sys.executable, "-m", *module, "--redis", url, "--root", str(directory / "samples")]
    return subprocess.Popen(command)


class Lane:
    """One engine with its Valkey and its collector."""

    def __init__(self, directory: Path, arm: str) -> None:
        self._directory, self._arm = directory, arm
        self._sent = 0
        self.server = EmbeddedValkey(directory / "valkey", 1 << 30)
        self.tap = Tap(TapSettings(ENGINE, "i-1", TARGET, STATES, HIDDEN, ring_slots=32))
        self._ring = Path(tempfile.mkdtemp(prefix="tided-ring-", dir="/dev/shm")) / "ring" if arm == "ring" else None

    async def start(self) -> None:
        await self.server.start()
        if self._arm in ("volatile", "ring"):
            async with closing(connect(self.server.url)) as client:
                await client.config_set("appendonly", "no")
        self.tap.set_capture(True, CREDIT_BYTES)
        if self._ring is None:
            self._publisher = Publisher(self.server.url, self.tap)
        else:
            from bench.ring import Ring, RingPublisher  # here, for it builds on this module

            self._publisher = RingPublisher(self.server.url, self.tap, Ring(self._ring))
        self.collector = start_collector(self._directory, self.server.url, self._ring)
        self._store = SampleStore(self._directory / "samples", 0.15, 1 << 40, 86400)
        self._publisher.start()
        await self.carry(10)  # the collector is up and has found the engine

    async def carry(self, requests: int) -> None:
        """Send whole requests and wait until they are stored."""
        await asyncio.to_thread(send, self.tap, range(self._sent, self._sent + requests))
        self._sent += requests
        await stored(self.server.url, self._sent * REQUEST_ROWS)

    def tidy(self) -> None:
        self._store.purge()

    async def stop(self) -> None:
        self._publisher.close()
        self.collector.terminate()
        self.collector.wait(20)
        await self.server.stop()
        if self._ring is not None:
            shutil.rmtree(self._ring.parent)


async def turn(lanes: Sequence[Lane], megabytes: int) -> Turn:
    """`megabytes` over all lanes, each its share."""
    requests = max(megabytes * 1_000_000 // (REQUEST_ROWS * lanes[0].tap.settings.row_bytes * len(lanes)), 1)
    memcpy = memcpy_megabytes_s(256 << 20)
    pids = ([os.getpid()], [lane.server.pid for lane in lanes], [lane.collector.pid for lane in lanes])
    before = [sum(map(cpu_s, part)) for part in pids]
    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for lane in lanes:
            group.create_task(lane.carry(requests))
    took_s = time.perf_counter() - started_s
    size_mb = len(lanes) * requests * REQUEST_ROWS * lanes[0].tap.settings.row_bytes / 1e6
    cpu = [(sum(map(cpu_s, part)) - was) / (size_mb / 1000) for part, was in zip(pids, before, strict=True)]
    for lane in lanes:
        lane.tidy()
    return Turn(size_mb / took_s, memcpy, *cpu)


async def measure(arms: Sequence[str], turns: int, megabytes: int) -> tuple[dict[str, list[Turn]], float]:
    """The turns by arm, and the microseconds of one `record`."""
    torch.set_num_threads(1)
    found: dict[str, list[Turn]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="tided-bench-") as name:
        lanes = {arm: [Lane(Path(name) / f"{arm}{number}", arm) for number in range(ARMS[arm])] for arm in arms}
        started: list[Lane] = []
        try:
            for lane in (lane for of_arm in lanes.values() for lane in of_arm):
                await lane.start()
                started.append(lane)
            for _ in range(turns):
                for arm in arms:
                    found[arm].append(await turn(lanes[arm], megabytes))
            record = await asyncio.to_thread(record_us, started[0].tap)
        finally:
            for lane in started:
                await lane.stop()
    return found, record


def claims_of(found: Mapping[str, Sequence[Turn]], record: float) -> list[Claim]:
    """`one` is what the goal is for; either of its two figures meets it."""
    claims: list[Claim] = []
    for arm, turns in found.items():
        what = WHAT[arm]
        speed = [item.megabytes_s for item in turns]
        ratio = [item.megabytes_s / item.memcpy_megabytes_s for item in turns]
        low, high = interval(speed), interval(ratio)
        met = (low.median >= GOAL_MB_S or high.median >= GOAL_MEMCPY) if arm == "one" else None
        goal = f">= {GOAL_MB_S:g} MB/s or >= {GOAL_MEMCPY:g} of memcpy" if arm == "one" else None
        claims += [
            Claim(f"dataplane.{arm}.mb_s", f"{what}{_words(low)}", low.median, "MB/s", goal, met, speed),
            Claim(
                f"dataplane.{arm}.memcpy", f"{what}: over memcpy in the same run{_words(high)}", high.median, runs=ratio
            ),
        ]
        for part in ("producer", "server", "collector"):
            runs = [getattr(item, f"{part}_s_gb") for item in turns]
            claims.append(Claim(f"dataplane.{arm}.{part}_cpu", f"{what}: CPU, {part}", median(runs), "s/GB", runs=runs))
        if arm != "one" and "one" in found:
            over = paired_ratio(speed, [item.megabytes_s for item in found["one"]])
            claims.append(Claim(f"dataplane.{arm}.over", f"{what}: over one{_words(over)}", over.median, "x"))
    claims.append(
        at_most("dataplane.record_us", "one record(): batch 8, two rows of 17,280 B each", round(record, 1), 200, "us")
    )
    return claims


def _words(found: Interval) -> str:
    return f" (95% {found.low:.3g}..{found.high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description="The data plane end to end, against memcpy.")
    parser.add_argument("arms", nargs="*", type=one_of(ARMS), default=list(ARMS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=2048)
    options = parser.parse_args()
    publish("dataplane", claims_of(*asyncio.run(measure(options.arms, options.turns, options.megabytes))), keep=True)


if __name__ == "__main__":
    main()
