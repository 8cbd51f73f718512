"""From predicted speedups to one gamma for each batch size, without flapping. Both policies choose like this; what they predict differs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tided.model.records import LatencyProfile
from tided.policies.base import BatchChoice, SpeculationObservation
from tided.policies.speedup import Acceptance, steps_s


@dataclass(frozen=True, slots=True)
class Rule:
    """On above 1 + margin, off below 1 + margin - hysteresis, from one gamma to another only for a gain above the hysteresis."""

    margin: float
    hysteresis: float

    def choose(self, batch: int, speedups: tuple[float, ...], current: int) -> BatchChoice:
        """`speedups[g]` at g drafted tokens, over none. The least gamma of the largest."""
        best = speedups.index(max(speedups))
        turned_on = best if speedups[best] > 1.0 + max(self.margin, self.hysteresis) else 0
        if current == 0 or current >= len(speedups) or speedups[current] <= 1.0 + self.margin - self.hysteresis:
            chosen = turned_on
        else:
            chosen = best if speedups[best] > speedups[current] * (1.0 + self.hysteresis) else current
        return BatchChoice(batch, chosen, speedups)


def predictions(seen: SpeculationObservation, acceptance: Acceptance) -> tuple[tuple[float, ...], ...]:
    """Eq. 5: entry [b - 1][gamma] for every batch size; gamma = 0 alone where there is no draft. Unknown acceptance counts as none."""
    most = seen.gamma_max if seen.version else 0
    lengths = acceptance.lengths(most)
    return tuple(
        tuple(length * times[0] / time for length, time in zip(lengths, times, strict=True))
        for times in steps_s(seen.profile, seen.max_batch, most)
    )


def could_pay(profile: LatencyProfile, batch: int, gamma_max: int) -> int | None:
    """The least gamma that would be faster than none if every token were accepted; None where there is none: nothing to find out."""
    times = steps_s(profile, batch, gamma_max)[batch - 1]
    return next((gamma for gamma in range(1, gamma_max + 1) if (gamma + 1) * times[0] > times[gamma]), None)


def held(choices: Sequence[BatchChoice], gammas: Sequence[int]) -> tuple[BatchChoice, ...]:
    """The choices with other gammas than they would take."""
    return tuple(replace(choice, gamma=gamma) for choice, gamma in zip(choices, gammas, strict=True))


def allowed(gammas: Sequence[int], seen: SpeculationObservation) -> tuple[int, ...]:
    """What was chosen before, where fewer tokens are allowed now."""
    return tuple(min(gamma, seen.gamma_max if seen.version else 0) for gamma in gammas)
