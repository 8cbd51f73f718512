"""When acceptance has drifted: the two moving averages of Algorithm 1 of TIDE (arXiv 2602.05145).

The sample is one finished request's alpha (Eq. 2 inverted at its own mean gamma), so that a change of gamma by the speculation
policy does not look like drift. Averages are corrected for their start, as in Adam, and begin anew with each version: another
draft has another level. While speculation is off the only requests that count are those a probe touched.

Requests differ: some are easy to guess. **Ours**: a fall counts as drift only when it is also larger than what so few requests differ by
chance. The averages are weighted sums of the same samples, so the standard error of their difference is sigma sqrt(sum (a_i - b_i)^2)
with their weights a and b. sigma^2 is half the mean square of successive differences (von Neumann): a shift of level, which is
what is looked for, enters it once only, where it would inflate an ordinary variance.
"""

from dataclasses import dataclass, replace
from math import inf, sqrt

from tided.model.engines import RequestStats
from tided.policies.speedup import alpha_from_length

_FULL_WEIGHT_STEPS = 8
"""Drafting steps from which a request counts in full; one that a probe only grazed counts in proportion."""
SURE = 4.0
"""Standard errors that a fall must exceed. Every request is a look at a slowly changing difference, thousands a day: 2 would not do."""


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

    def keep(self, weight: float) -> float:
        """The share of the old average that a sample of `weight` leaves."""
        return (1.0 - 2.0 / (self.window + 1.0)) ** weight

    def add(self, value: float, weight: float = 1.0) -> "Ema":
        """`weight` in 0..1: a sample of less than full weight moves the average as much less."""
        keep = self.keep(weight)
        return replace(self, total=keep * self.total + (1.0 - keep) * value, mass=keep * self.mass + (1.0 - keep))

    @property
    def value(self) -> float | None:
        return self.total / self.mass if self.mass > 0 else None


@dataclass(frozen=True, slots=True)
class AcceptanceTrend:
    """Algorithm 1's short and long average of one version's acceptance. `samples`: requests by weight.

    Drift is short < long - epsilon, once the short window has been filled a first time (half of it: averages are corrected for
    their start, and a fresh draft must not be blind for minutes), if the fall exceeds `SURE` standard errors.
    """

    short: Ema
    long: Ema
    epsilon: float
    version: str = ""
    samples: float = 0.0
    spread: Ema = Ema(1)  # half the square of successive differences, over the long window
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)  # sums over samples of a a, b b and a b
    newest: float | None = None

    @classmethod
    def start(cls, short_window: int, long_window: int, epsilon: float) -> "AcceptanceTrend":
        return cls(Ema(short_window), Ema(long_window), epsilon, spread=Ema(long_window))

    def restart(self, version: str) -> "AcceptanceTrend":
        """Forget everything: `version` serves from now on."""
        return replace(self.start(self.short.window, self.long.window, self.epsilon), version=version)

    def add(self, stats: RequestStats) -> "AcceptanceTrend":
        """Take a finished request in. One that another version ended, or that never drafted, says nothing."""
        alpha = request_alpha(stats)
        if alpha is None or stats.version != self.version:
            return self
        weight = min(1.0, stats.spec_steps / _FULL_WEIGHT_STEPS)
        a, b = self.short.keep(weight), self.long.keep(weight)
        both = zip(((a, a), (b, b), (a, b)), self.products, strict=True)
        spread = self.spread
        if self.newest is not None:
            spread = spread.add((alpha - self.newest) ** 2 / 2.0, weight)
        return replace(
            self,
            short=self.short.add(alpha, weight),
            long=self.long.add(alpha, weight),
            samples=self.samples + weight,
            spread=spread,
            products=tuple(p * q * before + (1.0 - p) * (1.0 - q) for (p, q), before in both),
            newest=alpha,
        )

    @property
    def standard_error(self) -> float | None:
        """Of short - long, were all requests of one kind; None before two of them."""
        sigma2, a, b = self.spread.value, self.short.mass, self.long.mass
        if sigma2 is None:
            return None
        aa, bb, ab = self.products
        return sqrt(sigma2 * max(aa / a**2 + bb / b**2 - 2.0 * ab / (a * b), 0.0))

    @property
    def drifting(self) -> bool:
        return self._difference < -self._least

    @property
    def rising(self) -> bool:
        """Drift's opposite: the traffic is another too, but nothing is lost by it."""
        return self._difference > self._least

    @property
    def _difference(self) -> float:
        """short - long; 0.0 while it says nothing."""
        short, long = self.short.value, self.long.value
        return short - long if short is not None and long is not None else 0.0

    @property
    def _least(self) -> float:
        """What a difference must exceed to count."""
        error = self.standard_error
        if error is None or self.samples < self.short.window / 2:
            return inf
        return max(self.epsilon, SURE * error)
