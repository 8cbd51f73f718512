"""The study's report from its raw parts. Pure, so that it can be written again without running anything."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import turns
from bench.report import Claim, at_least, at_most, paired_ratio, show, write
from bench.shift_plan import Places, Plan
from bench.turns import Measured, Pair, TurnLog
from tided.model.codec import from_plain
from tided.model.engines import LatencyProfile
from tided.policies.speedup import speedup_of_length

DEPLOYED = "draft-swapped"
SWAPS = (DEPLOYED, "draft-live", "draft-restoring", "draft-rolled-back", "deployment-failed")


def write_report(
    plan: Plan, places: Places, parts: Sequence[Mapping[str, Any]], identity: Mapping[str, Any] | None
) -> Path:
    """Writes the report of the parts that there are, and shows its claims. A claim whose part has not run is absent."""
    body = compose(parts, identity)
    claims = claims_of(body)
    show("shift", claims)
    return write(
        places.report.stem, claims, directory=places.report.parent, extra={"plan": asdict(plan), **body, "notes": NOTES}
    )


NOTES = [
    "static: the draft and schedule that tided served at the end of phase 1, frozen. In phase 1 it runs without speculation,"
    " so its ratio to none there is the noise of the method.",
    "ratio_*: medians over paired prompts of tokens/s of the whole request, prefill included; predicted_speedup is Eq. 5, which"
    " speaks of decoding alone, for each prompt's own acceptance length; decode_ratio_to_predicted compares prompt by prompt.",
]


def compose(parts: Sequence[Mapping[str, Any]], identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """The report's fields. Times are seconds since the phase began."""
    logs = [TurnLog.from_plain(part["turns"]) for part in parts]
    phases = [_phase(part, log) for part, log in zip(parts, logs, strict=True)]
    trained = {digest for part in parts for digest in part["trained_prompts"]}
    body: dict[str, Any] = {
        "phases": phases,
        "predicted_speedup": phases[0]["predicted_speedup"] if phases else None,
        "prompt_overlaps": sum(digest in trained for part in parts for digest in part["measured_prompts"]),
        "samples": _samples(parts),
        "swaps": _events(parts, SWAPS),
        "jobs": _jobs(parts),
        "drifts": _events(parts, ("drift-detected",)),
        "gates": _events(parts, ("gate-decided",)),
        "events": _events(parts, None),
        "rates": [_rates(part) for part in parts],
        "windows": [
            {"phase": part["phase"]["name"], **_plain(window)}
            for part, log in zip(parts, logs, strict=True)
            for window in turns.windows(log.pairs)
        ],
        "request_errors": sum(
            len(log.errors) + part["adaptation"]["errors"] for part, log in zip(parts, logs, strict=True)
        ),
        "resumed": [part["phase"]["name"] for part in parts if part.get("resumed")],
    }
    if identity is not None:
        body |= {
            "greedy_compared": identity["compared"],
            "greedy_mismatches": identity["mismatches"],
            "greedy_ties": identity["ties"],
            "greedy_tokens": identity["tokens"],
            "greedy_gaps": identity["gaps"],
        }
    return body


def _phase(part: Mapping[str, Any], log: TurnLog) -> dict[str, Any]:
    seconds = part["phase"]["seconds"]
    pairs, late = log.pairs, turns.last_third(log.pairs, seconds)
    first_block = [pair for pair in pairs if pair.block == 0]
    found = turns.windows(pairs)
    result: dict[str, Any] = {
        "name": part["phase"]["name"],
        "domain": part["phase"]["domain"],
        "seconds": seconds,
        "pairs": len(pairs),
        "pairs_last_third": len(late),
        "accept_length_start": turns.acceptance(first_block, "tided"),
        "accept_length_end": turns.acceptance(late, "tided"),
        "static_accept_length_end": turns.acceptance(late, "static"),
        "tokens_per_s": _tokens_per_s(late, "tided"),
        "none_tokens_per_s": _tokens_per_s(late, "none"),
        "static_tokens_per_s": _tokens_per_s(late, "static"),
        "worst_30s_ratio_to_none": turns.worst(found),
        "windows": len(found),
        "decode_ratio_to_none": turns.decode_ratio(late, "tided", "none"),
        **_prediction(part, late),
    }
    for name, chosen in (("", late), ("_whole", pairs)):
        for other in ("none", "static"):
            interval = turns.ratio(chosen, "tided", other)
            result[f"ratio_to_{other}{name}"] = interval.median if interval else None
            result[f"ratio_to_{other}{name}_interval"] = [interval.low, interval.high] if interval else None
    result["static_ratio_to_none"] = _median(turns.ratio(late, "static", "none"))
    return result


def _median(interval: Any) -> float | None:
    return interval.median if interval else None


def _tokens_per_s(pairs: Sequence[Pair], arm: str) -> float | None:
    return statistics.median(pair.answers[arm].tokens_per_s for pair in pairs) if pairs else None


def _predicted(profile: LatencyProfile, answer: Measured) -> float:
    """Eq. 5 at batch size 1 from this run's profile and the answer's own acceptance length."""
    length = 1 + answer.accepted / answer.spec_steps
    # An answer may have used two gammas: then the step's cost is between theirs, in the proportion in which they were drafted.
    low, share = divmod(answer.drafted / answer.spec_steps, 1.0)
    costs = [length / speedup_of_length(profile, 1, int(low) + more, length) for more in (0, 1)]
    return length / ((1 - share) * costs[0] + share * costs[1])


def _prediction(part: Mapping[str, Any], late: Sequence[Pair]) -> dict[str, Any]:
    """Eq. 5 against what was measured, pair by pair: acceptance differs from prompt to prompt, and with it the prediction."""
    drafted = [pair for pair in late if pair.answers["tided"].spec_steps]
    if not drafted or part["profile"] is None:
        return {"predicted_speedup": None, "decode_ratio_to_predicted": None}
    profile = from_plain(LatencyProfile, part["profile"])
    predicted = [_predicted(profile, pair.answers["tided"]) for pair in drafted]
    measured = [
        pair.answers["tided"].decode_tokens_per_s / pair.answers["none"].decode_tokens_per_s for pair in drafted
    ]
    interval = paired_ratio(measured, predicted)
    return {
        "predicted_speedup": statistics.median(predicted),
        "decode_ratio_to_predicted": interval.median,
        "decode_ratio_to_predicted_interval": [interval.low, interval.high],
    }


def _samples(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = ("tapped", "stored", "shed", "lost", "in_flight", "duplicated")
    # A resumed run has a new incarnation of the engine, whose totals begin at 0.
    last = dict[str, int]()
    for index, part in enumerate(parts):
        newest = index + 1 == len(parts) or parts[index + 1].get("resumed", False)
        if newest:
            for name in names:
                last[name] = last.get(name, 0) + part["samples_end"][name]
    return last


def _events(parts: Sequence[Mapping[str, Any]], kinds: Sequence[str] | None) -> list[dict[str, Any]]:
    return [
        {
            "phase": part["phase"]["name"],
            "at_s": round((event["at_ms"] - part["began_ms"]) / 1000, 1),
            "kind": event["kind"],
            "message": event["message"],
            "data": event["data"],
        }
        for part in parts
        for event in part["events"]
        if kinds is None or event["kind"] in kinds
    ]


def _jobs(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_id = {job["id"]: job for part in parts for job in part["jobs"]}
    found: list[dict[str, Any]] = []
    for job in sorted(by_id.values(), key=lambda job: job["created_ms"]):
        result = job["result"] or {}
        found.append(
            {
                "id": job["id"],
                "kind": job["spec"]["kind"],
                "recipe": job["spec"]["recipe"],
                "state": job["state"],
                "attempts": job["attempt"],
                "wait_s": (job["started_ms"] - job["created_ms"]) / 1000 if job["started_ms"] else None,
                "seconds": result.get("seconds"),
                "trained_tokens": result.get("trained_tokens"),
                "metrics": result.get("metrics", {}),
            }
        )
    return found


def _rates(part: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens a minute: generated by the adaptation traffic while it ran, tapped over the phase, trained while a job ran."""
    adaptation, seconds = part["adaptation"], part["seconds"]
    start, end = part["samples_start"], part["samples_end"]
    trained = [job["result"] for job in part["jobs"] if job["result"] and job["result"]["seconds"]]
    return {
        "phase": part["phase"]["name"],
        "generated_per_min": 60 * adaptation["tokens"] / adaptation["seconds"] if adaptation["seconds"] else 0.0,
        "tapped_per_min": 60 * max(0, end["tapped"] - start["tapped"]) / seconds,
        "trained_per_min": 60 * sum(r["trained_tokens"] for r in trained) / sum(r["seconds"] for r in trained)
        if trained
        else None,
    }


def _plain(window: turns.Window) -> dict[str, Any]:
    return {
        "start_s": round(window.start_s, 1),
        "end_s": round(window.end_s, 1),
        "ratio": window.ratio_to_none.median,
        "low": window.ratio_to_none.low,
        "high": window.ratio_to_none.high,
        "pairs": window.ratio_to_none.pairs,
    }


def claims_of(body: Mapping[str, Any]) -> list[Claim]:
    """What the study must show, each as far as its part has run."""
    claims: list[Claim] = []
    phases: Sequence[Mapping[str, Any]] = body["phases"]

    def least(id: str, what: str, value: float | None, goal: float, unit: str = "") -> None:
        claims.append(at_least(id, what, value, goal, unit) if value is not None else _unmet(id, what, f">= {goal:g}"))

    if phases:
        one = phases[0]
        least("phase1.accept", "phase 1: acceptance length on unseen prompts", one["accept_length_end"], 1.8)
        least("phase1.ratio", "phase 1: tokens/s over no speculation, concurrency 1", one["ratio_to_none"], 1.2, "x")
        if one["decode_ratio_to_predicted"]:
            error = abs(one["decode_ratio_to_predicted"] - 1)
            claims.append(at_most("phase1.eq5", "phase 1: error of Eq. 5 for the speed of decoding", error, 0.09))
    if len(phases) > 1:
        two = phases[1]
        deployed = sum(swap["phase"] == two["name"] and swap["kind"] == DEPLOYED for swap in body["swaps"])
        claims.append(at_least("phase2.swap", "phase 2: drafts deployed within the phase", deployed, 1))
        ours, static = two["accept_length_end"], two["static_accept_length_end"]
        gain = ours / static if ours and static else None
        least("phase2.accept", "phase 2: acceptance over the static draft's", gain, 1.4, "x")
        least("phase2.ratio", "phase 2: tokens/s over the static draft's", two["ratio_to_static"], 1.15, "x")
    for phase in phases:
        name, what = f"phase{phase['name']}.worst", f"phase {phase['name']}: worst window of 30 s over no speculation"
        least(name, what, phase["worst_30s_ratio_to_none"], 0.93, "x")
    if "greedy_compared" in body:
        claims.append(at_least("identity.compared", "greedy answers compared in fp32", body["greedy_compared"], 100))
        claims.append(at_most("identity.mismatches", "of them different, ties aside", body["greedy_mismatches"], 0))
        claims.append(Claim("identity.ties", "of them different by a tie", body["greedy_ties"]))
    if phases:
        samples = body["samples"]
        parts = samples["stored"] + samples["shed"] + samples["lost"] + samples["in_flight"]
        claims.append(
            at_most("samples.sum", "tapped - (stored + shed + lost + in flight)", abs(samples["tapped"] - parts), 0)
        )
        for name in ("lost", "duplicated"):
            claims.append(at_most(f"samples.{name}", f"samples {name}", samples[name], 0))
        claims.append(
            at_most("prompts.overlap", "measurement prompts that were trained on", body["prompt_overlaps"], 0)
        )
        claims.append(at_most("requests.errors", "failed requests", body["request_errors"], 0))
    return claims


def _unmet(id: str, what: str, goal: str) -> Claim:
    """A claim whose figure does not exist, because what it measures did not happen: not met."""
    return Claim(id, what, "none", "", goal, False)
