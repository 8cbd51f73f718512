"""What a policy is: a pure function of a state and an observation. No clock, no IO, and every decision carries its figures."""

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tided.model.engines import LatencyProfile, StepCounts
from tided.policies.speedup import Acceptance

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class SpeculationObservation:
    """What is known about an engine at `now_s` (any monotonic clock).

    `acceptance`: recent counts of the served `version`, with its gate's evaluation as prior and what it scored offline. `measured`: what
    the engine did since the previous observation, by batch size and gamma: steps, seconds, tokens accepted. `version` "" is no draft.
    """

    now_s: float
    version: str
    profile: LatencyProfile
    acceptance: Acceptance
    measured: tuple[StepCounts, ...]
    running: int
    max_batch: int
    gamma_max: int
    eager: bool = False  # acceptance is wanted soon: a new version is being watched
    shadow: Acceptance = field(
        default_factory=Acceptance
    )  # scored offline on tapped states, since the previous observation

    @property
    def steps(self) -> int:
        """Engine steps since the previous observation."""
        return sum(counts.steps for counts in self.measured)

    @property
    def trials(self) -> int:
        """Request-steps that drafted since the previous observation."""
        return sum(sum(counts.accepted) for counts in self.measured if counts.gamma)


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The choice at one batch size. `speedups[g]` is Eq. 5 at g drafted tokens (1.0 at 0)."""

    batch: int
    gamma: int
    speedups: tuple[float, ...]

    @property
    def predicted(self) -> float:
        return self.speedups[self.gamma] if self.gamma < len(self.speedups) else 1.0


@dataclass(frozen=True, slots=True)
class SpeculationDecision:
    """gammas[b - 1] drafted tokens at batch size b. `choices` is what the predictions say; while probing, `gammas` differ from it.

    `figures`: whatever else led to it, by name, for people: `tidectl policy explain` shows them.
    """

    gammas: tuple[int, ...]
    choices: tuple[BatchChoice, ...]
    alpha: float | None
    probing: bool
    reason: str
    figures: tuple[tuple[str, float], ...] = ()

    def resting(self, running: int) -> bool:
        """Whether nothing is drafted at this batch size, probes aside."""
        at = min(max(running, 1), len(self.gammas)) - 1
        return (self.choices[at].gamma if self.choices else self.gammas[at]) == 0


class SpeculationPolicy(Protocol[S]):
    """Decides how many tokens are drafted at each batch size."""

    def start(self) -> S:
        """The state before anything was observed."""
        ...

    def decide(self, state: S, seen: SpeculationObservation) -> tuple[S, SpeculationDecision]: ...
