"""When acceptance has drifted: the two moving averages of Algorithm 1 of TIDE (arXiv 2602.05145).

The sample is one finished request's alpha (Eq. 2 inverted at its own mean gamma), so that a change of gamma by the speculation
policy does not look like drift. Averages are corrected for their start, as in Adam, and begin anew with each version: another
draft has another level. While speculation is off the only requests that count are those a probe touched.
"""

from dataclasses import dataclass, replace

from tided.model.records import RequestStats
from tided.policies.speedup import alpha_from_length

_FULL_WEIGHT_STEPS = 8
"""Drafting steps from which a request counts in full; one that a probe only grazed counts in proportion."""


def request_alpha(stats: RequestStats) -> float | None:
    """A finished request's alpha in 0..1; None when it never drafted."""
    if stats.spec_steps == 0 or stats.drafted == 0:
        return None
    return alpha_from_length(1.0 + stats.accepted / stats.spec_steps, stats.drafted / stats.spec_steps)


@dataclass(frozen=True, slots=True)
class Ema:
    """An exponential moving average over about `window` samples (decay 2 / (window + 1)); `mass` is its share of real samples."""

    window: int
    total: float = 0.0
    mass: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> "Ema":
        """`weight` in 0..1: a sample of less than full weight moves the average as much less."""
        keep = (1.0 - 2.0 / (self.window + 1.0)) ** weight
        return replace(self, total=keep * self.total + (1.0 - keep) * value, mass=keep * self.mass + (1.0 - keep))

    @property
    def value(self) -> float | None:
        return self.total / self.mass if self.mass > 0 else None


@dataclass(frozen=True, slots=True)
class AcceptanceTrend:
    """Algorithm 1's short and long average of one version's acceptance. `samples`: requests by weight.

    Drift is short < long - epsilon, once the short window has been filled a first time (half of it: averages are corrected for
    their start, and a fresh draft must not be blind for minutes).
    """

    short: Ema
    long: Ema
    epsilon: float
    version: str = ""
    samples: float = 0.0

    @classmethod
    def start(cls, short_window: int, long_window: int, epsilon: float) -> "AcceptanceTrend":
        return cls(Ema(short_window), Ema(long_window), epsilon)

    def restart(self, version: str) -> "AcceptanceTrend":
        """Forget everything: `version` serves from now on."""
        return replace(self, short=Ema(self.short.window), long=Ema(self.long.window), version=version, samples=0.0)

    def add(self, stats: RequestStats) -> "AcceptanceTrend":
        """Take a finished request in. One that another version ended, or that never drafted, says nothing."""
        alpha = request_alpha(stats)
        if alpha is None or stats.version != self.version:
            return self
        weight = min(1.0, stats.spec_steps / _FULL_WEIGHT_STEPS)
        return replace(
            self,
            short=self.short.add(alpha, weight),
            long=self.long.add(alpha, weight),
            samples=self.samples + weight,
        )

    @property
    def drifting(self) -> bool:
        short, long = self.short.value, self.long.value
        if short is None or long is None or self.samples < self.short.window / 2:
            return False
        return short < long - self.epsilon
