"""T(n) refreshed from the steps that an engine serves: a profile taken under other load, or long ago, is put right while it is used.

A served step takes longer than the profile says for three reasons. Around every step there is work that a profile does not see (answers
are sent, requests taken in), the same for steps of all sizes: up to the share `_AROUND` of the shortest step is taken for that. Load
slows everything alike. And what was measured wrongly is off at its own n = b (gamma + 1). Points that no step spoke of are taken to be as
far off as all that were. What is measured fades; the profile counts for a few dozen steps.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tided.model.engines import LatencyProfile, StepCounts
from tided.policies.speedup import smoothed, step_s

_HALF_LIFE_S = 120.0
_PRIOR_STEPS = 50.0
_NEIGHBOUR = 0.2  # what a step says about the next point of the profile, beside its own
_GRAIN = 0.02  # factors are rounded, so that what follows from a profile is seldom computed anew
_AROUND = 0.12
"""2.5 ms of 24 were measured on vLLM, whose API server shared the engine's core."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Steps, fading, with the seconds that they took and those that the profile says."""

    steps: float = 0.0
    seconds: float = 0.0
    predicted_s: float = 0.0

    def faded(self, keep: float) -> "Seen":
        return Seen(keep * self.steps, keep * self.seconds, keep * self.predicted_s)

    def add(self, steps: float, seconds: float, predicted_s: float) -> "Seen":
        return Seen(self.steps + steps, self.seconds + seconds, self.predicted_s + predicted_s)

    def factor(self, around_s: float) -> float:
        """Measured over predicted, without what is around each step; 1.0 before anything was measured."""
        return (self.seconds - self.steps * around_s) / self.predicted_s if self.predicted_s > 0.0 else 1.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured in all, and what spoke about each point of `profile.tokens`."""

    profile: LatencyProfile
    at_s: float
    whole: Seen
    points: tuple[Seen, ...]

    @classmethod
    def of(cls, profile: LatencyProfile, now_s: float) -> "Calibration":
        """Before anything was measured."""
        return cls(profile, now_s, Seen(), (Seen(),) * len(profile.tokens))

    def add(self, now_s: float, measured: Sequence[StepCounts]) -> "Calibration":
        keep = 0.5 ** (max(now_s - self.at_s, 0.0) / _HALF_LIFE_S)
        whole, points = self.whole.faded(keep), [seen.faded(keep) for seen in self.points]
        for counts in measured:
            if counts.steps == 0 or counts.seconds <= 0:
                continue
            predicted_s = counts.steps * step_s(self.profile, counts.batch, counts.gamma)
            whole = whole.add(counts.steps, counts.seconds, predicted_s)
            place = self._place(counts.batch * (counts.gamma + 1))
            for i, seen in enumerate(points):
                share = _NEIGHBOUR ** abs(place - i)
                points[i] = seen.add(share * counts.steps, share * counts.seconds, share * predicted_s)
        return Calibration(self.profile, now_s, whole, tuple(points))

    def corrected(self) -> LatencyProfile:
        """The profile with every T(n) as measured, what is around a step included, and D(b) as far off as T(n) is on the whole."""
        around_s = self._around_s()
        common = _blend(1.0, self.whole, around_s)
        target = (
            around_s + seconds * _rounded(_blend(common, seen, around_s))
            for seconds, seen in zip(self.profile.target_s, self.points, strict=True)
        )
        draft = (seconds * _rounded(common) for seconds in self.profile.draft_s)
        return smoothed(replace(self.profile, target_s=tuple(target), draft_s=tuple(draft)))

    def _around_s(self) -> float:
        """Seconds around every step: what steps took longer than the profile says, as far as that is credible."""
        shortest_s = min(self.profile.target_s)
        excess_s = (self.whole.seconds - self.whole.predicted_s) / (_PRIOR_STEPS + self.whole.steps)
        share = min(max(excess_s / shortest_s, 0.0), _AROUND)
        return _GRAIN * round(share / _GRAIN) * shortest_s

    def _place(self, tokens: int) -> float:
        """Between which points `tokens` lies: 1.5 is half way from the second to the third."""
        points = self.profile.tokens
        i = bisect_right(points, tokens) - 1
        if i < 0:
            return 0.0
        return float(i) if i == len(points) - 1 else i + (tokens - points[i]) / (points[i + 1] - points[i])


def _blend(prior: float, seen: Seen, around_s: float) -> float:
    return (_PRIOR_STEPS * prior + seen.steps * seen.factor(around_s)) / (_PRIOR_STEPS + seen.steps)


def _rounded(factor: float) -> float:
    return max(round(factor / _GRAIN), 1) * _GRAIN
