"""What many engines, workers and jobs cost: how soon a due job has a worker, how long tided's control cycle takes, and its memory.

    python -m bench.scale [small|full] [--smoke]

A real tided and a real Valkey (append-only file on), each a process, and one process with simulated engines and workers (`bench.crowd`).
A part is a size: `full` is 200 workers, 100 engines and 10,000 jobs, `small` a tenth of each at a tenth of the rate, in the same time.
Jobs come at random (Poisson), take 1 to 7 s, and are renewed every second; of a hundred, two fail and are tried again, one's worker falls
silent and tided takes it back; then a burst comes due at once. Raw figures are under build/scale/, claims as soon as a part is done.

Dispatch is the time from when an attempt at a job is due in the queue until a worker has claimed it, both by Redis TIME, of all attempts
that came due while a worker was idle. The cycle is one pass of the controller over all engines, as tided's log (debug) tells it.
"""

import argparse
import asyncio
import bisect
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from bench.configs import write_config
from bench.control import Control
from bench.crowd import Crowd, Dispatched, Ending, running
from bench.daemon import cpu_s, rss_mb
from bench.model import DEFAULT
from bench.report import Claim, at_most, one_of
from bench.study import Parts, run
from tided.config import Config
from tided.draft.target import describe
from tided.local import LocalStack, Service
from tided.model.engines import Capability, EngineInfo, LatencyProfile
from tided.model.ids import new_id
from tided.model.jobs import JobKind, JobSpec
from tided.store.jobs import JobStore
from tided.store.valkey import EmbeddedValkey

OUT = Path("build/scale")
PROFILE = LatencyProfile((1, 2, 4, 8, 16, 40), (0.05, 0.05, 0.052, 0.06, 0.09, 0.19), (1, 8), (0.005, 0.01))
FAIL, VANISH = 0.02, 0.01
SHORTEST_S, LONGEST_S = 1.0, 7.0
DRAIN_S = 60.0
SAMPLE_S = 1.0


@dataclass(frozen=True)
class Size:
    """One part. `seconds`: in which its jobs come; `warm_s`: from the first sample on, what the slope leaves out."""

    workers: int
    engines: int
    jobs: int
    burst: int
    seconds: float
    warm_s: float


SIZES = {
    "small": Size(20, 10, 1_000, 10, 240.0, 60.0),
    "full": Size(200, 100, 10_000, 100, 240.0, 60.0),
}
SMOKE = {
    "small": Size(4, 2, 10, 4, 8.0, 1.0),
    "full": Size(20, 10, 60, 10, 8.0, 1.0),
}


async def measure(size: Size, model: Path, seed: int) -> dict[str, Any]:
    """One part's raw figures."""
    with tempfile.TemporaryDirectory(prefix="tided-scale-") as directory:
        work = Path(directory)
        valkey = EmbeddedValkey(work / "valkey", 512 << 20)
        await valkey.start()
        try:
            config_file = work / "config.toml"
            daemon = {"state_dir": str(work / "state"), "start_collector": False, "log_level": "debug"}
            changes = {"redis": {"url": valkey.url}, "daemon": daemon, "target": {"path": str(model)}}
            config = write_config(config_file, {**changes, "self_test": {"enabled": False}})
            async with LocalStack(work / "logs") as stack:
                tided = await stack.start(Service("tided", "tided.daemon", ("--config", str(config_file))))
                return await _measured(size, config, Crowd(valkey.url, seed), (tided.pid, valkey.pid), tided.log)
        finally:
            await valkey.stop()


async def _measured(size: Size, config: Config, crowd: Crowd, pids: tuple[int, int], log: Path) -> dict[str, Any]:
    control = Control(config.daemon.socket_path)
    infos = [_engine(config, number) for number in range(size.engines)]
    names = [f"w{number}" for number in range(size.workers)]
    jobs = JobStore(crowd.redis, config.jobs.lease_s)
    rss: list[tuple[float, float]] = []
    async with running(*crowd.engines(infos), *await crowd.workers(names, config.jobs.lease_s)):
        began_s = time.monotonic()
        await control.wait_for(
            lambda status: (
                len(status.workers) == size.workers
                and len(status.engines) == size.engines
                and all(engine.info.version and engine.info.capturing for engine in status.engines)
            ),
            180,
        )
        converged_s = time.monotonic() - began_s
        told, cpu, started_s = _lines(log), [cpu_s(pid) for pid in pids], time.monotonic()
        async with running(_sampling(pids[0], rss)):
            first = len(crowd.claims_s)
            for at_s, spec in arrivals(size, random.Random(crowd.seed)):
                await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
                await crowd.submit(spec, jobs)
            late_s = time.monotonic() - started_s - size.seconds
            await _drained(crowd, size.jobs)
            steady, most_busy = list(crowd.dispatched), dict(crowd.most_busy)
            claims_s = crowd.claims_s[first:]
            before = len(crowd.dispatched)
            async with asyncio.TaskGroup() as group:
                for _ in range(size.burst):
                    group.create_task(crowd.submit(_job(1.0, Ending.FINISH, JobKind.TRAIN), jobs))
            await _drained(crowd, size.jobs + size.burst)
        took_s = time.monotonic() - started_s
        used = [after - was for after, was in zip((cpu_s(pid) for pid in pids), cpu, strict=True)]
        status_ms = [await _status_ms(control) for _ in range(5)]
    return {
        "converged_s": converged_s,
        "late_s": late_s,
        "took_s": took_s,
        "rss": rss,
        "cycles_s": _cycles_s(log, told),
        "dispatched": [asdict(item) for item in steady],
        "burst": [asdict(item) for item in crowd.dispatched[before:]],
        "claim_ms": [round(1000 * item, 3) for item in claims_s],
        "most_busy": {kind.value: count for kind, count in most_busy.items()},
        "finished": dict(crowd.finished),
        "tided_cpu": used[0] / took_s,
        "valkey_cpu": used[1] / took_s,
        "status_ms": status_ms,
    }


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n")


def _cycles_s(log: Path, told: int) -> list[float]:
    lines = map(json.loads, log.read_bytes().splitlines()[told:])
    return [line["seconds"] for line in lines if line.get("event") == "cycle"]


def _engine(config: Config, number: int) -> EngineInfo:
    return EngineInfo(
        engine=f"e{number}",
        incarnation=new_id("run"),
        kind="simulated",
        url="",
        target=describe(config.target[0].path),
        version="",
        vocab_id="",
        gamma_max=4,
        max_batch=4,
        capabilities=(Capability.TAP, Capability.SCHEDULE, Capability.SWAP, Capability.SWAP_VOCABULARY),
        gammas=(0,),
        capturing=False,
        epoch=0,
        profile=PROFILE,
    )


def arrivals(size: Size, rng: random.Random) -> Iterator[tuple[float, JobSpec]]:
    """When each job is submitted, in seconds from the start, in order: uniform at random, that is Poisson given their number."""
    for at_s in sorted(rng.uniform(0.0, size.seconds) for _ in range(size.jobs)):
        drawn = rng.random()
        ending = Ending.FAIL if drawn < FAIL else Ending.VANISH if drawn < FAIL + VANISH else Ending.FINISH
        yield at_s, _job(rng.uniform(SHORTEST_S, LONGEST_S), ending, rng.choice((JobKind.TRAIN, JobKind.SCORE)))


def _job(seconds: float, ending: Ending, kind: JobKind) -> JobSpec:
    """As large as a real one: ten shards."""
    shards = tuple(f"/srv/tided/samples/train/s-{'0' * 20}-{number}.safetensors" for number in range(10))
    options = {"seconds": seconds, "ending": ending.value}
    return JobSpec(kind, "e0", "ab" * 32, "/srv/models/target", "simulated", "cd" * 32, shards=shards, options=options)


async def _sampling(pid: int, into: list[tuple[float, float]]) -> None:
    began_s = time.monotonic()
    while True:
        into.append((round(time.monotonic() - began_s, 2), rss_mb(pid)))
        await asyncio.sleep(SAMPLE_S)


async def _drained(crowd: Crowd, jobs: int) -> None:
    """Until that many have finished. Raises `TimeoutError`."""
    async with asyncio.timeout(DRAIN_S):
        while crowd.finished["finished"] < jobs:  # noqa: ASYNC110 - a counter
            await asyncio.sleep(0.02)


async def _status_ms(control: Control) -> float:
    began_s = time.monotonic()
    await control.status()
    return 1000 * (time.monotonic() - began_s)


def waited_ms(dispatched: Sequence[Dispatched]) -> list[int]:
    """From due to claimed, of each attempt."""
    return [item.claimed_ms - item.due_ms for item in dispatched]


def growth_mb(rss: Sequence[tuple[float, float]], warm_s: float) -> float:
    """Median resident memory of the last third of what comes after the warm-up, less that of its first third."""
    figures = [value for _, value in rss[bisect.bisect_left(rss, (warm_s,)) :]]
    third = max(len(figures) // 3, 1)
    return float(np.median(figures[-third:]) - np.median(figures[:third]))


def slope_mb_h(rss: Sequence[tuple[float, float]], warm_s: float) -> float:
    """Theil-Sen slope of resident memory after the warm-up: the median over all pairs of samples."""
    kept = np.array([item for item in rss if item[0] >= warm_s])
    i, j = np.triu_indices(len(kept), 1)
    return float(np.median((kept[j, 1] - kept[i, 1]) / (kept[j, 0] - kept[i, 0])) * 3600)


def claims_of(name: str, size: Size, part: dict[str, Any]) -> list[Claim]:
    """What one part says. The goals are those of the full size."""
    full = name == "full"
    who = f"{size.workers} workers, {size.engines} engines, {size.jobs:,} jobs"
    waited = waited_ms([Dispatched(**item) for item in part["dispatched"]])
    burst = waited_ms([Dispatched(**item) for item in part["burst"]])
    rss = [tuple(item) for item in part["rss"]]
    idle = size.workers - max(part["most_busy"].values())

    def goal(id: str, what: str, value: float, most: float, unit: str) -> Claim:
        return at_most(id, what, value, most, unit) if full else Claim(id, what, value, unit)

    dispatch = goal(
        f"{name}.dispatch_p99", f"{who}: from due to claimed, p99", float(np.quantile(waited, 0.99)), 100, "ms"
    )
    if idle <= 0 and dispatch.met:
        dispatch = replace(dispatch, met=False)  # jobs waited for workers: it says nothing about dispatch

    def p99(values: Sequence[float]) -> float:
        return float(np.quantile(values, 0.99))

    return [
        dispatch,
        Claim(f"{name}.dispatch_p50", f"{who}: from due to claimed, median", float(np.median(waited)), "ms"),
        Claim(f"{name}.dispatch_max", f"{who}: from due to claimed, longest", max(waited), "ms"),
        Claim(f"{name}.idle", f"{who}: idle workers of a kind of job at the busiest moment (0: the above is no dispatch)", idle),
        Claim(f"{name}.burst", f"{who}: {size.burst} jobs due at once, until the last is claimed", max(burst), "ms"),
        Claim(f"{name}.claim_p99", f"{who}: one claim, as a worker sees it, p99", p99(part["claim_ms"]), "ms"),
        Claim(f"{name}.cycle_p50", f"{who}: control cycle, median", 1000 * float(np.median(part["cycles_s"])), "ms"),
        Claim(f"{name}.cycle_p99", f"{who}: control cycle, p99", 1000 * p99(part["cycles_s"]), "ms"),
        Claim(f"{name}.converged", f"{who}: from their start until all engines are on the draft and tap", part["converged_s"], "s"),
        goal(f"{name}.rss", f"{who}: tided's resident memory, most", max(value for _, value in rss), 250, "MB"),
        goal(f"{name}.growth", f"{who}: its growth after {size.warm_s:.0f} s, last third over first", growth_mb(rss, size.warm_s), 5, "MB"),
        Claim(f"{name}.slope", f"{who}: its slope after {size.warm_s:.0f} s", slope_mb_h(rss, size.warm_s), "MB/h"),
        Claim(f"{name}.cpu", f"{who}: tided's CPU", 100 * part["tided_cpu"], "%"),
        Claim(f"{name}.valkey_cpu", f"{who}: Valkey's CPU", 100 * part["valkey_cpu"], "%"),
        Claim(f"{name}.status", f"{who}: one status over the admin socket, median", float(np.median(part["status_ms"])), "ms"),
        Claim(f"{name}.attempts", f"{who}: attempts finished, failed, lost", _counts(part)),
        Claim(f"{name}.late", f"{who}: the last submission, behind its time", part["late_s"], "s"),
    ]  # fmt: skip


def _counts(part: dict[str, Any]) -> str:
    return ", ".join(f"{part['finished'].get(name, 0):,} {name}" for name in ("finished", "failed", "lost"))


def growth_claims(small: dict[str, Any], full: dict[str, Any]) -> list[Claim]:
    """The full part over the small one."""
    most = [max(value for _, value in part["rss"]) for part in (small, full)]
    cycle = [float(np.median(part["cycles_s"])) for part in (small, full)]
    return [
        Claim("growth.rss", "tided's memory, full over small (10x)", most[1] / most[0], "x"),
        Claim("growth.cycle", "control cycle, full over small (10x)", cycle[1] / cycle[0], "x"),
        Claim("growth.cpu", "tided's CPU, full over small (10x)", full["tided_cpu"] / small["tided_cpu"], "x"),
    ]


async def study(names: Sequence[str], sizes: dict[str, Size], model: Path, parts: Parts, name: str) -> None:
    """Run the parts that are missing."""
    for part_name in names:
        size, part = sizes[part_name], parts.read(part_name)
        if part is None:
            print(f"{part_name}: {size}", flush=True)
            part = await measure(size, model, seed=0)
            parts.write(part_name, part)
        report.publish(name, claims_of(part_name, size, part), keep=True)
    found = parts.first("small", "full")
    if len(found) == 2:
        report.publish(name, growth_claims(*found), keep=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("parts", nargs="*", type=one_of(SIZES), default=list(SIZES))
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--smoke", action="store_true", help="seconds, not minutes; its figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="run the parts again")
    options = parser.parse_args()
    sizes, name = (SMOKE, "scale-smoke") if options.smoke else (SIZES, "scale")
    out = OUT / name
    if options.fresh:
        shutil.rmtree(out, ignore_errors=True)
    plan = repr(sizes)
    run(study(options.parts, sizes, options.model, Parts(out, plan), name))


if __name__ == "__main__":
    main()
