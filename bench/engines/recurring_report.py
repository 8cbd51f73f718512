"""The claims of the study of recurring domains, from its raw parts. Pure: they can be written again without a run.

Acceptance length is that of all request-steps of a window by the time of the engine's reports. A domain's best is that of the best window
of BEST_S in its first phase. It has recovered at the first second from which a window of WINDOW_S has at least RECOVERED of the best. With
eight requests at a time, windows of 10 s differ by 8% while nothing changes, and of 30 s by 4%.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.engines.recurring_plan import POOL, RETRAIN, Plan
from bench.report import Claim, at_least, at_most, show, write

FIRST_S, WINDOW_S, BEST_S = 10, 30, 60
RECOVERED = 0.95
GOAL = 5.0
EVENTS = ("drift-detected", "pool-scored", "pool-switched", "pool-switch-undone", "training-started", "training-ended")


@dataclass(frozen=True)
class Seen:
    """One phase, by seconds since its traffic began. `tokens[i]`, `steps[i]`: emitted, and request-steps, in second i."""

    domain: str
    tokens: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def seconds(self) -> int:
        return len(self.steps)

    def length(self, start_s: int, width_s: int) -> float:
        """Acceptance length of a window; 0.0 when nothing was drafted in it."""
        steps = sum(self.steps[start_s : start_s + width_s])
        return sum(self.tokens[start_s : start_s + width_s]) / steps if steps else 0.0

    @property
    def best(self) -> float:
        width_s = min(BEST_S, self.seconds)
        return max(self.length(s, width_s) for s in range(self.seconds - width_s + 1))

    def recovered_s(self, best: float) -> int | None:
        """Seconds until acceptance is back at RECOVERED of `best`; None when it did not come to that."""
        starts = range(self.seconds - WINDOW_S + 1)
        return next((s for s in starts if self.length(s, WINDOW_S) >= RECOVERED * best), None)


@dataclass(frozen=True)
class Recovery:
    """Of one phase. `seconds` is the whole phase when acceptance was `back` at no time."""

    seconds: int
    back: bool

    @property
    def words(self) -> str:
        return "" if self.back else f"; not within the phase, counted as its {self.seconds} s"


def write_report(name: str, plan: Plan, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Writes and shows the claims of the parts that there are. What has not run is absent."""
    claims = claims_of(parts)
    show(name, claims)
    return write(name, claims, extra={"plan": asdict(plan), "arms": [_summary(part) for part in parts]})


def phases_of(part: Mapping[str, Any]) -> list[Seen]:
    """Its phases by second. A report counts where it was written: it covers the moment before."""
    bounds = [*part["changed_ms"], part["ended_ms"]]
    found: list[Seen] = []
    for phase, (began_ms, ended_ms) in zip(part["phases"], pairwise(bounds), strict=True):
        seconds = (ended_ms - began_ms) // 1000
        tokens, steps = [0] * seconds, [0] * seconds
        for report in part["reports"]:
            second = (report["at_ms"] - began_ms) // 1000
            if 0 <= second < seconds:
                tokens[second] += report["steps"] + report["accepted"]
                steps[second] += report["steps"]
        found.append(Seen(phase["domain"], tuple(tokens), tuple(steps)))
    return found


def recoveries(phases: Sequence[Seen]) -> list[Recovery]:
    """Of each phase, towards the best of its domain's first one."""
    best: dict[str, float] = {}
    found: list[Recovery] = []
    for phase in phases:
        seconds = phase.recovered_s(best.setdefault(phase.domain, phase.best))
        found.append(Recovery(phase.seconds if seconds is None else seconds, seconds is not None))
    return found


def claims_of(parts: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """How each arm went, then the arms against each other."""
    claims: list[Claim] = []
    for part in parts:
        claims += _arm_claims(part)
    arms = {part["arm"]: recoveries(phases_of(part)) for part in parts}
    if POOL in arms:
        pool = arms[POOL]
        if RETRAIN in arms:
            claims.append(_faster("code", "its second phase without pool and replay", arms[RETRAIN][2], pool[2]))
        claims.append(_faster("french", "its first phase", pool[1], pool[3]))
    return claims


def _faster(domain: str, slow_in: str, slow: Recovery, fast: Recovery) -> Claim:
    """A recovery within the first second counts as one second: that is the resolution."""
    what = f"{domain}: recovery by retraining ({slow_in}) over recovery with the pool{slow.words}{fast.words}"
    return at_least(f"faster.{domain}", what, max(1, slow.seconds) / max(1, fast.seconds), GOAL, "x")


def _arm_claims(part: Mapping[str, Any]) -> list[Claim]:
    arm, phases = part["arm"], phases_of(part)
    claims: list[Claim] = []
    for number, (phase, recovery) in enumerate(zip(phases, recoveries(phases), strict=True), start=1):
        label = f"{arm}, phase {number} ({phase.domain})"
        again = phase.domain in [earlier.domain for earlier in phases[: number - 1]]
        towards = "its first phase's best" if again else "its best"
        claims += [
            Claim(f"{arm}.{number}.first", f"{label}: acceptance length, first {FIRST_S} s", phase.length(0, FIRST_S)),
            Claim(f"{arm}.{number}.best", f"{label}: best window of {BEST_S} s", phase.best),
            Claim(
                f"{arm}.{number}.recovery",
                f"{label}: until {RECOVERED:.0%} of {towards}{recovery.words}",
                recovery.seconds,
                "s",
            ),
            Claim(f"{arm}.{number}.drafts", f"{label}: drafts served", " -> ".join(_drafts(part, number - 1))),
        ]
    counts = ", ".join(f"{sum(event['kind'] == kind for event in part['events'])} {kind}" for kind in EVENTS)
    samples = part["samples"]
    missing = samples["tapped"] - sum(samples[key] for key in ("stored", "shed", "lost", "in_flight"))
    return [
        *claims,
        Claim(f"{arm}.events", f"{arm}: events", counts),
        at_most(f"{arm}.overlap", f"{arm}: prompts of a domain's return that were asked before", _overlaps(part), 0),
        at_most(f"{arm}.failed", f"{arm}: failed requests of {part['requests']}", part["errors"], 0),
        at_most(f"{arm}.lost", f"{arm}: samples lost", samples["lost"], 0),
        at_most(f"{arm}.sum", f"{arm}: tapped - (stored + shed + lost + in flight)", abs(missing), 0),
    ]


def _drafts(part: Mapping[str, Any], index: int) -> list[str]:
    """Names of the drafts of one phase in the order in which they served."""
    bounds = [*part["changed_ms"], part["ended_ms"]]
    names = {draft["version"]: f"{draft['lineage']}@{draft['number']}" for draft in part["drafts"]}
    served = [r["version"] for r in part["reports"] if r["steps"] and bounds[index] <= r["at_ms"] < bounds[index + 1]]
    changes = [version for before, version in pairwise(["", *served]) if version != before]
    return [names.get(version, version[:12]) for version in changes]


def _overlaps(part: Mapping[str, Any]) -> int:
    earlier: set[str] = set()
    overlaps = 0
    for prompts in part["prompts"]:
        overlaps += sum(prompt in earlier for prompt in prompts)
        earlier |= set(prompts)
    return overlaps


def _summary(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the report may want beside its claims; prompts and single reports stay in the raw part."""
    windows = [
        {
            "phase": number,
            "domain": phase.domain,
            "at_s": start_s,
            "length": phase.length(start_s, FIRST_S),
            "steps": sum(phase.steps[start_s : start_s + FIRST_S]),
        }
        for number, phase in enumerate(phases_of(part), start=1)
        for start_s in range(0, phase.seconds, FIRST_S)
    ]
    kept = ("arm", "phases", "changed_ms", "ended_ms", "timeline", "events", "samples", "drafts", "jobs")
    return {**{key: part[key] for key in kept}, "windows": windows}
