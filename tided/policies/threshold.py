"""The threshold policy: at each batch size the number of drafted tokens with the largest speedup that Eq. 5 predicts.

It turns on above 1 + margin, off below 1 + margin - hysteresis, changes from one gamma to another only for a gain above the
hysteresis, and at most once in `dwell_steps` engine steps. A new version is judged at once. While nothing is drafted there is no
acceptance signal, so every `probe_every_s` it drafts for `probe_steps` steps: gamma = 0 is never a trap. Each probe that changes
nothing doubles the wait for the next, up to 4 times `probe_every_s`: what keeps on not paying should cost little to know.
"""

from dataclasses import dataclass, replace
from typing import Self

from tided.config import SpeculationConfig
from tided.model.errors import Refused
from tided.policies.base import BatchChoice, SpeculationDecision, SpeculationObservation
from tided.policies.speedup import speedup_of_length

_PROBE_GAMMA = 2
_PROBE_GAMMA_LARGE = 1  # a large batch is compute bound: each drafted token costs its full share
_LARGE_BATCH = 3
_EAGER_SHARE = 0.25
_MOST_DOUBLINGS = 2


@dataclass(frozen=True, slots=True)
class ThresholdState:
    """`since_change`: engine steps under the present choice. `signal_s`: when a drafted token was judged last (or first looked).

    `fruitless`: probes in a row after which nothing was drafted still.
    """

    version: str = ""
    gammas: tuple[int, ...] = ()
    since_change: int = 0
    signal_s: float | None = None
    probe_steps_left: int = 0
    fruitless: int = 0


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """See the module. Fields as in the configuration's [speculation]."""

    margin: float = 0.03
    hysteresis: float = 0.03
    dwell_steps: int = 32
    probe_every_s: float = 20.0
    probe_steps: int = 16

    @classmethod
    def of(cls, config: SpeculationConfig) -> Self:
        """The entry point. Raises `Refused` for options, of which it has none."""
        if config.options:
            raise Refused(f"policy threshold takes no speculation.options, got {', '.join(config.options)}")
        return cls(
            margin=config.margin,
            hysteresis=config.hysteresis,
            dwell_steps=config.dwell_steps,
            probe_every_s=config.probe_every_s,
            probe_steps=config.probe_steps,
        )

    def start(self) -> ThresholdState:
        return ThresholdState()

    def decide(self, state: ThresholdState, seen: SpeculationObservation) -> tuple[ThresholdState, SpeculationDecision]:
        fresh = state.version != seen.version or len(state.gammas) != seen.max_batch
        if fresh:
            state = ThresholdState(version=seen.version, gammas=(0,) * seen.max_batch, signal_s=seen.now_s)
        choices = tuple(self._choose(seen, batch, state.gammas[batch - 1]) for batch in range(1, seen.max_batch + 1))
        wanted = tuple(choice.gamma for choice in choices)
        since = state.since_change + seen.steps
        if wanted != state.gammas and not fresh and since < self.dwell_steps:
            choices = tuple(replace(choice, gamma=gamma) for choice, gamma in zip(choices, state.gammas, strict=True))
            wanted = state.gammas
        state = replace(state, gammas=wanted, since_change=since if wanted == state.gammas and not fresh else 0)
        state = self._probe(state, seen)
        probing = state.probe_steps_left > 0
        gammas = self._probe_gammas(wanted, seen.gamma_max) if probing else wanted
        reason = self._reason(seen, choices, probing)
        return state, SpeculationDecision(gammas, choices, seen.acceptance.alpha, probing, reason)

    def _choose(self, seen: SpeculationObservation, batch: int, current: int) -> BatchChoice:
        known = bool(seen.version) and seen.acceptance.alpha is not None
        most = seen.gamma_max if known else 0
        speedups = tuple(
            speedup_of_length(seen.profile, batch, gamma, seen.acceptance.length(gamma)) for gamma in range(most + 1)
        )
        best = max(range(most + 1), key=lambda gamma: (speedups[gamma], -gamma))
        turned_on = best if speedups[best] > 1.0 + max(self.margin, self.hysteresis) else 0
        if current == 0 or current > most:
            return BatchChoice(batch, turned_on, speedups)
        if speedups[current] <= 1.0 + self.margin - self.hysteresis:
            return BatchChoice(batch, turned_on, speedups)
        better = speedups[best] > speedups[current] * (1.0 + self.hysteresis)
        return BatchChoice(batch, best if better else current, speedups)

    def _probe(self, state: ThresholdState, seen: SpeculationObservation) -> ThresholdState:
        if not seen.version or seen.gamma_max == 0:
            return replace(state, signal_s=seen.now_s, probe_steps_left=0)
        if state.probe_steps_left > 0:
            # Only steps that drafted count: a step of the old schedule says nothing.
            left = max(0, state.probe_steps_left - (seen.steps if seen.trials else 0))
            fruitless = 0 if any(state.gammas) else state.fruitless + int(left == 0)
            return replace(state, probe_steps_left=left, signal_s=seen.now_s, fruitless=fruitless)
        if seen.trials or state.signal_s is None:
            return replace(state, signal_s=seen.now_s)
        patience = _EAGER_SHARE if seen.eager else 2.0 ** min(state.fruitless, _MOST_DOUBLINGS)
        every_s = self.probe_every_s * patience
        due = seen.running > 0 and seen.now_s - state.signal_s >= every_s
        return replace(state, probe_steps_left=self.probe_steps, signal_s=seen.now_s) if due else state

    @staticmethod
    def _probe_gammas(wanted: tuple[int, ...], gamma_max: int) -> tuple[int, ...]:
        probe = [
            min(gamma_max, _PROBE_GAMMA if b < _LARGE_BATCH else _PROBE_GAMMA_LARGE) for b in range(1, len(wanted) + 1)
        ]
        return tuple(max(gamma, least) for gamma, least in zip(wanted, probe, strict=True))

    def _reason(self, seen: SpeculationObservation, choices: tuple[BatchChoice, ...], probing: bool) -> str:
        if not seen.version:
            return "the engine serves no draft"
        alpha = seen.acceptance.alpha
        if alpha is None:
            return (
                "probing: acceptance is not known yet" if probing else "acceptance is not known yet: waiting to probe"
            )
        at = choices[min(max(seen.running, 1), len(choices)) - 1]
        best = max(at.speedups)
        if probing:
            return f"probing for acceptance at batch {at.batch} (alpha was {alpha:.2f})"
        if at.gamma:
            return (
                f"at batch {at.batch} drafting {at.gamma} is predicted to give {at.predicted:.2f}x (alpha {alpha:.2f})"
            )
        return f"at batch {at.batch} drafting would give {best:.2f}x at best (alpha {alpha:.2f}), below 1 + margin"
