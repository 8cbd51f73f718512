"""Eq. 5 of TIDE against real vLLM: the speedup that tided predicts of every batch size and number of drafted tokens, and the one measured.

`python -m bench.engines.speedup`. One server with tided in it and a trained draft; its schedule is set while it runs. For each batch size
the numbers of drafted tokens have their turns in order, forth and back by round, with a turn of 0 before and after each: a turn asks the
same prompts for equally many tokens, as many at a time as the batch is to hold. What counts is what the engine itself reports of its steps
at the full batch: their seconds and the tokens accepted in them. A part is a few rounds under `build/engines-speedup/`; parts that are
missing are run, and the claims (`bench.engines.speedup_report`) written after each.
"""

import argparse
import asyncio
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.drafts import code_draft
from bench.engines.rig import GAMMA_MAX, Rig, rig
from bench.engines.servers import Engine
from bench.engines.speedup_report import write_report
from bench.load import each
from bench.model import DEFAULT
from bench.study import Parts, plan_digest, prompts_of, run
from bench.traffic import Prompt
from tided.model.codec import to_plain
from tided.model.engines import Observation
from tided.model.errors import Unavailable
from tided.store.client import connect
from tided.store.engines import EngineStore

PATIENCE_S = 300.0
POLL_S = 0.1
SETTLE_TOKENS = 16
"""Of the request before each turn: the draft rests once nothing was drafted for 8 steps."""


@dataclass(frozen=True)
class Plan:
    """`waves[b]`: how often a turn at batch size b fills the batch; more where steps are short."""

    waves: Mapping[int, int] = field(default_factory=lambda: {1: 2, 2: 2, 4: 1, 8: 1, 16: 1})
    gammas: tuple[int, ...] = (1, 2, 3, 4)
    tokens: int = 80
    rounds: int = 3
    parts: int = 2
    domain: str = "code"
    dtype: str = "bfloat16"

    @property
    def digest(self) -> str:
        """Identifies the plan in the parts that were run under it; how many parts there are does not matter."""
        plain = {**asdict(self), "parts": 0}
        return plan_digest(plain)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(number) for number in range(1, self.parts + 1))


FULL = Plan()
SMOKE = Plan(waves={1: 1, 4: 1}, gammas=(1, 3), tokens=24, rounds=1, parts=2)
PLANS = {"full": FULL, "smoke": SMOKE}


class Reports:
    """What one engine reports, from now on."""

    def __init__(self, store: EngineStore, engine: str, cursor: str) -> None:
        self._store, self._engine, self._cursor = store, engine, cursor

    @classmethod
    async def begin(cls, store: EngineStore, engine: str) -> "Reports":
        _, cursor = await store.observations(engine)
        return cls(store, engine, cursor)

    async def until(self, requests: int) -> list[Observation]:
        """The next reports, up to the one by which so many requests have ended. Raises `Unavailable` when they do not come."""
        reports: list[Observation] = []
        deadline_s = time.monotonic() + PATIENCE_S
        while sum(len(report.requests) for report in reports) < requests:
            if time.monotonic() > deadline_s:
                raise Unavailable(f"engine {self._engine} did not report {requests} requests in {PATIENCE_S:g} s")
            await asyncio.sleep(POLL_S)
            found, self._cursor = await self._store.observations(self._engine, self._cursor)
            reports += found
        return reports


def order(gammas: Sequence[int], number: int) -> list[int]:
    """The turns of one batch size in a round: 0 before and after each of the gammas, which change direction from round to round."""
    forth = gammas if number % 2 == 0 else gammas[::-1]
    return [0, *(gamma for each_gamma in forth for gamma in (each_gamma, 0))]


async def turn(started: Rig, reports: Reports, prompts: Sequence[Prompt], batch: int, gamma: int) -> dict[str, Any]:
    """`prompts` at concurrency `batch`; gives what the engine reported of them."""
    await started.drafts(gamma)
    settling = await each(started.url, [replace(prompts[0], max_tokens=SETTLE_TOKENS)], 1, ignore_eos=True)
    await reports.until(1)
    load = await each(started.url, prompts, batch, ignore_eos=True)
    if load.errors or settling.errors:
        raise Unavailable(f"{load.errors + settling.errors} requests failed")
    found = await reports.until(len(prompts))
    return {
        "batch": batch,
        "gamma": gamma,
        "tokens_per_s": load.tokens_per_s,
        "reports": [{"at_ms": report.at_ms, "steps": to_plain(report.steps)} for report in found],
    }


async def run_part(started: Rig, reports: Reports, plan: Plan, prompts: Iterator[Prompt]) -> dict[str, Any]:
    """A few rounds; gives their turns, and the profile that the engine measured when it started."""
    info = await started.peer.here()
    rounds: list[dict[str, Any]] = []
    for number in range(plan.rounds):
        for batch, waves in plan.waves.items():
            began_s = time.monotonic()
            asked = list(itertools.islice(prompts, batch * waves))
            await each(started.url, asked, batch, ignore_eos=True)  # once unmeasured, for the prefix cache
            await reports.until(len(asked))
            turns = [await turn(started, reports, asked, batch, gamma) for gamma in order(plan.gammas, number)]
            rounds.append({"batch": batch, "turns": turns})
            print(f"round {number + 1} of {plan.rounds}, batch {batch}: {time.monotonic() - began_s:.0f} s", flush=True)
    return {"profile": to_plain(info.profile), "rounds": rounds}


async def study(plan: Plan, name: str, model: Path) -> None:
    """Every part that is missing. Raises `TideError` when the server could not start, or failed."""
    parts = Parts(_work(name), plan.digest)
    done = len(parts.first(*plan.names))
    if done == plan.parts:
        return
    if not done:
        shutil.rmtree(_work(name), ignore_errors=True)
    engine = Engine("vllm", draft=code_draft(model).resolve())
    async with rig(model, engine, plan.dtype, {"max_batch": max(plan.waves), "gamma_max": GAMMA_MAX}) as started:
        redis = connect(started.config.redis_url)
        try:
            await started.peer.here()
            reports = await Reports.begin(EngineStore(redis), engine.name)
            for part in plan.names[done:]:
                prompts = prompts_of(plan.domain, "measure", 0, int(part) * 500, plan.tokens)
                parts.write(part, await run_part(started, reports, plan, prompts))
                write_report(_report(name), parts.first(*plan.names))
        finally:
            await redis.aclose()


def _work(name: str) -> Path:
    return Path("build") / _report(name)


def _report(name: str) -> str:
    return "engines-speedup" if name == "full" else f"engines-speedup-{name}"


def main() -> None:
    """`python -m bench.engines.speedup [full|smoke] [--report]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.speedup", description=__doc__)
    parser.add_argument("plan", nargs="?", choices=list(PLANS), default="full")
    parser.add_argument("--parts", type=int, help="so many parts, instead of the plan's")
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--report", action="store_true", help="only write the report again, from the raw parts")
    options = parser.parse_args()
    plan = PLANS[options.plan]
    plan = replace(plan, parts=options.parts or plan.parts)
    if not options.report:
        run(study(plan, options.plan, options.model))
    write_report(_report(options.plan), Parts(_work(options.plan), plan.digest).first(*plan.names), show=True)


if __name__ == "__main__":
    main()
