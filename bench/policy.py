"""Policies in replay, drift told from faults, and what a decision costs: every generated trace and incident with several seeds, and every
trace under traces/.

`python -m bench.policy` writes build/bench/policy.json. No engine runs: time is virtual, so other load on the machine changes nothing but
the cost of a decision, which is taken in CPU time and queued as it would be on a core of its own.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import ROOT, Claim, at_least, at_most, show, write
from tided.config import SpeculationConfig
from tided.model.engines import StepCounts
from tided.policies.base import SpeculationObservation, SpeculationPolicy
from tided.policies.registry import policy_for
from tided.policies.speedup import Acceptance, smoothed
from tided.replay import incidents
from tided.replay.compare import POLICIES, Result, compare
from tided.replay.generate import FAST, GAMMA_MAX, KINDS, generate
from tided.replay.trace import SUFFIX, Trace, load

SEEDS = 3
SECONDS = 600.0
BASELINES = ("always-off", "always-on", "fixed", "static", "ema-steps")
TRACES = ROOT / "traces"
INCIDENTS = 16
"""Runs of each kind of incident."""
ENGINES, PER_S, MAX_BATCH, ROUNDS = 1000, 1000.0, 32, 10


@dataclass(frozen=True)
class Row:
    """A driver on a trace."""

    trace: str
    regime: str
    seed: int
    result: Result

    @property
    def share(self) -> float:
        """Of the clairvoyant's tokens."""
        return 1.0 - self.result.regret


def traces(seeds: int, seconds: float) -> Iterator[tuple[int, Trace]]:
    """Every trace with its seed; recorded ones have 0."""
    for kind in KINDS:
        for seed in range(seeds):
            yield seed, generate(kind, seed, seconds)
    for path in sorted(TRACES.glob(f"*{SUFFIX}")):
        yield 0, load(path)


def replayed(seeds: int, seconds: float) -> list[Row]:
    """All drivers over all traces."""
    rows: list[Row] = []
    for seed, trace in traces(seeds, seconds):
        found = compare(trace, [*BASELINES, *POLICIES, "clairvoyant"], SpeculationConfig())
        rows += [Row(found.trace, found.regime, seed, result) for result in found.results]
        print(
            f"{found.trace} {seed}: " + ", ".join(f"{r.driver} {r.over_none:.3f}x" for r in found.results), flush=True
        )
    return rows


def judged(rows: Sequence[Row]) -> list[Claim]:
    """The goals of both policies, each by its worst trace; the baselines' worst; all drivers' shares by trace."""
    claims: list[Claim] = []
    for driver in POLICIES:
        own = [row for row in rows if row.result.driver == driver]
        for regime, goal in (("moving", 0.95), ("stationary", 0.97)):
            row = min((row for row in own if row.regime == regime), key=lambda row: row.share)
            what = f"{driver}: share of the clairvoyant's tokens/s, worst {regime} trace ({row.trace})"
            claims.append(at_least(f"{driver}-{regime}", what, row.share, goal))
        for adversarial, goal in ((False, 0.98), (True, 0.95)):
            some = [row for row in own if (row.regime == "adversarial") is adversarial]
            row = min(some, key=lambda row: row.result.over_none)
            which = "adversarial" if adversarial else "other"
            what = f"{driver}: tokens/s over no speculation, worst {which} trace ({row.trace})"
            claims.append(at_least(f"{driver}-over-none-{which}", what, row.result.over_none, goal, "x"))
    for driver in BASELINES[1:]:
        own = [row for row in rows if row.result.driver == driver]
        low = min((row for row in own if row.regime != "adversarial"), key=lambda row: row.share)
        none = min(own, key=lambda row: row.result.over_none)
        value = f"{low.share:.3f} ({low.trace}); {none.result.over_none:.3f}x ({none.trace})"
        claims.append(Claim(f"{driver}-worst", f"{driver}: worst share of the clairvoyant's, worst over none", value))
    for trace in dict.fromkeys(row.trace for row in rows):
        shares = ", ".join(
            f"{driver} {sum(found) / len(found):.3f}"
            for driver in (*BASELINES, *POLICIES)
            if (found := [row.share for row in rows if row.trace == trace and row.result.driver == driver])
        )
        claims.append(
            Claim(f"trace-{trace}", f"{trace}: share of the clairvoyant's tokens/s, mean of its seeds", shares)
        )
    return claims


def told_apart(rows: Sequence[incidents.Row]) -> list[Claim]:
    """The confusion table, and its goals: over all faults, and over all drifts."""
    faults, drifts = [r for r in rows if r.incident.faulty], [r for r in rows if r.incident.drifts]
    runs, soon = sum(r.runs for r in faults), f"within {incidents.SOON_S:g} s"
    late = f"later than {incidents.UNKNOWABLE_S:g} s after they began, when their first samples are stored"
    claims = [
        at_most(
            "faults-trained",
            f"faults ({runs} runs): trainings begun of themselves {late}",
            sum(r.trained for r in faults),
            0,
        ),
        at_least(
            "faults-alarmed", f"faults: share with the right alarm {soon}", sum(r.right_soon for r in faults) / runs, 1
        ),
        at_least(
            "drifts-trained",
            f"drifts ({sum(r.runs for r in drifts)} runs): share with a training begun",
            sum(r.trained + r.trained_at_once for r in drifts) / sum(r.runs for r in drifts),
            1,
        ),
        at_most("drifts-alarmed", "drifts: runs with an alarm", sum(r.alarmed for r in drifts), 0),
        at_most("alarms-wrong", "all: runs with a wrong alarm", sum(r.wrong for r in rows), 0),
    ]
    for r in rows:
        value = (
            f"{r.runs}: alarm {r.alarmed}, training {r.trained}, training at once {r.trained_at_once}, drift {r.drifts}"
        )
        if r.median_s is not None and r.worst_s is not None:
            value += f"; alarm after {r.median_s:.0f} s, at most {r.worst_s:.0f} s"
        claims.append(Claim(f"incident-{r.incident.name.lower()}", f"{r.incident}: runs, and what followed", value))
    return claims


def cost(name: str) -> list[Claim]:
    """Observations of `ENGINES` engines in turn, `PER_S` a second, on one core: from an observation's arrival to its decision."""
    policy: SpeculationPolicy[Any] = policy_for(SpeculationConfig(policy=name))
    draw = random.Random(0)
    profiles = [
        replace(FAST, target_s=tuple(seconds * draw.uniform(0.8, 1.2) for seconds in FAST.target_s))
        for _ in range(ENGINES)
    ]
    states = [policy.start() for _ in range(ENGINES)]
    latencies: list[float] = []
    free_s, busy_s = 0.0, 0.0
    for number in range(ENGINES * ROUNDS):
        engine, turn = number % ENGINES, number // ENGINES
        measured, running, alpha = _observed(draw, turn)
        began = time.thread_time()
        seen = SpeculationObservation(
            now_s=float(turn),
            version="draft",
            profile=smoothed(profiles[engine]),
            acceptance=Acceptance.prior((alpha,) * GAMMA_MAX, 400.0),
            measured=measured,
            running=running,
            max_batch=MAX_BATCH,
            gamma_max=GAMMA_MAX,
        )
        states[engine], _ = policy.decide(states[engine], seen)
        took = time.thread_time() - began
        arrived_s = number / PER_S
        free_s = max(free_s, arrived_s) + took
        busy_s += took
        latencies.append(free_s - arrived_s)
    p99_ms = 1000 * sorted(latencies)[int(0.99 * len(latencies))]
    what = f"{name}: 1,000 engines' observations a second on one core, observation to decision, p99"
    return [
        at_most(f"{name}-p99", what, p99_ms, 20, "ms"),
        Claim(
            f"{name}-cpu", f"{name}: CPU of one decision, {MAX_BATCH} batch sizes", 1e6 * busy_s / len(latencies), "us"
        ),
    ]


def _observed(draw: random.Random, turn: int) -> tuple[tuple[StepCounts, ...], int, float]:
    """What a second of an engine looks like: (measured, running, alpha)."""
    running, gamma, alpha = draw.randint(1, MAX_BATCH), draw.choice((0, 1, 2)) if turn else 0, draw.uniform(0.1, 0.8)
    counts = tuple(
        StepCounts(batch, gamma, 10, 0.3, (5 * batch,) * (gamma + 1))
        for batch in range(running, min(running + 3, MAX_BATCH + 1))
    )
    return counts, running, alpha


def table(rows: Sequence[Row], console: Console) -> None:
    """Every trace and driver: over no speculation and share of the clairvoyant, the worst seed's."""
    found = Table(title="tokens/s over no speculation | share of the clairvoyant's; worst seed", title_justify="left")
    found.add_column("trace")
    drivers = list(dict.fromkeys(row.result.driver for row in rows))
    for driver in drivers:
        found.add_column(driver, justify="right")
    for trace in dict.fromkeys(row.trace for row in rows):
        cells: list[str] = []
        for driver in drivers:
            own = [row for row in rows if row.trace == trace and row.result.driver == driver]
            cells.append(f"{min(row.result.over_none for row in own):.3f} | {min(row.share for row in own):.3f}")
        found.add_row(trace, *cells)
    console.print(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, measure, publish."""
    parser = argparse.ArgumentParser(prog="python -m bench.policy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--incidents", type=int, default=INCIDENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args(arguments)
    rows = replayed(given.seeds, given.seconds)
    table_of_incidents = incidents.confusion(given.incidents)
    claims = [*judged(rows), *told_apart(table_of_incidents), *(claim for name in POLICIES for claim in cost(name))]
    write(
        "policy",
        claims,
        extra={
            "incidents": [asdict(found) for found in table_of_incidents],
            "rows": [asdict(replace(row, result=replace(row.result, timeline=()))) for row in rows],
        },
    )
    console = Console(width=200)
    table(rows, console)
    show("policy", claims, console)


if __name__ == "__main__":
    main()
