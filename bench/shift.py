"""The study: three domains' traffic in turn, and what no speculation, a frozen draft and tided make of it.

`python -m bench.shift` runs the parts that are missing (the phases in order, then the identity part), writes each part's raw
figures under build/shift/ as soon as it is done, and the report after each. A complete study begins anew.

Arms: none (no speculation); static (the draft and the schedule that tided served at the end of phase 1, frozen; in phase 1 there is
no such draft yet, so it runs without speculation there, and its ratio to none shows the noise of the method); tided.
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import identity, report
from bench.arms import Arms, Frozen
from bench.control import moment
from bench.load import Traffic
from bench.model import DEFAULT
from bench.shift_plan import Phase, Places, Plan, smoke
from bench.shift_report import write_report
from bench.traffic import DOMAINS, Prompt, Split
from bench.turns import TurnLog, take_turns
from tided.local import LocalStack
from tided.model.codec import to_plain
from tided.model.errors import TideError

SAMPLE_EVERY_S = 2.0
MEASURE_STRIDE = 300
"""Each phase's measurement prompts begin this far behind those of the phase before, so that a domain's return meets new ones."""


def prompts_of(phase: Phase, split: Split, index: int, max_tokens: int) -> Iterator[Prompt]:
    """The phase's prompts of one split, without end."""
    domain = DOMAINS[phase.domain]
    source = domain.endless(split, seed=index) if split == "train" else itertools.cycle(domain.prompts(split))
    skip = 0 if split == "train" else index * MEASURE_STRIDE
    for prompt in itertools.islice(source, skip, None):
        yield replace(prompt, max_tokens=min(max_tokens, prompt.max_tokens))


async def run_phase(arms: Arms, plan: Plan, index: int) -> dict[str, Any]:
    """One phase; gives its raw part."""
    phase = plan.phases[index]
    trained: list[Prompt] = []
    measured: list[Prompt] = []
    log, timeline = TurnLog(), list[dict[str, Any]]()
    newest = await arms.events("")
    cursor = newest[-1].id if newest else ""
    start, began_s, began_ms = await arms.engine(), time.monotonic(), round(time.time() * 1000)
    measure = prompts_of(phase, "measure", index, plan.max_tokens)
    train = _noting(prompts_of(phase, "train", index, plan.max_tokens), trained)
    watching = asyncio.create_task(_watch(arms, timeline, began_s))
    try:
        async with Traffic(arms.urls["tided"], train, plan.concurrency) as traffic:
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
                _say(phase, log, timeline, time.monotonic() - began_s)
            load = traffic.load
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    end = await arms.drained()
    return {
        "plan": plan.digest,
        "phase": asdict(phase),
        "seconds": time.monotonic() - began_s,
        "began_ms": began_ms,
        "turns": log.to_plain(),
        "timeline": timeline,
        "adaptation": {
            "tokens": load.tokens,
            "seconds": load.seconds,
            "requests": len(load.answers),
            "errors": load.errors,
        },
        "trained_prompts": sorted({_digest(prompt) for prompt in trained}),
        "measured_prompts": [_digest(prompt) for prompt in measured],
        "events": [to_plain(event) for event in await arms.events(cursor)],
        "samples_start": to_plain(start.samples),
        "samples_end": to_plain(end.samples),
        "profile": to_plain(end.info.profile),
        "jobs": await arms.get("/v1/jobs"),
        "swaps": end.swaps,
        "drifts": end.training.drifts,
        "served": asdict(await arms.served()),
    }


def _noting(source: Iterator[Prompt], into: list[Prompt]) -> Iterator[Prompt]:
    for prompt in source:
        into.append(prompt)
        yield prompt


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(f"{prompt.domain}\n{prompt.user}".encode()).hexdigest()[:20]


async def _watch(arms: Arms, timeline: list[dict[str, Any]], began_s: float) -> None:
    while True:
        # A tided that is busy for a moment leaves a gap in the timeline and nothing else.
        with contextlib.suppress(TideError):
            engine = await arms.engine()
            timeline.append({"at_s": round(time.monotonic() - began_s, 1), **moment(engine)})
        await asyncio.sleep(SAMPLE_EVERY_S)


def _say(phase: Phase, log: TurnLog, timeline: list[dict[str, Any]], at_s: float) -> None:
    now = timeline[-1] if timeline else {}
    last = log.pairs[-5:]
    ratios = ", ".join(f"{pair.ratio('tided', 'none'):.2f}" for pair in last)
    print(
        f"phase {phase.name} ({phase.domain}) {at_s:4.0f}/{phase.seconds:.0f} s: tided/none {ratios};"
        f" gammas {now.get('gammas')}, alpha {now.get('alpha')}, rows {now.get('rows')},"
        f" {now.get('training')}, draft {now.get('draft')}",
        flush=True,
    )


def read_part(places: Places, plan: Plan, name: str) -> dict[str, Any] | None:
    """A part's raw figures; None when it has not run under this plan."""
    try:
        part: dict[str, Any] = json.loads(places.part(name).read_text())
    except FileNotFoundError:
        return None
    return part if part["plan"] == plan.digest else None


def phase_parts(places: Places, plan: Plan) -> list[dict[str, Any]]:
    """The phases that have run, from the first up to the first gap."""
    parts = (read_part(places, plan, f"phase-{phase.name}") for phase in plan.phases)
    return [part for part in itertools.takewhile(lambda part: part is not None, parts) if part is not None]


async def run_phases(plan: Plan, places: Places) -> None:
    """The phases that are missing, on one stack; each is written when it ends."""
    done = phase_parts(places, plan)
    if len(done) == len(plan.phases):
        return
    if not done:
        shutil.rmtree(places.work, ignore_errors=True)
    frozen = Frozen(**_served(done[0])) if done else Frozen()
    async with LocalStack(places.work / "logs", lambda line: print(line, flush=True)) as stack:
        arms = await Arms.start(stack, plan, places, frozen)
        for index in range(len(done), len(plan.phases)):
            part = await _unless_ended(stack, run_phase(arms, plan, index))
            part["resumed"] = bool(done) and index == len(done)
            report.write_json(places.part(f"phase-{plan.phases[index].name}"), part)
            write_report(plan, places, phase_parts(places, plan), None)
            if index == 0:
                await arms.freeze(Frozen(**_served(part)))


async def _unless_ended(stack: LocalStack, work: Any) -> Any:
    """`work`'s result, or `TideError` when a process of the stack ends before it."""
    working, ended = asyncio.ensure_future(work), asyncio.create_task(stack.ended())
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise TideError(ended.result())
        return working.result()
    finally:
        for task in (working, ended):
            task.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


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
    parts = phase_parts(places, plan)
    if read_part(places, plan, "identity") is None:
        # The first phase's draft: it knows the domain that identity is asked in.
        compared = await identity.compare(plan, places, Frozen(**_served(parts[0])))
        report.write_json(places.part("identity"), {"plan": plan.digest, **compared})
    return write_report(plan, places, parts, read_part(places, plan, "identity"))


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
    identity_part = read_part(places, plan, "identity")
    if options.report:
        print(write_report(plan, places, phase_parts(places, plan), identity_part))
        return
    if identity_part is not None:
        shutil.rmtree(places.work)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        path = asyncio.run(study(plan, places))
    except TideError as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on with the parts that are missing")
    print(f"report: {path}")


if __name__ == "__main__":
    main()
