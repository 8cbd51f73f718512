"""What the newest counts say, beside the longer memory of the monitor: has the traffic just moved, and has drafting paid lately?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, sqrt

from tided.model.engines import LatencyProfile, StepCounts
from tided.policies.base import SpeculationObservation
from tided.policies.speedup import Acceptance, steps_s

RECENT_TRIALS = 40.0
"""Half-life of the short memory, in request-steps,"""
RECENT_STEPS = 8.0
"""if they are so many engine steps at least,"""
RECENT_S = 10.0
"""and in time: what a probe found a while ago is not recent, though nothing was judged since."""
ENOUGH_TRIALS = 10.0
"""Below this the short memory is chance."""
RISE_STEPS = 6.0
"""Engine steps that must say so before more is believed: requests that begin together are all at their easy first tokens."""
SURE = 3.0
"""Standard errors by which short and long memory must differ before the short one is believed."""
SPREAD = 2.0
"""Variance of a few requests' acceptance over that of coin flips: steps of one request are alike."""
MEMORY_S = 60.0
"""Time constant with which the loss account forgets."""
CREDIT_S = 1.2
"""What gains may pay for in advance."""
_RESUME = 0.75


_NOTHING = Acceptance()


@dataclass(frozen=True, slots=True)
class Evidence:
    """A short memory of acceptance. A long one follows a jump of the traffic slowly; where the two surely differ, the short one holds.

    Counts are summed before they are taken in, so their order within an observation makes no difference. `steps`: engine steps that
    drafted, fading as `recent` does.
    """

    recent: Acceptance = field(default_factory=Acceptance)
    steps: float = 0.0
    at_s: float = 0.0

    def add(self, now_s: float, measured: Sequence[StepCounts], shadow: Acceptance = _NOTHING) -> "Evidence":
        """`shadow`: what was scored offline meanwhile, which says the same as steps that drafted."""
        new = Acceptance.of(measured).plus(shadow)
        # A score is of many requests at all their positions: it counts as steps of one request each.
        steps = sum(counts.steps for counts in measured if counts.gamma) + shadow.steps
        keep = 0.5 ** (max(now_s - self.at_s, 0.0) / RECENT_S + min(new.steps / RECENT_TRIALS, steps / RECENT_STEPS))
        return Evidence(self.recent.plus(Acceptance(), keep).plus(new), keep * self.steps + steps, now_s)

    def best(self, long: Acceptance) -> Acceptance:
        """`long`, or the short memory if they surely differ."""
        short = self.recent
        trials, many = sum(short.trials), sum(long.trials)
        if long.alpha is None or short.alpha is None or not ENOUGH_TRIALS <= trials < many:
            return long
        # Of one mean: the long memory holds the short one's counts, too.
        mean = min(max(long.alpha, 0.02), 0.98)
        error = sqrt(SPREAD * mean * (1.0 - mean) * (1.0 / trials - 1.0 / many))
        if short.alpha > long.alpha and self.steps < RISE_STEPS:
            return long
        return short if abs(short.alpha - long.alpha) > SURE * error else long


def lost_s(profile: LatencyProfile, measured: Sequence[StepCounts], max_batch: int, gamma_max: int) -> float:
    """Seconds that drafting cost: what the steps should have taken, less what the same tokens take without drafting.

    Negative where it gained. By the profile, so that other load on the machine is nobody's loss.
    """
    table, lost = steps_s(profile, max_batch, gamma_max), 0.0
    for counts in measured:
        if 0 < counts.gamma <= gamma_max and counts.batch <= max_batch:
            times, emitted = table[counts.batch - 1], sum((k + 1) * n for k, n in enumerate(counts.accepted))
            lost += counts.steps * times[counts.gamma] - emitted / counts.batch * times[0]
    return lost


@dataclass(frozen=True, slots=True)
class LossAccount:
    """Seconds lost to drafting in the last minute or so, net of those that it gained; gains pay in advance for little."""

    balance_s: float = 0.0
    at_s: float = 0.0

    def add(self, now_s: float, seconds: float) -> "LossAccount":
        kept = self.balance_s * exp(-max(now_s - self.at_s, 0.0) / MEMORY_S)
        return LossAccount(max(kept + seconds, -CREDIT_S), now_s)

    def overdrawn(self, most: float, *, already: bool) -> bool:
        """Whether more than the share `most` of the last minute is lost; once it is, until a quarter of that is forgotten."""
        return self.balance_s > most * MEMORY_S * (_RESUME if already else 1.0)


def figures(seen: SpeculationObservation, evidence: Evidence, account: LossAccount) -> tuple[tuple[str, float], ...]:
    """What both policies looked at, by name."""
    alphas = (("alpha, long memory", seen.acceptance.alpha), ("alpha, newest steps", evidence.recent.alpha))
    return (
        *((name, alpha) for name, alpha in alphas if alpha is not None),
        ("request-steps in long memory", seen.acceptance.steps),
        ("seconds lost in the last minute", account.balance_s),
    )
