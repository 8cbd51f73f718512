"""What a policy is held against: constant schedules, what vLLM and SGLang do by themselves, and who knows the future."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tided.model.engines import StepCounts
from tided.policies.speedup import Acceptance, speedup_of_length, steps_s
from tided.replay.drivers import Driver
from tided.replay.trace import Trace

WINDOW_S = 5.0
"""Over which acceptance is known to the clairvoyant."""
_TUNED_S = 30.0
_CANDIDATES = {1: ((1, 3, 5, 7), -0.25), 8: ((0, 1, 3), 0.0), 32: ((0, 1), 0.0), 64: ((0,), 0.0)}
"""SGLang 0.5.23's default: from a batch size on, candidate steps, and what is added to the thresholds below them."""
_SHARE, _WARM_UP, _EVERY = 0.2, 10, 5


def always(trace: Trace, gamma: int, name: str) -> Driver:
    """The same number of drafted tokens at every batch size."""
    return Driver(name, (gamma,) * trace.header.max_batch)


def static(trace: Trace) -> Driver:
    """vLLM's `num_speculative_tokens_per_batch_size`: by batch size, for good. Tuned as well as an operator can on the trace's
    first half minute: the best by Eq. 5 at the acceptance measured in it."""
    found = windows(trace, _TUNED_S)[0]
    return Driver("static", best_gammas(trace, found))


def windows(trace: Trace, window_s: float) -> list[Acceptance]:
    """The acceptance of each window of `window_s` seconds: what every request-step in it would have had accepted at gamma_max."""
    header = trace.header
    edges = np.arange(int(np.ceil(header.duration_s / window_s)) + 1) * window_s
    cuts = np.searchsorted(trace.at_s, edges).tolist()
    found: list[Acceptance] = []
    for first, last in pairwise(cuts):
        accepted = tuple(trace.histograms[first:last].sum(axis=0).tolist())
        found.append(Acceptance.of([StepCounts(1, header.gamma_max, last - first, 0.0, accepted)]))
    return found


def best_gammas(trace: Trace, acceptance: Acceptance) -> tuple[int, ...]:
    """The best by Eq. 5 at each batch size, with the engine's true profile."""
    header, lengths = trace.header, acceptance.lengths(trace.header.gamma_max)
    return tuple(
        max(
            range(header.gamma_max + 1),
            key=lambda gamma: speedup_of_length(header.profile, batch, gamma, lengths[gamma]),
        )
        for batch in range(1, header.max_batch + 1)
    )


@dataclass
class Clairvoyant(Driver):
    """Knows the acceptance of each window and the true profile beforehand; changes where that gains more than a change costs."""

    schedules: Sequence[tuple[int, ...]] = field(kw_only=True)

    @classmethod
    def of(cls, trace: Trace) -> "Clairvoyant":
        header, table = trace.header, steps_s(trace.header.profile, trace.header.max_batch, trace.header.gamma_max)
        schedules: list[tuple[int, ...]] = []
        current = (0,) * header.max_batch
        for number, acceptance in enumerate(windows(trace, WINDOW_S)):
            lengths, best = acceptance.lengths(header.gamma_max), best_gammas(trace, acceptance)
            first, last = np.searchsorted(trace.at_s, [number * WINDOW_S, (number + 1) * WINDOW_S]).tolist()
            gained_s = 0.0
            for batch in trace.batch[first:last].tolist():
                old, new = (lengths[g] / table[batch - 1][g] for g in (current[batch - 1], best[batch - 1]))
                gained_s += (1.0 - old / new) * table[batch - 1][best[batch - 1]]
            if gained_s > header.switch_s:
                current = best
            schedules.append(current)
        return cls("clairvoyant", schedules[0], schedules=schedules, due_s=WINDOW_S)

    def tick(self, now_s: float) -> None:
        number = min(int(now_s / WINDOW_S), len(self.schedules) - 1)
        self.change(self.schedules[number])
        self.due_s = (number + 1) * WINDOW_S


@dataclass
class SteppedEma(Driver):
    """SGLang 0.5.23's adaptive steps, as its `AdaptiveStepSlot` decides with its default configuration: for each range of batch sizes
    an average of accepted tokens and candidate steps; every fifth verification up or down past thresholds half way between
    candidates; from 0 always up again at the next. Candidates above the trace's gamma_max are left out. It sees every step at once."""

    trace: Trace = field(kw_only=True)

    @classmethod
    def of(cls, trace: Trace) -> "SteppedEma":
        driver = cls("ema-steps", [0] * trace.header.max_batch, trace=trace)
        driver._begin()
        return driver

    def _begin(self) -> None:
        header = self.trace.header
        self._slots: dict[int, _Slot] = {}
        for low, (candidates, down) in _CANDIDATES.items():
            steps = tuple(step for step in candidates if step <= header.gamma_max)
            first = steps[len(steps) // 2]
            self._slots[low] = _Slot(steps, down, first, float(first - 1))
        self._low = [max(low for low in self._slots if low <= batch) for batch in range(1, header.max_batch + 1)]
        self.gammas = [self._slots[low].current for low in self._low]

    def stepped(self, step: int, batch: int, gamma: int, seconds: float) -> None:
        slot = self._slots[self._low[batch - 1]]
        if slot.current > 0:
            accepted = (int(self.trace.emitted[step, gamma]) - batch) / batch
            slot.average += _SHARE * (accepted - slot.average)
        slot.seen += 1
        if slot.seen > _WARM_UP and (slot.seen - _WARM_UP) % _EVERY == 0 and slot.move():
            self.change([self._slots[low].current for low in self._low])


@dataclass
class _Slot:
    """One range of batch sizes: `down` is added to the thresholds below, `average` is of accepted tokens."""

    candidates: tuple[int, ...]
    down: float
    current: int
    average: float
    seen: int = 0

    def move(self) -> bool:
        """Whether the average asked for other steps."""
        before, at = self.current, self.candidates.index(self.current)
        if before == 0:
            at = min(at + 1, len(self.candidates) - 1)
            if self.average < 0 < self.candidates[at]:
                self.average = self.candidates[at] - 1.0
        else:
            first = at
            while (
                at > 0
                and self.average <= max(self.candidates[at - 1] - 0.5, 0.5 * (self.candidates[at - 1] == 0)) + self.down
            ):
                at -= 1
            while at >= first and at < len(self.candidates) - 1 and self.average > self.candidates[at] - 0.5:
                at += 1
        self.current = self.candidates[at]
        return self.current != before

    def _threshold(self, below: int) -> float:
        """The average at which it goes down to `below` steps."""
        return (below - 0.5 if below else 0.5) + self.down


BASELINES: dict[str, Callable[[Trace], Driver]] = {
    "always-off": lambda trace: always(trace, 0, "always-off"),
    "always-on": lambda trace: always(trace, trace.header.gamma_max, "always-on"),
    "fixed": lambda trace: always(trace, min(2, trace.header.gamma_max), "fixed"),
    "static": static,
    "ema-steps": SteppedEma.of,
    "clairvoyant": Clairvoyant.of,
}
"""By name. always-off is no speculation, always-on as many tokens as the engine can draft, fixed two."""
