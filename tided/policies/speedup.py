"""Equations 2 to 5 of TIDE (arXiv 2602.05145): expected accepted length and speedup of speculative decoding, and their estimators.

gamma: drafted tokens a step. alpha: probability that a drafted token is accepted given that all before it in the step were; it is
*conditional*, so accepted / drafted is not it. b: batch size. T(n), D(b): seconds of a target forward over n tokens and of a draft
forward over a batch of b (`LatencyProfile`). A step with gamma = 0 takes T(b) where the draft rests (the embedded engine, vLLM after a
few such steps), and a draft forward more where the engine keeps the draft in step (`LatencyProfile.idle_drafts`). "No speculation" is
what the engine does at gamma = 0, so a speedup is over that.

Eq. 2 with one alpha is the model. Drafts that feed on their own features lose accuracy from step to step, so where the conditional
acceptance a_k of drafted token k was measured, `Acceptance.length` uses 1 + a_1 + a_1 a_2 + ... (Eq. 2 is its case of equal a_k), and
pulls each a_k towards alpha by a few pseudo-trials, so that positions that were hardly tried fall back to the model.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tided.model.engines import LatencyProfile, StepCounts

HALF_LIFE_TRIALS = 400.0
"""Request-steps after which a count of acceptance is worth half."""
DIP = 1.25
"""How much longer than more work some work may take: 1.21 was measured, of two tokens over four."""
_PRIOR_TRIALS = 16.0
_BISECTIONS = 60


def expected_length(alpha: float, gamma: float) -> float:
    """Eq. 2: E[l] = (1 - alpha^(gamma+1)) / (1 - alpha), tokens a step with the bonus token; gamma + 1 at alpha = 1.

    `gamma` may be a mean over steps, hence real.
    """
    if alpha >= 1.0:
        return gamma + 1.0
    return (1.0 - alpha ** (gamma + 1.0)) / (1.0 - alpha)


def alpha_from_length(length: float, gamma: float) -> float:
    """The alpha in 0..1 at which Eq. 2 gives `length` at `gamma`, by bisection; clipped at both ends."""
    if gamma <= 0.0 or length <= 1.0:
        return 0.0
    if length >= gamma + 1.0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if expected_length(middle, gamma) < length:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def alpha_from_counts(accepted: Sequence[float]) -> float | None:
    """alpha of a histogram of steps by accepted tokens (entry k: k accepted, the last: all gamma accepted).

    accepted / (accepted + steps that ended in a rejection); None when nothing was drafted.
    """
    hits = sum(k * count for k, count in enumerate(accepted))
    rejections = sum(accepted[:-1])
    return hits / (hits + rejections) if hits + rejections else None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts by drafted position: of `trials[k]` times that drafted token k was judged (all before it were right), it was
    accepted `hits[k]` times. Counts may be discounted, hence real."""

    hits: tuple[float, ...] = ()
    trials: tuple[float, ...] = ()

    @classmethod
    def of(cls, steps: Iterable[StepCounts]) -> "Acceptance":
        """Sum over an engine's reports. Steps with gamma = 0 drafted nothing and count for nothing."""
        hits: list[float] = []
        trials: list[float] = []
        for counts in steps:
            while len(hits) < counts.gamma:
                hits.append(0.0)
                trials.append(0.0)
            reached = float(sum(counts.accepted))
            for k in range(counts.gamma):
                trials[k] += reached
                reached -= counts.accepted[k]
                hits[k] += reached
        return cls(tuple(hits), tuple(trials))

    @classmethod
    def prior(cls, conditional: Sequence[float], trials: float) -> "Acceptance":
        """What an evaluation with these conditional acceptances says, worth `trials` trials a position."""
        return cls(tuple(a * trials for a in conditional), (trials,) * len(conditional))

    def plus(self, other: "Acceptance", keep: float = 1.0) -> "Acceptance":
        """These counts discounted by `keep`, and the others."""
        size = max(len(self.hits), len(other.hits))

        def at(values: tuple[float, ...], k: int) -> float:
            return values[k] if k < len(values) else 0.0

        return Acceptance(
            tuple(keep * at(self.hits, k) + at(other.hits, k) for k in range(size)),
            tuple(keep * at(self.trials, k) + at(other.trials, k) for k in range(size)),
        )

    def faded(self, elapsed: float, half_life: float = HALF_LIFE_TRIALS) -> "Acceptance":
        """These counts after `elapsed` more request-steps that drafted, or seconds, in the unit of `half_life`."""
        return self.plus(Acceptance(), 0.5 ** (elapsed / half_life))

    @property
    def steps(self) -> float:
        """Request-steps that drafted something."""
        return self.trials[0] if self.trials else 0.0

    @property
    def alpha(self) -> float | None:
        """accepted / (accepted + steps that ended in a rejection), over all positions; None without trials."""
        total = sum(self.trials)
        return sum(self.hits) / total if total > 0 else None

    def conditional(self, k: int) -> float:
        """a_k for drafted token k (from 0), pulled towards alpha; 0.0 without trials."""
        alpha = self.alpha
        if alpha is None:
            return 0.0
        if k >= len(self.trials):
            # Acceptance falls with depth: beyond what was tried, the deepest estimate is the better guess than the mean.
            return min(alpha, self.conditional(len(self.trials) - 1))
        return (self.hits[k] + _PRIOR_TRIALS * alpha) / (self.trials[k] + _PRIOR_TRIALS)

    def length(self, gamma: int) -> float:
        """E[l] = 1 + a_1 + a_1 a_2 + ... at `gamma` drafted tokens."""
        return self.lengths(gamma)[gamma]

    def lengths(self, gamma_max: int) -> tuple[float, ...]:
        """E[l] at 0, 1, ... gamma_max drafted tokens."""
        total, chain = 1.0, 1.0
        found = [total]
        for k in range(gamma_max):
            chain *= self.conditional(k)
            total += chain
            found.append(total)
        return tuple(found)


def interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through (xs, ys), xs ascending. Its end segments go on: beyond the last not below it, nowhere below the least y."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return max(ys[i - 1] + slope * (x - xs[i - 1]), ys[-1] if x > xs[-1] else min(ys))


@lru_cache(maxsize=4096)
def smoothed(profile: LatencyProfile) -> LatencyProfile:
    """The profile without spikes: a time is lowered to `DIP` times the least one at or beyond it, where it is above that.

    More work takes hardly less, so what says so is noise: disturbances only ever lengthen a measurement. But a processor's kernel for one
    or two rows can be slower than the one for four.
    """

    def lowered(times: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(min(time, DIP * min(times[i:])) for i, time in enumerate(times))

    return replace(profile, target_s=lowered(profile.target_s), draft_s=lowered(profile.draft_s))


def target_s(profile: LatencyProfile, tokens: float) -> float:
    """T(n): seconds of one target forward over `tokens` tokens in all."""
    return interpolate(profile.tokens, profile.target_s, tokens)


def draft_s(profile: LatencyProfile, batch: float) -> float:
    """D(b): seconds of one draft forward over a batch of `batch`."""
    return interpolate(profile.batches, profile.draft_s, batch)


def step_s(profile: LatencyProfile, batch: int, gamma: int) -> float:
    """Seconds of one step: gamma D(b) + T(b (gamma + 1)), the numerator of Eq. 3; at gamma = 0 with the idle draft's forwards."""
    drafts = gamma or profile.idle_drafts
    drafting = drafts * draft_s(profile, batch) if drafts else 0.0
    return drafting + target_s(profile, batch * (gamma + 1))


@lru_cache(maxsize=4096)
def steps_s(profile: LatencyProfile, max_batch: int, gamma_max: int) -> tuple[tuple[float, ...], ...]:
    """`step_s` as a table: entry [b - 1][gamma] for batch sizes 1 to `max_batch` and 0 to `gamma_max` drafted tokens."""
    return tuple(
        tuple(step_s(profile, batch, gamma) for gamma in range(gamma_max + 1)) for batch in range(1, max_batch + 1)
    )


def capped(length: float, none_s: float, drafted_s: float) -> float:
    """Speedup of steps of `drafted_s` that emit `length` tokens each over steps of `none_s` that emit one.

    Never above `length`: that verifying is faster than not drafting at all is no reason to draft what is not accepted.
    """
    return length * min(none_s / drafted_s, 1.0)


def speedup_of_length(profile: LatencyProfile, batch: int, gamma: int, length: float) -> float:
    """Eq. 5 with a given E[l]: E[l] / (c(b) gamma + beta(b)), c(b) = D(b)/T(b), beta(b) = T(b (gamma+1))/T(b). 1.0 at gamma = 0."""
    if gamma == 0:
        return 1.0
    return capped(length, step_s(profile, batch, 0), step_s(profile, batch, gamma))


def speedup(profile: LatencyProfile, batch: int, gamma: int, alpha: float) -> float:
    """Eq. 5 with E[l] of Eq. 2."""
    return speedup_of_length(profile, batch, gamma, expected_length(alpha, gamma))
