"""Heterogeneous allocation on two cores: does a core that trains for the other one give more than a core that serves?

`python -m bench.hetero` runs the parts that are missing, pair after pair, writes each part's raw figures under build/hetero/ as soon as it
is done, and the report after each. A pair that is complete begins anew. Pairs: two whole cores; a whole core and a quarter of one.

Arms: (a) two engines, one on each device, without speculation; (b) one engine on the first device under tided, from version 0 of its draft
on, and one worker on the second: the whole run counts, collecting and training too. Parts of a pair: rates are calibrated and the
planner's prediction follows from them alone; then (a), (b), and (a) again, because (b) cannot be interrupted.

The load generator is on the first core in both arms, with the engine that both have. tided, its store and its collector are on the second,
where they take from training. What all of them take is reported.
"""

import argparse
import asyncio
import itertools
import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from bench import report
from bench.configs import free_port, write_config
from bench.control import Control
from bench.hetero_plan import (
    AFTER,
    BEFORE,
    CALIBRATE,
    PARTS,
    SPINNERS,
    TIDED,
    Places,
    Plan,
    part_name,
    smoke,
)
from bench.hetero_report import write_report
from bench.load import Traffic, each
from bench.model import DEFAULT
from bench.study import digest_of, noting, prompts_of, run, timeline, unless_ended
from bench.traffic import Prompt
from bench.turns import Measured
from bench.usage import moment, share_within, shares, usage
from tided.local import LocalStack, Service, services
from tided.model.codec import to_plain
from tided.model.jobs import JobKind
from tided.model.status import Status
from tided.model.verification import VerificationState
from tided.worker.settings import NICE

ENGINES = ("first", "second")
SELF_TEST_S = 180.0
_ALL = (CALIBRATE, BEFORE, AFTER)


def asked(plan: Plan, stream: int) -> Iterator[Prompt]:
    """Prompts of one of the engines that do not adapt, each for one stream alone; the run under tided has the split "train" to itself."""
    source = prompts_of(plan.domain, "measure", 0, 0, plan.max_tokens)
    return itertools.islice(source, stream, None, len(_ALL) * len(ENGINES))


async def serve_with_all(stack: LocalStack, plan: Plan, places: Places, pair: str, part: str) -> dict[str, Any]:
    """Arm (a): an engine on each device, without speculation. Gives the raw part; of the calibration with the first engine's profile."""
    calibrates = part == CALIBRATE
    urls: dict[str, str] = {}
    for name, core in zip(ENGINES, places.cores, strict=True):
        port = free_port()
        urls[name] = f"http://127.0.0.1:{port}"
        arguments = ["--model", str(places.model), "--dtype", plan.dtype, "--port", str(port), "--engine-id", name]
        arguments += ["--gamma-max", str(plan.gamma_max), "--max-batch", str(plan.concurrency)]
        arguments += ["--max-context", str(plan.max_context)]
        arguments += ["--profile" if calibrates and name == ENGINES[0] else "--no-profile"]
        await stack.start(Service(name, "tided.engine.embedded.server", tuple(arguments), frozenset((core,))))
    profile = await _profile(urls[ENGINES[0]]) if calibrates else None
    await spin(stack, places, pair, nice=os.getpriority(os.PRIO_PROCESS, 0))
    return await unless_ended(stack, _all_serve(stack, plan, urls, part, profile))


async def _all_serve(stack: LocalStack, plan: Plan, urls: dict[str, str], part: str, profile: Any) -> dict[str, Any]:
    seen: list[Prompt] = []
    sources = [noting(asked(plan, len(ENGINES) * _ALL.index(part) + index), seen) for index, _ in enumerate(ENGINES)]
    first = [list(itertools.islice(source, plan.concurrency)) for source in sources]
    await asyncio.gather(
        *(each(url, prompts, plan.concurrency) for url, prompts in zip(urls.values(), first, strict=True))
    )
    began_s = time.monotonic()
    async with usage(stack) as used, AsyncExitStack() as open_traffic:
        traffics = [
            await open_traffic.enter_async_context(Traffic(url, source, plan.concurrency))
            for url, source in zip(urls.values(), sources, strict=True)
        ]
        await asyncio.sleep(plan.calibrate_s if part == CALIBRATE else plan.all_s)
        used.append(moment(stack))
        spent = shares(used)  # from here on one engine may be idle; each one's seconds end with its own last answer
        await asyncio.gather(*(traffic.pause() for traffic in traffics))
    return {
        "engines": [_served(traffic, began_s) for traffic in traffics],
        "cpu": spent,
        "profile": profile,
        "prompts": [digest_of(prompt) for prompt in seen],
    }


async def _profile(url: str) -> Any:
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
        return (await http.get("/admin/state")).raise_for_status().json()["profile"]


async def serve_and_train(stack: LocalStack, plan: Plan, places: Places, pair: str) -> dict[str, Any]:
    """Arm (b): an engine under tided on the first device, a worker on the second. Gives the raw part.

    The run begins when the engine has passed the self-test: that is part of installing tided, and once for each target and engine.
    """
    first, second = (frozenset((core,)) for core in places.cores)
    work = places.work / pair
    shutil.rmtree(work, ignore_errors=True)
    config_file = work / "tided.toml"
    config = write_config(config_file, _changes(plan, places, work / "state", free_port()))
    for service in services(config_file, config):
        await stack.start(replace(service, cores=first if service.name == "engine" else second))
    control = Control(config.daemon.socket_path)
    await control.wait_for(_passed, SELF_TEST_S)
    await spin(stack, places, pair, nice=NICE)
    url = f"http://{config.engine.host}:{config.engine.port}"
    return await unless_ended(stack, _adapts(stack, control, plan, url))


def _passed(status: Status) -> bool:
    """Its only engine serves a draft that tided knows, and taps what it says it taps."""
    engine = status.engines[0] if status.engines else None
    verdict = engine.verification if engine is not None and engine.draft else None
    return verdict is not None and verdict.state is VerificationState.VERIFIED


async def _adapts(stack: LocalStack, control: Control, plan: Plan, url: str) -> dict[str, Any]:
    seen: list[Prompt] = []
    newest = await control.events("")
    source = noting(prompts_of(plan.domain, "train", 0, 0, plan.max_tokens), seen)
    began_s, began_ms = time.monotonic(), round(time.time() * 1000)
    async with (
        usage(stack) as used,
        timeline(control, began_s) as moments,
        Traffic(url, source, plan.concurrency) as traffic,
    ):
        await asyncio.sleep(plan.run_s)
        await traffic.pause()
    jobs = await control.get("/v1/jobs")
    trained_ms = [
        (job["started_ms"], job["finished_ms"])
        for job in jobs
        if job["spec"]["kind"] == JobKind.TRAIN.value and job["finished_ms"]
    ]
    return {
        "engines": [_served(traffic, began_s)],
        "began_ms": began_ms,
        "cpu": shares(used),
        "worker_share": share_within(used, "worker", trained_ms),
        "timeline": moments,
        "events": [to_plain(event) for event in await control.events(newest[-1].id if newest else "")],
        "jobs": jobs,
        "samples": to_plain((await control.engine()).samples),
        "prompts": [digest_of(prompt) for prompt in seen],
    }


async def spin(stack: LocalStack, places: Places, pair: str, nice: int) -> None:
    """Leaves of the second core what the pair has of it; `nice` is the niceness of what will be busy there."""
    for number in range(SPINNERS[pair]):
        await stack.start(Service(f"spin-{number}", "bench.spin", ("--nice", str(nice)), frozenset((places.cores[1],))))


def _served(traffic: Traffic, began_s: float) -> dict[str, Any]:
    """What one engine gave: every answer, the seconds that its traffic lasted, and how long a prompt was."""
    load = traffic.load
    good = [answer for answer in load.answers if not answer.error]
    return {
        "tokens": load.tokens,
        "seconds": load.seconds,
        "errors": load.errors,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "answers": [vars(Measured.of(answer, began_s)) for answer in good],
    }


def _changes(plan: Plan, places: Places, state: Path, port: int) -> dict[str, dict[str, Any]]:
    return {
        **{section: dict(values) for section, values in plan.changes.items()},
        "daemon": {"state_dir": str(state)},
        "target": {"path": str(places.model)},
        "engine": {
            "port": port,
            "dtype": plan.dtype,
            "gamma_max": plan.gamma_max,
            "max_batch": plan.concurrency,
            "max_context": plan.max_context,
        },
    }


@contextmanager
def on_core(core: int) -> Generator[None]:
    """The load generator, which is this process, runs on this core alone meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def bench(plan: Plan, places: Places, pairs: Sequence[str]) -> Path:
    """Every part of these pairs that is missing; gives the report's path.

    Raises:
        TideError: a process of a part could not start, or ended.
    """
    parts = places.parts(plan)
    for pair, part in itertools.product(pairs, PARTS):
        name = part_name(pair, part)
        if parts.read(name) is not None:
            continue
        print(f"{pair} core: {part}", flush=True)
        logs = places.work / f"logs-{name}"
        with on_core(places.cores[0]):
            async with LocalStack(logs, lambda line: print(line, flush=True)) as stack:
                if part == TIDED:
                    raw = await serve_and_train(stack, plan, places, pair)
                else:
                    raw = await serve_with_all(stack, plan, places, pair, part)
        parts.write(name, raw)
        write_report(plan, places)
    return write_report(plan, places)


def main(arguments: list[str] | None = None) -> None:
    """`python -m bench.hetero [--pair whole|quarter] [--concurrency N] [--cores A,B] [--size smoke] [--report]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.hetero", description="Serve with all, or serve and train.")
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--pair", choices=tuple(SPINNERS), action="append", help="one alone; else both")
    parser.add_argument("--concurrency", type=int, default=Plan.concurrency, help="requests in flight at each engine")
    parser.add_argument("--cores", help="two, with a comma between; else this process's first and last")
    parser.add_argument("--report", action="store_true", help="only write the report again, from the raw parts")
    options = parser.parse_args(arguments)
    plan = replace(Plan() if options.size == "full" else smoke(), concurrency=options.concurrency)
    name = "hetero" if options.size == "full" else "hetero-smoke"
    name += "" if plan.concurrency == Plan.concurrency else f"-c{plan.concurrency}"
    places = Places(options.model, Path("build") / name, report.BENCH_DIR / f"{name}.json", cores_of(options.cores))
    if options.report:
        print(write_report(plan, places))
        return
    pairs: list[str] = options.pair or list(SPINNERS)
    for pair in pairs:
        places.parts(plan).begin_anew(*(part_name(pair, part) for part in PARTS))
    print(f"report: {run(bench(plan, places, pairs))}")


def cores_of(text: str | None) -> tuple[int, int]:
    """The two cores that `--cores` names."""
    cores = [int(core) for core in text.split(",")] if text else sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


if __name__ == "__main__":
    main()
