"""The study: three domains' traffic in turn, and what no speculation, a frozen draft and tided make of it.

`python -m bench.shift` runs the parts that are missing (the phases in order, then the identity part), writes each part's raw
figures under build/shift/ as soon as it is done, and the report after each. A complete study begins anew.

Arms: none (no speculation); static (the draft and the schedule that tided served at the end of phase 1, frozen; in phase 1 there is
no such draft yet, so it runs without speculation there, and its ratio to none shows the noise of the method); tided.
"""

import argparse
import asyncio
import itertools
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import identity, report
from bench.arms import Arms, Frozen
from bench.load import Traffic
from bench.model import DEFAULT
from bench.shift_plan import Phase, Places, Plan, smoke
from bench.shift_report import write_report
from bench.study import digest_of, noting, prompts_of, run, timeline, unless_ended
from bench.traffic import Prompt
from bench.turns import TurnLog, take_turns
from tided.local import LocalStack
from tided.model.codec import to_plain

MEASURE_STRIDE = 300
"""Each phase's measurement prompts begin this far behind those of the phase before, so that a domain's return meets new ones."""


def phase_names(plan: Plan) -> list[str]:
    """The names of the phases' parts."""
    return [f"phase-{phase.name}" for phase in plan.phases]


async def run_phase(arms: Arms, plan: Plan, index: int) -> dict[str, Any]:
    """One phase; gives its raw part."""
    phase = plan.phases[index]
    trained: list[Prompt] = []
    measured: list[Prompt] = []
    log = TurnLog()
    newest = await arms.events("")
    cursor = newest[-1].id if newest else ""
    start, began_s, began_ms = await arms.engine(), time.monotonic(), round(time.time() * 1000)
    measure = prompts_of(phase.domain, "measure", 0, index * MEASURE_STRIDE, plan.max_tokens)
    train = noting(prompts_of(phase.domain, "train", index, 0, plan.max_tokens), trained)
    async with timeline(arms, began_s) as moments, Traffic(arms.urls["tided"], train, plan.concurrency) as traffic:
        for block in itertools.count():
            elapsed_s = time.monotonic() - began_s
            if elapsed_s >= phase.seconds:
                break
            late = elapsed_s >= phase.seconds * 2 / 3
            traffic.resume()
            await asyncio.sleep(plan.adapt_late_s if late else plan.adapt_s)
            await traffic.pause()
            prompts = list(itertools.islice(measure, plan.block_late if late else plan.block))
            measured += prompts
            await take_turns(log, arms.urls, prompts, block, began_s)
            _say(phase, log, moments, time.monotonic() - began_s)
        load = traffic.load
    end = await arms.drained()
    return {
        "phase": asdict(phase),
        "seconds": time.monotonic() - began_s,
        "began_ms": began_ms,
        "turns": log.to_plain(),
        "timeline": moments,
        "adaptation": {
            "tokens": load.tokens,
            "seconds": load.seconds,
            "requests": len(load.answers),
            "errors": load.errors,
        },
        "trained_prompts": sorted({digest_of(prompt) for prompt in trained}),
        "measured_prompts": [digest_of(prompt) for prompt in measured],
        "events": [to_plain(event) for event in await arms.events(cursor)],
        "samples_start": to_plain(start.samples),
        "samples_end": to_plain(end.samples),
        "profile": to_plain(end.info.profile),
        "jobs": await arms.get("/v1/jobs"),
        "swaps": end.swaps,
        "drifts": end.training.drifts,
        "served": asdict(await arms.served()),
    }


def _say(phase: Phase, log: TurnLog, moments: list[dict[str, Any]], at_s: float) -> None:
    now = moments[-1] if moments else {}
    last = log.pairs[-5:]
    ratios = ", ".join(f"{pair.ratio('tided', 'none'):.2f}" for pair in last)
    print(
        f"phase {phase.name} ({phase.domain}) {at_s:4.0f}/{phase.seconds:.0f} s: tided/none {ratios};"
        f" gammas {now.get('gammas')}, alpha {now.get('alpha')}, rows {now.get('rows')},"
        f" {now.get('training')}, draft {now.get('draft')}",
        flush=True,
    )


async def run_phases(plan: Plan, places: Places) -> None:
    """The phases that are missing, on one stack; each is written when it ends."""
    done = places.parts(plan).first(*phase_names(plan))
    if len(done) == len(plan.phases):
        return
    if not done:
        shutil.rmtree(places.work, ignore_errors=True)
    frozen = Frozen(**_served(done[0])) if done else Frozen()
    async with LocalStack(places.work / "logs", lambda line: print(line, flush=True)) as stack:
        arms = await Arms.start(stack, plan, places, frozen)
        for index in range(len(done), len(plan.phases)):
            part = await unless_ended(stack, run_phase(arms, plan, index))
            part["resumed"] = bool(done) and index == len(done)
            parts = places.parts(plan)
            parts.write(phase_names(plan)[index], part)
            write_report(plan, places, parts.first(*phase_names(plan)), None)
            if index == 0:
                await arms.freeze(Frozen(**_served(part)))


def _served(part: dict[str, Any]) -> dict[str, Any]:
    """The static arm's draft: at least one drafted token at batch size 1, or it would be the arm without speculation."""
    gammas = part["served"]["gammas"]
    return {**part["served"], "gammas": tuple(gammas) if gammas[0] else (1, *gammas[1:])}


async def study(plan: Plan, places: Places) -> Path:
    """Every part that is missing; gives the report's path.

    Raises:
        TideError: a process of the stack could not start, or ended.
    """
    await run_phases(plan, places)
    parts = places.parts(plan)
    phases = parts.first(*phase_names(plan))
    if parts.read("identity") is None:
        # The first phase's draft: it knows the domain that identity is asked in.
        parts.write("identity", await identity.compare(plan, places, Frozen(**_served(phases[0]))))
    return write_report(plan, places, phases, parts.read("identity"))


def main(arguments: list[str] | None = None) -> None:
    """`python -m bench.shift [--size smoke] [--report]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.shift", description="The study of shifting traffic.")
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--report", action="store_true", help="only write the report again, from the raw parts")
    options = parser.parse_args(arguments)
    plan = Plan() if options.size == "full" else smoke(("code", "french"), 20)
    name = "shift" if options.size == "full" else f"shift-{options.size}"
    places = Places(options.model, Path("build") / name, report.BENCH_DIR / f"{name}-report.json")
    parts = places.parts(plan)
    identity_part = parts.read("identity")
    if options.report:
        print(write_report(plan, places, parts.first(*phase_names(plan)), identity_part))
        return
    if identity_part is not None:
        shutil.rmtree(places.work)
    print(f"report: {run(study(plan, places))}")


if __name__ == "__main__":
    main()
