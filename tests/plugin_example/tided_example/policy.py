"""The policy "ladder": a fixed number of drafted tokens at each batch size, whatever was measured."""

from dataclasses import dataclass

from tided.config import SpeculationConfig
from tided.policies.base import SpeculationDecision, SpeculationObservation


@dataclass(frozen=True, slots=True)
class Ladder:
    """`steps[b - 1]` drafted tokens at batch size b, none beyond. It needs no state: None."""

    steps: tuple[int, ...]

    def start(self) -> None:
        return None

    def decide(self, state: None, seen: SpeculationObservation) -> tuple[None, SpeculationDecision]:
        most = seen.gamma_max if seen.version else 0
        steps = (self.steps + (0,) * seen.max_batch)[: seen.max_batch]
        gammas = tuple(min(gamma, most) for gamma in steps)
        reason = f"the ladder has {list(self.steps)}" if seen.version else "the engine serves no draft"
        return state, SpeculationDecision(gammas, (), seen.acceptance.alpha, False, reason)


def ladder(config: SpeculationConfig) -> Ladder:
    """The entry point. Raises `ValueError` for options that make no ladder: tided shows it."""
    steps = config.options.get("steps", [])
    if not steps or not all(isinstance(gamma, int) and gamma >= 0 for gamma in steps):
        raise ValueError(f"speculation.options.steps: expected a list of counts such as [3, 2, 1], got {steps!r}")
    return Ladder(tuple(steps))
