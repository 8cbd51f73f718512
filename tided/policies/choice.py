"""From predicted speedups to one gamma for each batch size, without flapping. Both policies choose like this; what they predict differs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tided.model.engines import LatencyProfile
from tided.policies.base import BatchChoice, SpeculationObservation
from tided.policies.speedup import Acceptance, capped, steps_s


@dataclass(frozen=True, slots=True)
class Held:
    """What is chosen now. `steps`: engine steps since it changed; None where nothing was chosen yet, so that it may change at once."""

    gammas: tuple[int, ...] = ()
    steps: int | None = None

    def allowed(self, seen: SpeculationObservation) -> "Held":
        """The same where fewer tokens are allowed now."""
        most = seen.gamma_max if seen.version else 0
        return replace(self, gammas=tuple(min(gamma, most) for gamma in self.gammas))


@dataclass(frozen=True, slots=True)
class Rule:
    """On above 1 + margin, off below 1 + margin - hysteresis, from one gamma to another only for a gain above the hysteresis, and at
    most one change in `dwell_steps` engine steps; but what is predicted to lose more than the hysteresis is given up at once."""

    margin: float
    hysteresis: float
    dwell_steps: int

    def choose(self, batch: int, speedups: tuple[float, ...], current: int) -> BatchChoice:
        """`speedups[g]` at g drafted tokens, over none. The least gamma of the largest."""
        best = speedups.index(max(speedups))
        turned_on = best if speedups[best] > 1.0 + max(self.margin, self.hysteresis) else 0
        if current == 0 or speedups[current] <= 1.0 + self.margin - self.hysteresis:
            chosen = turned_on
        else:
            chosen = best if speedups[best] > speedups[current] * (1.0 + self.hysteresis) else current
        return BatchChoice(batch, chosen, speedups)

    def settle(
        self, held: Held, speedups: Sequence[tuple[float, ...]], steps: int, *, stopped: bool
    ) -> tuple[tuple[BatchChoice, ...], Held]:
        """The choice at every batch size, `steps` engine steps after the one before; none drafts while `stopped`."""
        since = None if held.steps is None else held.steps + steps
        choices = tuple(
            self.choose(batch, row, current)
            for batch, (row, current) in enumerate(zip(speedups, held.gammas, strict=True), 1)
        )
        if stopped:
            choices = tuple(replace(choice, gamma=0) for choice in choices)
        elif since is not None and since < self.dwell_steps:
            choices = tuple(map(self._kept, choices, held.gammas))
        gammas = tuple(choice.gamma for choice in choices)
        return choices, Held(gammas, 0 if since is None or gammas != held.gammas else since)

    def _kept(self, choice: BatchChoice, current: int) -> BatchChoice:
        """The choice while it is too soon for another than `current`."""
        loses = choice.speedups[current] < 1.0 - self.hysteresis
        return choice if loses and choice.gamma < current else replace(choice, gamma=current)


def predictions(seen: SpeculationObservation, acceptance: Acceptance) -> tuple[tuple[float, ...], ...]:
    """Eq. 5 as `speedup_of_length`: entry [b - 1][gamma] for every batch size; gamma = 0 alone where there is no draft. Unknown
    acceptance counts as none."""
    most = seen.gamma_max if seen.version else 0
    lengths = acceptance.lengths(most)
    return tuple(
        tuple(capped(length, times[0], time) for length, time in zip(lengths, times, strict=True))
        for times in steps_s(seen.profile, seen.max_batch, most)
    )


def could_pay(profile: LatencyProfile, batch: int, gamma_max: int) -> int | None:
    """The least gamma that would be faster than none if every token were accepted; None where there is none: nothing to find out."""
    times = steps_s(profile, batch, gamma_max)[batch - 1]
    return next((gamma for gamma in range(1, gamma_max + 1) if (gamma + 1) * times[0] > times[gamma]), None)
