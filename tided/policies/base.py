"""What a policy is: a pure function of a state and an observation. No clock, no IO, and every decision carries its figures."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from tided.model.records import LatencyProfile
from tided.policies.speedup import Acceptance

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class SpeculationObservation:
    """What is known about an engine at `now_s` (any monotonic clock).

    `acceptance`: recent counts of the served `version`, its gate's evaluation as prior included. `trials`: request-steps that
    drafted since the previous observation; `steps`: engine steps since the previous observation. `version` "" is no draft.
    """

    now_s: float
    version: str
    profile: LatencyProfile
    acceptance: Acceptance
    trials: int
    steps: int
    running: int
    max_batch: int
    gamma_max: int
    eager: bool = False  # acceptance is wanted soon: a new version is being watched


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
    """gammas[b - 1] drafted tokens at batch size b. `choices` is what the figures say; while probing, `gammas` differ from it."""

    gammas: tuple[int, ...]
    choices: tuple[BatchChoice, ...]
    alpha: float | None
    probing: bool
    reason: str


class SpeculationPolicy(Protocol[S]):
    """Decides how many tokens are drafted at each batch size."""

    def start(self) -> S:
        """The state before anything was observed."""
        ...

    def decide(self, state: S, seen: SpeculationObservation) -> tuple[S, SpeculationDecision]: ...
