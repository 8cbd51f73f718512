"""Records the traces under traces/: real traffic on real vLLM, held at its most drafted tokens, so that every smaller number is exact.

`python -m bench.engines.traces [NAME...]`; without a name those that are missing. `--seconds` shortens them, for a try.
"""

import argparse
import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.drafts import code_draft
from bench.engines.rig import GAMMA_MAX, rig
from bench.engines.servers import Engine
from bench.load import Traffic, each
from bench.model import DEFAULT
from bench.policy import TRACES
from bench.record import record
from bench.report import one_of
from bench.study import prompts_of, run
from tided.model.errors import Unavailable
from tided.replay.trace import SUFFIX, Trace, save

MAX_BATCH, MAX_TOKENS = 16, 80
TAIL_S = 2.0
"""From the end of traffic to the last report of it."""


@dataclass(frozen=True)
class Stage:
    """So many requests at a time for so long."""

    seconds: float
    concurrency: int
    domain: str = "code"


@dataclass(frozen=True)
class Traffics:
    """What is recorded: its stages, and which goal of replay holds for it."""

    about: str
    stages: tuple[Stage, ...]
    regime: str = "moving"

    def shortened(self, seconds: float) -> "Traffics":
        """The same in `seconds` altogether."""
        share = seconds / sum(stage.seconds for stage in self.stages)
        return replace(self, stages=tuple(replace(stage, seconds=stage.seconds * share) for stage in self.stages))


def bursty(seconds: float, seed: int = 0) -> tuple[Stage, ...]:
    """Calm stretches of one or two requests, and bursts of up to MAX_BATCH."""
    draw = random.Random(seed)
    stages: list[Stage] = []
    while sum(stage.seconds for stage in stages) < seconds:
        stages.append(Stage(draw.uniform(15.0, 35.0), draw.choice((1, 1, 2))))
        stages.append(Stage(draw.uniform(8.0, 25.0), draw.choice((4, 8, 12, 16))))
    return tuple(stages)


RECORDED: Mapping[str, Traffics] = {
    "vllm-code-1": Traffics("code, one request at a time", (Stage(120.0, 1),), "stationary"),
    "vllm-code-8": Traffics("code, eight requests at a time", (Stage(150.0, 8),), "stationary"),
    "vllm-bursty": Traffics("code, from 1 to 16 requests at a time, in bursts", bursty(200.0)),
    "vllm-shift": Traffics(
        "four requests at a time, first code, which the draft knows, then French",
        (Stage(150.0, 4), Stage(150.0, 4, "french")),
    ),
}


async def play(url: str, traffics: Traffics) -> None:
    """The stages, one after the other. Raises `Unavailable` when a request failed."""
    domains = {stage.domain for stage in traffics.stages}
    sources = {domain: prompts_of(domain, "measure", 0, 0, MAX_TOKENS) for domain in domains}
    for stage in traffics.stages:
        async with Traffic(url, sources[stage.domain], stage.concurrency) as traffic:
            await asyncio.sleep(stage.seconds)
            await traffic.pause()
            if traffic.load.errors:
                raise Unavailable(f"{traffic.load.errors} requests failed")
    await asyncio.sleep(TAIL_S)


async def record_all(names: Sequence[str], model: Path, directory: Path, seconds: float | None) -> None:
    """Those traces, one after the other, on one server. Raises `TideError`."""
    engine = Engine("vllm", draft=code_draft(model).resolve())
    async with rig(model, engine, "bfloat16", {"max_batch": MAX_BATCH}) as started:
        await started.peer.here()
        await started.drafts(GAMMA_MAX)
        for concurrency in (1, MAX_BATCH):  # what a server does for the first time takes longer
            await each(started.url, itertools.islice(prompts_of("json", "measure", 0, 0, 16), concurrency), concurrency)
        await asyncio.sleep(TAIL_S)
        for name in names:
            traffics = RECORDED[name] if seconds is None else RECORDED[name].shortened(seconds)
            playing = play(started.url, traffics)
            trace = await record(started.config.redis_url, engine.name, playing, name, traffics.about)
            trace = replace(trace, header=replace(trace.header, regime=traffics.regime))
            _write(trace, directory / f"{name}{SUFFIX}")


def _write(trace: Trace, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(trace, path)
    size = path.stat().st_size
    print(f"{path}: {len(trace.at_s):,} steps in {trace.header.duration_s:.0f} s, {size:,} bytes", flush=True)


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.traces", description=__doc__)
    parser.add_argument("names", nargs="*", type=one_of(RECORDED))
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--to", type=Path, default=TRACES)
    parser.add_argument("--seconds", type=float)
    given = parser.parse_args()
    missing = [name for name in RECORDED if not (given.to / f"{name}{SUFFIX}").exists()]
    names = given.names or missing
    if names:
        run(record_all(names, given.model, given.to, given.seconds))


if __name__ == "__main__":
    main()
