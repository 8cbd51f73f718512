"""Where acceptance is lost: the same requests cut by what they have in common, each cut's parts beside one another.

A fault seldom hits all alike: a prefix cache spoils the requests that it serves, a wrong position the long prompts, a new build the
engines that run it, a half-applied swap one version. What is lower than the rest of its cut by more than chance is where to look first.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

from tided.model.engines import RequestStats
from tided.policies.faults import ratio

LENGTHS = (128, 512, 2048)
"""Upper ends of the classes of prompt lengths; the last has none."""
LEAST = 8
"""Requests of the smallest part that is shown."""
SURE = 3.0
MARGIN = 0.15
POSITION = "position"


@dataclass(frozen=True, slots=True)
class Served:
    """A finished request, on which engine of the target, and the build that this engine is of ("" when not told)."""

    stats: RequestStats
    engine: str
    build: str = ""


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of a cut. `accepted`: drafted tokens accepted a drafting step, `error` its standard error, `rest` that of the other parts
    together; by position in the draft: the conditional acceptance there, and `rest` what the draft scores. `low`: surely below `rest`."""

    by: str
    part: str
    requests: int
    accepted: float
    error: float
    rest: float
    low: bool


def sliced(requests: Sequence[Served]) -> tuple[Slice, ...]:
    """Every cut that has two parts at least, in a fixed order."""
    cuts: tuple[tuple[str, Callable[[Served], str | None]], ...] = (
        ("prompt length", lambda item: _length(item.stats.prompt_tokens)),
        ("prefix cache", lambda item: _cache(item.stats.cached_tokens)),
        ("engine", lambda item: item.engine),
        ("build", lambda item: item.build or None),
        ("version", lambda item: item.stats.version[:12]),
    )
    drafted = [item for item in requests if item.stats.spec_steps]
    return tuple(part for by, key in cuts for part in _cut(by, drafted, key))


def _cut(by: str, requests: Sequence[Served], key: Callable[[Served], str | None]) -> tuple[Slice, ...]:
    parts: dict[Hashable, list[RequestStats]] = {}
    for item in requests:
        name = key(item)
        if name is not None:
            parts.setdefault(name, []).append(item.stats)
    parts = {name: found for name, found in parts.items() if len(found) >= LEAST}
    if len(parts) < 2:
        return ()
    return tuple(
        _part(by, str(name), parts[name], [stats for other in parts if other != name for stats in parts[other]])
        for name in sorted(parts, key=str)
    )


def _part(by: str, name: str, own: Sequence[RequestStats], others: Sequence[RequestStats]) -> Slice:
    got, error = _accepted(own)
    rest, rest_error = _accepted(others)
    low = rest - got > max(MARGIN * rest, SURE * sqrt(error**2 + rest_error**2))
    return Slice(by, name, len(own), got, error, rest, low)


def _accepted(requests: Sequence[RequestStats]) -> tuple[float, float]:
    return ratio([float(stats.accepted) for stats in requests], [float(stats.spec_steps) for stats in requests])


def by_position(
    accepted: Sequence[float], trials: Sequence[float], scored: Sequence[float], requests: int
) -> tuple[Slice, ...]:
    """By drafted token: accepted of the trials that reached it, beside what the draft scores there."""
    found: list[Slice] = []
    for k, (hits, tried, expected) in enumerate(zip(accepted, trials, scored, strict=False), 1):
        if tried < LEAST:
            continue
        got = hits / tried
        error = sqrt(max(expected * (1.0 - expected), 0.01) / tried)
        found.append(
            Slice(
                POSITION,
                f"drafted token {k}",
                requests,
                got,
                error,
                expected,
                expected - got > max(MARGIN * expected, SURE * error),
            )
        )
    return tuple(found)


def _length(prompt_tokens: int) -> str:
    least = 0
    for most in LENGTHS:
        if prompt_tokens <= most:
            return f"{least + 1}..{most} tokens"
        least = most
    return f"more than {least} tokens"


def _cache(cached_tokens: int | None) -> str | None:
    if cached_tokens is None:
        return None
    return "with a hit" if cached_tokens else "without"


def where(found: Sequence[Slice]) -> str:
    """The parts that are low, for people; "" when no part is lower than the rest of its cut."""
    told: list[str] = []
    positions = [part for part in found if part.by == POSITION]
    low = [part for part in positions if part.low]
    if low and len(low) < len(positions):
        told.append(f"from {low[0].part} on" if low == positions[-len(low) :] else ", ".join(part.part for part in low))
    for part in found:
        if part.low and part.by != POSITION:
            lengths = f"{1.0 + part.accepted:.2f} over {part.requests} requests, others {1.0 + part.rest:.2f}"
            told.append(f"{part.by} {part.part} ({lengths})")
    return f"most is lost: {'; '.join(told)}" if told else ""
