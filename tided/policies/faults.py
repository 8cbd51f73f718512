"""Whether an engine accepts what its draft could give: served acceptance against offline scores, apart for each temperature.

A draft accepts more of greedy traffic than of sampled traffic, so a mean over both moves with the mix, hides a fault in one of them and
shows one where there is none. What is compared is drafted tokens accepted a drafting step: over finished requests as the engine
counted them, and as the held-out requests of the same days and temperature say (`tided.training.sampling`). Requests differ, on both
sides, so a difference counts only beyond its standard error (of a ratio of sums over requests) and beyond a margin.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import floor, sqrt

from tided.model.drafts import SamplingScore
from tided.model.engines import RequestStats

WINDOW = 256
"""Newest finished requests of one temperature that are judged."""
FADING = 0.998
"""What a request leaves of the counts before it, where shares of temperatures are counted."""
MAX_CLASSES = 8
MIN_REQUESTS = 24
MIN_STEPS = 240
MIN_PROMPTS = 10
MIN_SCORED_STEPS = 200
WHOLE = 0.9
"""A request is judged if it drafted in this share of its steps at least: one that a probe touched, or that lived through a pause, has a
draft without keys for what it missed."""
MARGIN = 0.15
"""Share of the accepted tokens that may be missing: what rounding, a seed or a slightly other mix of requests explains."""
SURE = 4.0
"""Standard errors beyond which a difference is none of chance, as in `tided.policies.training`."""


def sampling_class(stats: RequestStats) -> float | None:
    """The temperature as which a request is judged: 0.0 greedy, else to one decimal, at least 0.1; None when it was not told."""
    if stats.temperature is None:
        return None
    return 0.0 if stats.temperature <= 0.0 else max(0.1, round(stats.temperature, 1))


@dataclass(slots=True)
class ServedClass:
    """The newest finished requests of one temperature, and when (by the reports, Redis TIME) each was reported.

    `drafted`: all that drafted at all, `whole`: those in nearly all steps (see `WHOLE`), `requests`: of these the ones that samples
    are of. `seen`: how many there were of late, in all.
    """

    requests: deque[tuple[int, RequestStats]] = field(
        default_factory=lambda: deque[tuple[int, RequestStats]](maxlen=WINDOW)
    )
    whole: deque[tuple[int, RequestStats]] = field(
        default_factory=lambda: deque[tuple[int, RequestStats]](maxlen=WINDOW)
    )
    drafted: deque[tuple[int, RequestStats]] = field(
        default_factory=lambda: deque[tuple[int, RequestStats]](maxlen=WINDOW)
    )
    seen: float = 0.0

    def add(self, stats: RequestStats, at_ms: int, captured: bool) -> None:
        """Take one in. `captured`: samples are taken of requests like it."""
        self.seen += 1.0
        steps = max(1, stats.output_tokens - 1 - stats.accepted)
        if stats.drafted:
            self.drafted.append((at_ms, stats))
            if stats.spec_steps >= WHOLE * steps:
                self.whole.append((at_ms, stats))
                if captured:
                    self.requests.append((at_ms, stats))

    def since(self, at_ms: int) -> "ServedClass":
        """Those that can be judged and were reported at that time or later."""
        chosen = deque((item for item in self.requests if item[0] >= at_ms), maxlen=WINDOW)
        return ServedClass(chosen, self.whole, self.drafted, self.seen)

    @property
    def since_ms(self) -> int:
        return self.requests[0][0] if self.requests else 0

    @property
    def newest_ms(self) -> int:
        return self.requests[-1][0] if self.requests else 0

    @property
    def enough(self) -> bool:
        return len(self.requests) >= MIN_REQUESTS and sum(stats.spec_steps for _, stats in self.requests) >= MIN_STEPS


@dataclass(slots=True)
class ServedClasses:
    """The requests that one version served, by temperature. Of many temperatures the first are told apart."""

    classes: dict[float, ServedClass] = field(default_factory=dict[float, ServedClass])

    def add(self, stats: RequestStats, at_ms: int, captured: bool) -> float | None:
        """Count one in; the temperature that it counts for, or None. `captured`: samples are taken of requests like it."""
        found = sampling_class(stats)
        if found is None or (found not in self.classes and len(self.classes) >= MAX_CLASSES):
            return None
        for served in self.classes.values():
            served.seen *= FADING
        self.classes.setdefault(found, ServedClass()).add(stats, at_ms, captured)
        return found

    def next_ripe(self, after: float, since_ms: int) -> float | None:
        """The next temperature above `after`, else from the lowest on, of which enough was served and something after `since_ms`."""
        ripe = [at for at, served in self.classes.items() if served.enough and served.newest_ms > since_ms]
        return min(ripe, key=lambda temperature: (temperature <= after, temperature), default=None)

    def mix(self) -> tuple[tuple[float, float], ...]:
        """(temperature, share of the requests of late), by temperature."""
        total = sum(served.seen for served in self.classes.values())
        return tuple((temperature, served.seen / total) for temperature, served in sorted(self.classes.items()))


class Verdict(StrEnum):
    SOUND = "sound"
    FAULT = "fault"
    OPEN = "open"  # too few requests on either side, or between the two


@dataclass(frozen=True, slots=True)
class Comparison:
    """Acceptance lengths of one temperature, at the numbers of tokens that the requests drafted: `served` by the engine, `scored` what
    the draft could give, `likeliest` what it gives an engine that drafts its likeliest tokens only. `error`: standard error of the
    difference between the first two."""

    temperature: float
    served: float
    scored: float
    likeliest: float
    error: float
    requests: int
    prompts: int
    verdict: Verdict
    enough: bool = True

    @property
    def surely_sound(self) -> bool:
        """Whether a fault of twice the margin is ruled out, too, by two standard errors."""
        could, missing = self.scored - 1.0, self.scored - self.served
        return self.verdict is Verdict.SOUND and missing + 2.0 * self.error < 2.0 * MARGIN * could


def compare(served: ServedClass, score: SamplingScore) -> Comparison:
    """Judge the requests of one temperature by the score of the draft that served them."""
    requests = [stats for _, stats in served.requests]
    steps = [float(stats.spec_steps) for stats in requests]
    gammas = [stats.drafted / stats.spec_steps for stats in requests]
    accepted = [float(stats.accepted) for stats in requests]
    got, got_error = ratio(accepted, steps)
    could = _mean(steps, [accepted_at(score.conditional, gamma) for gamma in gammas])
    likeliest = _mean(steps, [accepted_at(score.likeliest, gamma) for gamma in gammas])
    measured, measured_error = ratio(score.accepted, score.steps)
    # The score's scatter is known at its own gamma only: at another one it is taken to be the same share.
    could_error = could * measured_error / measured if measured > 0.0 else 0.0
    error = sqrt(got_error**2 + could_error**2)
    prompts = len(score.steps)
    enough = served.enough and prompts >= MIN_PROMPTS and sum(score.steps) >= MIN_SCORED_STEPS
    return Comparison(
        temperature=score.temperature,
        served=1.0 + got,
        scored=1.0 + could,
        likeliest=1.0 + likeliest,
        error=error,
        requests=len(requests),
        prompts=prompts,
        verdict=_verdict(could - got, MARGIN * could, SURE * error) if enough else Verdict.OPEN,
        enough=enough,
    )


def _verdict(missing: float, margin: float, chance: float) -> Verdict:
    """A fault is beyond both bounds. It takes less than half the margin to be sound again, so that a verdict does not flap."""
    if missing > max(margin, chance):
        return Verdict.FAULT
    return Verdict.SOUND if missing < margin / 2 else Verdict.OPEN


def accepted_at(conditional: Sequence[float], gamma: float) -> float:
    """Drafted tokens accepted a step when `gamma` are drafted: a_0 + a_0 a_1 + ...; between whole numbers, in proportion."""
    sums = [0.0]
    chain = 1.0
    for value in conditional:
        chain *= value
        sums.append(sums[-1] + chain)
    whole = min(floor(gamma), len(sums) - 1)
    above = min(whole + 1, len(sums) - 1)
    return sums[whole] + (gamma - floor(gamma)) * (sums[above] - sums[whole])


def ratio(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """sum(values) / sum(weights) and its standard error: pairs are independent, values within one are not."""
    total, n = sum(weights), len(weights)
    if n < 2 or total <= 0.0:
        return 0.0, 0.0
    mean = sum(values) / total
    scatter = sum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, sqrt(scatter * n / (n - 1)) / total


def _mean(weights: Sequence[float], values: Sequence[float]) -> float:
    total = sum(weights)
    return sum(w * value for w, value in zip(weights, values, strict=True)) / total if total else 0.0
