"""The claims of the study of shifting traffic on real servers, from its raw parts. Pure: they can be written again without a run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import turns
from bench.engines.shift_plan import NONE, OWN, STATIC, TIDED, Plan
from bench.report import BOOTSTRAP_DRAWS, Claim, Interval, at_least, at_most, show, write
from bench.turns import Pair, TurnLog

DRIFT, LEARN = "drift", "learn"


def write_report(name: str, plan: Plan, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Writes and shows the claims of the parts that there are. What has not run is absent."""
    claims = claims_of(plan, parts)
    show(name, claims)
    return write(name, claims, extra={"plan": asdict(plan), "parts": [_summary(part) for part in parts]})


def claims_of(plan: Plan, parts: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """In the order of the parts, then what holds for all of them."""
    claims: list[Claim] = []
    for part in parts:
        claims += _part_claims(plan, part)
    frozen = [pair for part in parts if STATIC in part["part"]["arms"] for pair in _log(part, 1).pairs]
    if len(parts) == len(plan.parts) and plan.kind == "vllm":
        whole = throughput_ratio(frozen, TIDED, STATIC)
        what = f"concurrency 1, tokens/s over the static draft's, all parts that have one{_interval(whole)}"
        claims.append(at_least("run.static.1", what, whole.median, 1.15, "x"))
    if parts:
        claims += _run_claims(parts)
    return claims


def throughput_ratio(pairs: Sequence[Pair], ours: str, theirs: str) -> Interval:
    """All tokens over all seconds, ours over theirs: each pair counts by its length. Pairs resampled with a fixed seed."""
    table = np.array(
        [
            [p.answers[arm].tokens if what else p.answers[arm].seconds for arm in (ours, theirs) for what in (1, 0)]
            for p in pairs
        ]
    )
    picks = np.random.default_rng(0).integers(0, len(pairs), (BOOTSTRAP_DRAWS, len(pairs)))

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    low, high = np.quantile(ratio(table[picks].sum(axis=1)), [0.025, 0.975])
    return Interval(float(ratio(table.sum(axis=0))), float(low), float(high), len(pairs))


def _part_claims(plan: Plan, part: Mapping[str, Any]) -> list[Claim]:
    name = part["part"]["name"]
    label = f"{name} ({part['part']['domain']})"
    claims: list[Claim] = []
    for concurrency in plan.turns:
        pairs = _log(part, concurrency).pairs
        adapted = pairs if name == "settled" else turns.last_third(pairs, part["part"]["seconds"])
        claims += _speeds(part, label, concurrency, adapted)
        claims += _lengths(part, label, concurrency, adapted)
        if concurrency > 1 and NONE in part["part"]["arms"]:
            claims += _windows(part, label, concurrency, pairs)
    swaps = sum(event["kind"] == "draft-swapped" for event in part["events"])
    what = f"{label}: drafts swapped in while serving"
    must = name in (LEARN, DRIFT)
    claims.append(at_least(f"{name}.swaps", what, swaps, 1) if must else Claim(f"{name}.swaps", what, swaps))
    return claims


def _speeds(part: Mapping[str, Any], label: str, concurrency: int, pairs: Sequence[Pair]) -> list[Claim]:
    """Each arm over no speculation."""
    claims: list[Claim] = []
    arms = part["part"]["arms"]
    for arm in (TIDED, OWN, STATIC):
        found = turns.ratio(pairs, arm, NONE) if {arm, NONE} <= set(arms) else None
        if found is not None:
            id = f"{part['part']['name']}.{arm}.{concurrency}"
            what = f"{label}: {arm} over none, tokens/s, concurrency {concurrency}, adapted{_interval(found)}"
            goal = arm == TIDED and concurrency == 1
            claims.append(at_least(id, what, found.median, 1.3, "x") if goal else Claim(id, what, found.median, "x"))
    return claims


def _lengths(part: Mapping[str, Any], label: str, concurrency: int, pairs: Sequence[Pair]) -> list[Claim]:
    """Acceptance of the arms that drafted."""
    claims: list[Claim] = []
    for arm in (TIDED, STATIC):
        length = turns.acceptance(pairs, arm) if arm in part["part"]["arms"] else None
        if length is not None:
            what = f"{label}: acceptance length on unseen prompts, {arm}, concurrency {concurrency}"
            claims.append(Claim(f"{part['part']['name']}.length.{arm}.{concurrency}", what, length))
    return claims


def _windows(part: Mapping[str, Any], label: str, concurrency: int, pairs: Sequence[Pair]) -> list[Claim]:
    """Whether there is a stretch in which tided was surely slower."""
    name = part["part"]["name"]
    found = turns.windows(pairs, TIDED, NONE)
    least = turns.worst(found)
    if least is None:
        return []
    what = (
        f"{label}: worst window of 30 s (upper end, {len(found)} windows), tided over none, concurrency {concurrency}"
    )
    return [at_least(f"{name}.worst.{concurrency}", what, least, 0.95 if name == DRIFT else 0.97, "x")]


def _run_claims(parts: Sequence[Mapping[str, Any]]) -> list[Claim]:
    trained = {digest for part in parts for digest in part["trained_prompts"]}
    overlaps = sum(digest in trained for part in parts for digest in part["measured_prompts"])
    failed = sum(len(log["errors"]) for part in parts for log in part["turns"].values())
    failed += sum(part["adaptation"]["errors"] for part in parts)
    samples = parts[-1]["samples"]
    missing = samples["tapped"] - sum(samples[key] for key in ("stored", "shed", "lost", "in_flight"))
    return [
        at_most("run.overlap", "measurement prompts that were trained on", overlaps, 0),
        at_most("run.failed", "failed requests", failed, 0),
        at_most("run.lost", "samples lost", samples["lost"], 0),
        at_most("run.sum", "tapped - (stored + shed + lost + in flight)", abs(missing), 0),
        Claim("run.tapped", "rows tapped", samples["tapped"]),
    ]


def _log(part: Mapping[str, Any], concurrency: int) -> TurnLog:
    return TurnLog.from_plain(part["turns"][str(concurrency)])


def _interval(found: Interval) -> str:
    return f" (95% {found.low:.2f}..{found.high:.2f})"


def _summary(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the report may want beside its claims; prompts and turns stay in the raw part."""
    kept = ("part", "seconds", "events", "timeline", "jobs", "profile", "served", "samples")
    return {key: part[key] for key in kept}
