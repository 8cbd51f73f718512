"""What heterogeneous allocation gave and what the planner said before. Pure but for the files it reads and writes.

The prediction follows from the calibration part alone, which was measured before anything else, and from what the plan takes from earlier
reports. What was measured afterwards is put into the planner too, beside it: that tells errors of the inputs from errors of the planner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.hetero_plan import (
    AFTER,
    BEFORE,
    CALIBRATE,
    QUARTER,
    SPINNERS,
    TIDED,
    WHOLE,
    Places,
    Plan,
    part_name,
)
from bench.report import BOOTSTRAP_DRAWS, Claim, Interval, at_most, show, write
from bench.turns import Measured
from bench.usage import CLIENT
from tided.model.codec import from_plain, to_plain
from tided.model.engines import LatencyProfile
from tided.model.jobs import JobKind, Recipe
from tided.policies import planner
from tided.policies.planner import Device, Speedup, WarmUp
from tided.policies.speedup import alpha_from_length, expected_length, speedup_of_length
from tided.training.options import RECIPES

DEPLOYED = "draft-swapped"
GOAL = 0.10
"""How far what the planner said may be from what was measured."""
QUARTER_TOLERANCE = 0.03
LABELS = {WHOLE: "whole core", QUARTER: "quarter of a core"}

NOTES = [
    "ratio: tokens/s of one engine under tided, from version 0 of its draft on, with the second device training, over those of two"
    " engines without speculation, one on each device (before and after that run). Every prompt is asked once.",
    "predicted: from the calibration alone (tokens/s of each device while both serve, T(n) and D(b), the share of a request that is"
    " prefill, rows and tokens of a request, the second device's share of a core), and from earlier reports (acceptance lengths, what a"
    " training takes on a whole core).",
    "with_measured: the planner again with what was measured afterwards: the speedup of the adapted part and the seconds until the"
    " first draft.",
]


@dataclass(frozen=True)
class Served:
    """What one engine gave in a part."""

    answers: tuple[Measured, ...]
    tokens: int
    seconds: float
    errors: int
    prompt_tokens: int

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Served":
        """From a raw part."""
        answers = tuple(Measured(**answer) for answer in plain["answers"])
        return cls(answers, plain["tokens"], plain["seconds"], plain["errors"], plain["prompt_tokens"])

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def since(self, at_s: float) -> "Served":
        """Of the requests that began at this second of the part or later."""
        answers = tuple(answer for answer in self.answers if answer.at_s - answer.seconds >= at_s)
        ended_s = max((answer.at_s for answer in answers), default=0.0)
        seconds = ended_s - min((answer.at_s - answer.seconds for answer in answers), default=0.0)
        return Served(answers, sum(answer.tokens for answer in answers), seconds, 0, 0)

    def until(self, at_s: float) -> "Served":
        """Of the requests that ended by this second of the part."""
        answers = tuple(answer for answer in self.answers if answer.at_s <= at_s)
        seconds = max((answer.at_s for answer in answers), default=0.0)
        return Served(answers, sum(answer.tokens for answer in answers), seconds, 0, 0)

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Bootstrapped tokens/s: requests are drawn anew, and what there is beside them of `seconds` stays in proportion."""
        figures = np.array([(answer.tokens, answer.seconds) for answer in self.answers])
        picks = rng.integers(0, len(figures), (BOOTSTRAP_DRAWS, len(figures)))
        tokens, seconds = figures[picks].sum(axis=1).T
        return tokens / seconds * (figures[:, 1].sum() / self.seconds)


def ratio(ours: Served, theirs: Sequence[Sequence[Served]]) -> Interval:
    """Tokens/s of `ours` over the sum over engines, the mean over the runs of `theirs`, with a 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    value = ours.tokens_per_s / float(np.mean([sum(engine.tokens_per_s for engine in run) for run in theirs]))
    base = np.mean([np.sum([engine.drawn(rng) for engine in run], axis=0) for run in theirs], axis=0)
    low, high = np.quantile(ours.drawn(rng) / base, [0.025, 0.975])
    return Interval(value, float(low), float(high), len(ours.answers))


@dataclass(frozen=True)
class Inputs:
    """What the planner is given. `rates`: tokens/s of both devices. `training`: tokens that each trains a second."""

    rates: tuple[float, float]
    training: tuple[float, float]
    speedup: Speedup
    warm_up: WarmUp


def inputs_of(plan: Plan, calibrated: Mapping[str, Any]) -> Inputs:
    """From a calibration's raw part."""
    first, second = (Served.of(engine) for engine in calibrated["engines"])
    requests = len(first.answers)
    tokens = first.tokens / requests
    rows = tokens + first.prompt_tokens / requests
    needed = max(
        plan.min_rows / (rows * (1.0 - plan.held_out)),
        plan.gate_requests / plan.held_out,
        plan.gate_tokens / (tokens * plan.held_out),
    )
    recipe = RECIPES[Recipe.COLD]
    trained = needed * (1.0 - plan.held_out) * (1.0 - recipe.validation_share) * tokens * recipe.passes
    share = calibrated["cpu"]["second"] / calibrated["cpu"]["first"]
    prefill = sum(answer.ttft_s for answer in first.answers) / sum(answer.seconds for answer in first.answers)
    low, middle, high = (
        request_speedup(plan, from_plain(LatencyProfile, calibrated["profile"]), prefill, length)
        for length in plan.lengths
    )
    return Inputs(
        rates=(first.tokens_per_s, second.tokens_per_s),
        training=(plan.trained_per_s, plan.trained_per_s * share),
        speedup=Speedup(low, middle, high),
        warm_up=WarmUp(needed * first.seconds / requests, trained + plan.job_s * plan.trained_per_s),
    )


def request_speedup(plan: Plan, profile: LatencyProfile, prefill: float, length: float) -> float:
    """Eq. 5 at its best gamma for a draft whose acceptance length at gamma_max is `length`, of a request of which the share `prefill` is
    as fast as before."""
    alpha = alpha_from_length(length, plan.gamma_max)
    decoding = max(
        speedup_of_length(profile, plan.concurrency, gamma, expected_length(alpha, gamma))
        for gamma in range(plan.gamma_max + 1)
    )
    return 1.0 / (prefill + (1.0 - prefill) / decoding)


def planned(pair: str, given: Inputs, horizon_s: float | None) -> planner.Plan:
    """What the planner says of the two devices, as `tidectl plan` would: two of one kind, or one of each."""
    (first, second), (fast, slow) = given.rates, given.training
    if pair == WHOLE:
        devices = [Device("core", 2, (first + second) / 2, (fast + slow) / 2)]
    else:
        devices = [Device("core", 1, first, fast), Device("quarter", 1, second, slow)]
    return planner.plan(devices, given.speedup, warm_up=given.warm_up, horizon_s=horizon_s)


def write_report(plan: Plan, places: Places) -> Path:
    """Writes the report of the parts that there are, and shows its claims. A claim whose part has not run is absent."""
    parts = places.parts(plan)
    bodies: dict[str, Any] = {}
    claims: list[Claim] = []
    for pair in SPINNERS:
        raw = {part: parts.read(part_name(pair, part)) for part in (CALIBRATE, BEFORE, TIDED, AFTER)}
        found = {name: part for name, part in raw.items() if part is not None}
        bodies[pair] = compose(plan, pair, found)
        claims += claims_of(pair, bodies[pair])
    show(places.report.stem, claims)
    extra = {"plan": asdict(plan), **bodies, "notes": NOTES}
    return write(places.report.stem, claims, directory=places.report.parent, extra=extra)


def compose(plan: Plan, pair: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A pair's fields of the report, as far as its parts have run."""
    body: dict[str, Any] = {"cpu": {name: part["cpu"] for name, part in parts.items()}}
    prompts = [digest for part in parts.values() for digest in part["prompts"]]
    served = {name: [Served.of(engine) for engine in part["engines"]] for name, part in parts.items()}
    body["prompts_repeated"] = len(prompts) - len(set(prompts))
    body["request_errors"] = sum(engine.errors for engines in served.values() for engine in engines)
    if CALIBRATE in parts:
        given = inputs_of(plan, parts[CALIBRATE])
        body["inputs"] = to_plain(given)
        body["predicted"] = to_plain(planned(pair, given, plan.run_s))
        body["for_ever"] = to_plain(planned(pair, given, None))
        if TIDED in parts:
            body |= _measured(plan, pair, parts[TIDED], given, served)
    body["all_tokens_per_s"] = {
        name: [engine.tokens_per_s for engine in served[name]] for name in (BEFORE, AFTER) if name in served
    }
    return body


def _measured(
    plan: Plan, pair: str, part: Mapping[str, Any], given: Inputs, served: Mapping[str, Sequence[Served]]
) -> dict[str, Any]:
    [ours] = served[TIDED]
    theirs = [served[name] for name in (BEFORE, AFTER) if name in served]
    deployed = [event["at_ms"] for event in part["events"] if event["kind"] == DEPLOYED]
    first_s = (deployed[0] - part["began_ms"]) / 1000 if deployed else None
    found: dict[str, Any] = {
        "tokens_per_s": ours.tokens_per_s,
        "first_draft_s": first_s,
        "deployed": len(deployed),
        "worker_share": part["worker_share"],
        "trained": _trained(part),
        "samples": part["samples"],
        "events": part["events"],
        "timeline": part["timeline"],
    }
    if theirs:
        found["ratio"] = asdict(ratio(ours, theirs))
    adapted = ours.since(first_s) if first_s is not None else None
    if first_s is not None and adapted is not None and adapted.answers:
        steps = sum(answer.spec_steps for answer in adapted.answers)
        accepted = sum(answer.accepted for answer in adapted.answers)
        speedup = adapted.tokens_per_s / given.rates[0]
        measured = Inputs(given.rates, given.training, Speedup(speedup, speedup, speedup), WarmUp(first_s))
        found |= {
            "accept_length": 1 + accepted / steps if steps else None,
            "speedup": speedup,
            "collecting_over_calibrated": ours.until(first_s).tokens_per_s / given.rates[0],
            "with_measured": to_plain(planned(pair, measured, plan.run_s)),
        }
        if theirs:
            found["ratio_adapted"] = asdict(ratio(adapted, theirs))
    return found


def _trained(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trainings that gave a result, in the order in which they began."""
    jobs = [job for job in part["jobs"] if job["spec"]["kind"] == JobKind.TRAIN.value and job["result"]]
    return [
        {
            "began_s": (job["started_ms"] - part["began_ms"]) / 1000,
            "seconds": (job["finished_ms"] - job["started_ms"]) / 1000,
            "tokens": job["result"]["trained_tokens"],
            "tokens_per_s": job["result"]["trained_tokens"] / max(job["finished_ms"] - job["started_ms"], 1) * 1000,
            "held_out_length": (job["result"]["candidate"] or {}).get("length"),
        }
        for job in sorted(jobs, key=lambda job: job["started_ms"])
    ]


def claims_of(pair: str, body: Mapping[str, Any]) -> list[Claim]:
    """What the bench must show of a pair, as far as its parts have run."""
    claims: list[Claim] = []
    label = LABELS[pair]

    def told(id: str, what: str, value: float | int | str | None, unit: str = "") -> None:
        claims.append(Claim(f"{pair}.{id}", f"{label}: {what}", value, unit))

    if "predicted" in body:
        claims += _predictions(pair, label, body)
    for name in (BEFORE, AFTER):
        if name in body["all_tokens_per_s"]:
            rates = body["all_tokens_per_s"][name]
            told(f"all.{name}", f"two engines without speculation, {name} the run", sum(rates), "tokens/s")
    if "tokens_per_s" in body:
        told("tided", "one engine under tided and a worker, whole run", body["tokens_per_s"], "tokens/s")
        first_s = body["first_draft_s"]
        what = "until the first adapted draft served"
        told("first-draft", what, "not in this run" if first_s is None else first_s, "" if first_s is None else "s")
        told("trainings", "trainings with a result", len(body["trained"]))
    if "ratio" in body:
        claims += _ratios(pair, label, body)
    if pair == QUARTER:
        claims += _quarters(body)
    for part in (BEFORE, TIDED):
        cpu = body["cpu"].get(part)
        if cpu is not None:
            arm = "under tided" if part == TIDED else "two engines"
            told(f"cpu.{CLIENT}.{part}", f"load generator, {arm}", 100 * cpu[CLIENT], "% of a core")
    if TIDED in body["cpu"]:
        told("cpu.tided", "tided, its store and its collector", 100 * body["cpu"][TIDED]["tided"], "% of a core")
    if body["cpu"]:
        for name, what in (("prompts_repeated", "prompts asked more than once"), ("request_errors", "failed requests")):
            claims.append(at_most(f"{pair}.{name}", f"{label}: {what}", body[name], 0))
    if "samples" in body:
        samples = body["samples"]
        claims.append(at_most(f"{pair}.lost", f"{label}: samples lost", samples["lost"], 0))
    return claims


def _predictions(pair: str, label: str, body: Mapping[str, Any]) -> list[Claim]:
    given, found, ever = body["inputs"], body["predicted"], body["for_ever"]
    best = found["best"]
    first, second = given["rates"]
    low, middle, high = best["gain"]
    hour, _, week = (outlook["gain"] for outlook in found["outlook"])
    return [
        Claim(f"{pair}.rate.first", f"{label}: calibrated, the first device", first, "tokens/s"),
        Claim(f"{pair}.rate.second", f"{label}: calibrated, the second device", second, "tokens/s"),
        Claim(
            f"{pair}.speedup",
            f"{label}: predicted speedup of serving with an adapted draft",
            given["speedup"]["middle"],
            "x",
        ),
        Claim(f"{pair}.warm-up", f"{label}: predicted seconds until the first adapted draft", best["warm_up_s"], "s"),
        Claim(
            f"{pair}.predicted",
            f"{label}: predicted ratio over the run ({low:.2f} to {high:.2f})",
            middle,
            "x",
        ),
        Claim(f"{pair}.break-even", f"{label}: break-even speedup for ever", ever["best"]["break_even"], "x"),
        Claim(f"{pair}.hour", f"{label}: predicted ratio over an hour", hour, "x"),
        Claim(f"{pair}.week", f"{label}: predicted ratio over a week", week, "x"),
        Claim(f"{pair}.said", f"{label}: what the planner said of the run", found["reason"]),
    ]


def _ratios(pair: str, label: str, body: Mapping[str, Any]) -> list[Claim]:
    found, predicted = body["ratio"], body["predicted"]["best"]["gain"][1]
    measured = found["median"]
    what = f"{label}: one engine and a worker over two engines, whole run (95% {found['low']:.2f}..{found['high']:.2f})"
    claims = [
        Claim(f"{pair}.ratio", what, measured, "x"),
        at_most(f"{pair}.error", f"{label}: predicted ratio against it", abs(predicted / measured - 1), GOAL),
        Claim(
            f"{pair}.warned",
            f"{label}: where it is below 1, the planner had said so",
            f"{predicted:.2f} said, {measured:.2f} measured",
            goal="below 1 is said",
            met=measured >= 1.0 or predicted < 1.0,
        ),
    ]
    if "with_measured" in body:
        again = body["with_measured"]["best"]["gain"][1]
        what = f"{label}: the planner with speedup and warm-up as measured, against it"
        claims += [
            Claim(f"{pair}.speedup.measured", f"{label}: measured speedup once adapted", body["speedup"], "x"),
            Claim(f"{pair}.accept", f"{label}: acceptance length once adapted", body["accept_length"]),
            Claim(f"{pair}.error.measured", what, abs(again / measured - 1)),
        ]
    if "ratio_adapted" in body:
        found = body["ratio_adapted"]
        what = f"{label}: the same ratio once adapted (95% {found['low']:.2f}..{found['high']:.2f})"
        predicted = body["for_ever"]["best"]["gain"][1]
        claims += [
            Claim(f"{pair}.ratio.adapted", what, found["median"], "x"),
            Claim(f"{pair}.predicted.adapted", f"{label}: predicted ratio for ever", predicted, "x"),
        ]
    return claims


def _quarters(body: Mapping[str, Any]) -> list[Claim]:
    """That the second device really is a quarter of a core, serving and training."""
    shares = {
        f"engine.{part}": (f"the second engine's share of a core, {part} the run", body["cpu"][part]["second"])
        for part in (BEFORE, AFTER)
        if part in body["cpu"]
    }
    if body.get("worker_share") is not None:
        shares["worker"] = ("the worker's share of a core while it trains", body["worker_share"])
    return [
        Claim(
            f"{QUARTER}.share.{id}",
            f"{LABELS[QUARTER]}: {what}",
            share,
            goal=f"0.25 +- {QUARTER_TOLERANCE:g}",
            met=abs(share - 0.25) <= QUARTER_TOLERANCE,
        )
        for id, (what, share) in shares.items()
    ]
