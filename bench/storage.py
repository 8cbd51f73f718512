"""What tided keeps while it trains again and again, against what was tapped.

`python -m bench.storage [--cycles 66]` writes build/bench/storage.json; about 7 minutes on a free core. Kept are Redis' memory for
our keys, and shards: the cycle in training, what comes in meanwhile, the replay reserve, held-out ones. tided, its Valkey, its
collector, a worker and its trainer are real; the serving stack is `tided.client`, which sends rows of SmolLM2's shape. Their ids
follow from nothing, so every training is judged worse, its samples are consumed, and the next one begins at once: no draft is
deployed, and all cycles are alike. Rows come as fast as trainings take them, within `RATE`. Drafts are no samples, and are not
counted: their bytes are told beside.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio

from bench.configs import free_port, write_config
from bench.control import Control
from bench.model import DEFAULT
from bench.report import Claim, at_least, at_most, publish
from tided.client import DraftIdentity, Producer, Stack, Swapped
from tided.config import Config
from tided.draft.target import describe
from tided.local import LocalStack, services
from tided.model.engines import TargetInfo
from tided.wire.keys import PREFIX

CYCLES = 66
LEAST_CYCLES = 30
SETTLED = 3
"""Cycles after which what is kept should be flat."""
MIN_ROWS = 2000
MAX_BYTES = 2 * MIN_ROWS * 4608
CREDIT_BYTES = 2 << 20
PROMPT, OUTPUT = 16, 48
RATE = 400.0
"""Rows a second that the stack gives at most."""
GOAL = 24.0
GROWTH = 1.1
EVERY_S = 0.5
SHAPE_ROWS = 4096


@dataclass(frozen=True)
class Moment:
    """Bytes kept at one time, and how many trainings have ended before."""

    cycle: int
    redis: int
    shards: int

    @property
    def kept(self) -> int:
        return self.redis + self.shards


def claims(moments: Sequence[Moment], tapped_bytes: int, cycles: int, drafts_bytes: int, bound: str) -> list[Claim]:
    """What is said of a run. Flat: the peak of the last third of the cycles is no higher than that of the first third after `SETTLED`."""
    peak = max(moments, key=lambda moment: moment.kept)
    third = max(1, (cycles - SETTLED) // 3)
    early = max((m.kept for m in moments if SETTLED <= m.cycle < SETTLED + third), default=0)
    late = max((m.kept for m in moments if m.cycle >= cycles - third), default=0)
    return [
        at_least("storage.cycles", "training cycles, each consumed", cycles, LEAST_CYCLES),
        Claim("storage.tapped", "bytes tapped", round(tapped_bytes / 1e6, 1), "MB"),
        Claim("storage.peak", f"peak of all bytes kept (bound: {bound})", round(peak.kept / 1e6, 2), "MB"),
        Claim("storage.peak.redis", "of that peak, in Redis", round(peak.redis / 1e6, 2), "MB"),
        at_least("storage.ratio", "bytes tapped over the peak of bytes kept", tapped_bytes / peak.kept, GOAL),
        at_most("storage.flat", f"peak of the last third of the cycles over the first after {SETTLED}", late / early, GROWTH),
        Claim("storage.drafts", "drafts, kept for ever, not counted above", round(drafts_bytes / 1e6, 1), "MB"),
    ]  # fmt: skip


class Serving:
    """A stack that serves requests which follow from nothing, as long as its task runs."""

    def __init__(self, url: str, target: TargetInfo) -> None:
        self.row_bytes = (len(target.aux_layers) + 1) * target.hidden * 2
        stack = Stack(engine="bench", target=target, max_batch=8, last_hidden=True, gamma_max=4, swaps_vocabulary=True)
        self.producer = Producer(url, stack, on_swap=_swapped)
        random = np.random.default_rng(0)
        # BF16 bits of values about 1: positive, finite.
        self._states = random.integers(0x3F00, 0x4000, (SHAPE_ROWS, self.row_bytes // 2), dtype=np.uint16)
        self._states = self._states.reshape(SHAPE_ROWS, -1, target.hidden)
        self._random, self._vocab = random, target.vocab

    @property
    def tapped_bytes(self) -> int:
        return self.producer.totals.tapped * self.row_bytes

    async def serve(self) -> None:
        number = 0
        rows = PROMPT + OUTPUT - 1
        while True:
            began_s = time.monotonic()
            ids = self._random.integers(3, self._vocab, PROMPT + OUTPUT).tolist()
            name = f"r{number}"
            self.producer.begin(name, ids[:PROMPT], temperature=0.0)
            at = int(self._random.integers(0, SHAPE_ROWS - rows))
            self.producer.record(name, 0, ids[:rows], self._states[at : at + rows])
            self.producer.step(0, {name: 0}, 0.02)
            self.producer.end(name, "stop", output_tokens=OUTPUT, tail=ids[rows:])
            number += 1
            await asyncio.sleep(max(0.0, rows / RATE - (time.monotonic() - began_s)))


def _swapped(_: Path, draft: DraftIdentity) -> Swapped:
    return Swapped(draft, 0.001)


def configuration(work: Path, model: Path) -> tuple[Path, Config]:
    """A configuration in which cycle follows cycle, and one line bounds what is kept of samples."""
    sections: dict[str, dict[str, Any]] = {
        "daemon": {"state_dir": str(work / "s"), "cycle_s": 0.25},
        "target": {"path": str(model)},
        "engine": {"port": free_port()},
        "capture": {"credit_bytes": CREDIT_BYTES},
        "self_test": {"enabled": False},
        "samples": {"max_bytes": MAX_BYTES, "shard_rows": 256, "shard_age_s": 1.0},
        "speculation": {"shadow_every_s": 0.0},
        "training": {"min_rows": MIN_ROWS, "cool_down_s": 0.0, "budget_s": 2.0, "fault_check_s": 0.0, "draft_vocab": 1024},
        "pool": {"enabled": False},
        "gate": {"min_requests": 6, "min_tokens": 120},
        "deployment": {"watch_requests": 1, "watch_s": 1.0},
        "jobs": {"keep_s": 60.0},
    }  # fmt: skip
    path = work / "config.toml"
    return path, write_config(path, sections)


async def redis_bytes(client: redis.asyncio.Redis) -> int:
    """What tided's keys take in the server's memory."""
    total = 0
    async for key in client.scan_iter(match=f"{PREFIX}*", count=1000):
        total += int(await client.memory_usage(key, samples=0) or 0)
    return total


def disk_bytes(directory: Path) -> int:
    """Of all files below; one that goes meanwhile is not there."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@asynccontextmanager
async def running(task: Any) -> AsyncGenerator[None]:
    started = asyncio.create_task(task)
    try:
        yield
    finally:
        started.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await started


async def measure(model: Path, cycles: int, minutes: float) -> list[Claim]:
    """Run until so many cycles have ended."""
    moments: list[Moment] = []
    with tempfile.TemporaryDirectory(prefix="tided-storage-") as directory:
        path, config = configuration(Path(directory), model)
        tided, _, worker = services(path, config)
        async with LocalStack(Path(directory) / "logs", lambda line: print(line, flush=True)) as stack:
            await stack.start(tided)
            await stack.start(worker)
            serving, control = Serving(config.redis_url, describe(model)), Control(config.daemon.socket_path)
            client = redis.asyncio.Redis.from_url(config.redis_url)
            async with asyncio.timeout(minutes * 60), client:
                with serving.producer:
                    await control.has_draft()
                    async with running(serving.serve()):
                        ended = 0
                        while ended < cycles:
                            shards = await asyncio.to_thread(disk_bytes, config.samples_dir)
                            moments.append(Moment(ended, await redis_bytes(client), shards))
                            training = (await control.engine()).training
                            now = training.trainings - int(bool(training.job))
                            if now != ended:
                                tapped, kept = serving.tapped_bytes / 1e6, moments[-1].kept / 1e6
                                print(f"cycle {now}: {kept:.1f} MB kept, {tapped:.0f} MB tapped", flush=True)
                            ended = now
                            await asyncio.sleep(EVERY_S)
        drafts = await asyncio.to_thread(disk_bytes, config.drafts_dir)
        bound = f"samples.max_bytes = {config.samples.max_bytes}, capture.credit_bytes = {config.capture.credit_bytes}"
        return claims(moments, serving.tapped_bytes, ended, drafts, bound)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(prog="python -m bench.storage", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--minutes", type=float, default=20.0, help="give up after so long")
    given = parser.parse_args(arguments)
    if given.cycles <= SETTLED:
        parser.error(f"--cycles: more than {SETTLED}, after which what is kept should be flat")
    publish("storage", asyncio.run(measure(given.model, given.cycles, given.minutes)))


if __name__ == "__main__":
    main()
