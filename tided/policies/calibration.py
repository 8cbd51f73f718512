"""T(n) refreshed from the steps that an engine serves: a profile taken under other load, or long ago, is put right while it is used.

Each measured step says how its time compares with the profile's at its n = b (gamma + 1) tokens. That holds for all batch sizes and
gammas with the same n, and nearly so for neighbouring n. Points that were not measured are taken to be as far off as all that were:
load that slows everything slows them, too, and changes no decision. What is measured fades; the profile counts for a few dozen steps.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tided.model.records import LatencyProfile, StepCounts
from tided.policies.speedup import monotone, step_s

_HALF_LIFE_S = 120.0
_PRIOR_STEPS = 50.0
_NEIGHBOUR = 0.2  # what a step says about the next point of the profile, beside its own
_GRAIN = 0.02  # factors are rounded, so that what follows from a profile is seldom computed anew


@dataclass(frozen=True, slots=True)
class Calibration:
    """At each point of `profile.tokens`: steps that spoke about it, fading, and the sum of their measured over predicted times."""

    profile: LatencyProfile
    at_s: float
    weights: tuple[float, ...]
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, profile: LatencyProfile, now_s: float) -> "Calibration":
        """Before anything was measured."""
        nothing = (0.0,) * len(profile.tokens)
        return cls(profile, now_s, nothing, nothing)

    def add(self, now_s: float, measured: Sequence[StepCounts]) -> "Calibration":
        keep = 0.5 ** (max(now_s - self.at_s, 0.0) / _HALF_LIFE_S)
        weights, ratios = [keep * weight for weight in self.weights], [keep * ratio for ratio in self.ratios]
        for counts in measured:
            if counts.steps == 0 or counts.seconds <= 0:
                continue
            ratio = counts.seconds / counts.steps / step_s(self.profile, counts.batch, counts.gamma)
            place = self._place(counts.batch * (counts.gamma + 1))
            for i in range(len(weights)):
                weight = counts.steps * _NEIGHBOUR ** abs(place - i)
                weights[i] += weight
                ratios[i] += weight * ratio
        return Calibration(self.profile, now_s, tuple(weights), tuple(ratios))

    def corrected(self) -> LatencyProfile:
        """The profile with every T(n) as measured, and D(b) as far off as T(n) is on the whole."""
        common = (_PRIOR_STEPS + sum(self.ratios)) / (_PRIOR_STEPS + sum(self.weights))
        target = (
            seconds * _rounded((_PRIOR_STEPS * common + ratio) / (_PRIOR_STEPS + weight))
            for seconds, weight, ratio in zip(self.profile.target_s, self.weights, self.ratios, strict=True)
        )
        draft = (seconds * _rounded(common) for seconds in self.profile.draft_s)
        return monotone(replace(self.profile, target_s=tuple(target), draft_s=tuple(draft)))

    def _place(self, tokens: int) -> float:
        """Between which points `tokens` lies: 1.5 is half way from the second to the third."""
        points = self.profile.tokens
        i = bisect_right(points, tokens) - 1
        if i < 0:
            return 0.0
        return float(i) if i == len(points) - 1 else i + (tokens - points[i]) / (points[i + 1] - points[i])


def _rounded(factor: float) -> float:
    return max(round(factor / _GRAIN), 1) * _GRAIN
