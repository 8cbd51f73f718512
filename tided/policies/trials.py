"""The bandit's arms, its trials of them, and what trials may lose."""

from dataclasses import dataclass
from math import exp, inf

from tided.model.engines import StepCounts
from tided.policies.base import BatchChoice

WINDOW_S = 60.0
"""Of serving, over which trials may lose their share."""
RESERVED_S = 1.4
"""Of serving that a trial lasts at most, with reports and commands on their way."""
LATE_S = 1.0
"""How long after its end steps of a trial are still reported."""
_RESERVE_SHARE = (
    0.6  # enough for one trial of any arm that could pay: one that loses half gains nothing even if all is accepted
)
_FLOOR_S = 300.0  # time constant with which a low rate is forgotten


def bucket(batch: int) -> int:
    """0 for batch 1, 1 for 2, 2 for 3-4, 3 for 5-8, ..."""
    return (batch - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Arm:
    """`weight`: request-steps measured, fading. `reward`: the sum over them of measured over predicted tokens a second."""

    weight: float = 0.0
    reward: float = 0.0

    def faded(self, keep: float) -> "Arm":
        return Arm(self.weight * keep, self.reward * keep)

    def add(self, weight: float, reward: float) -> "Arm":
        return Arm(self.weight + weight, self.reward + weight * reward)


@dataclass(frozen=True, slots=True)
class Trial:
    """An arm that is being tried: `choices` are those of the decision that began it, and say what it is predicted to lose."""

    bucket: int
    gamma: int
    choices: tuple[BatchChoice, ...]
    began_s: float
    ended_s: float = inf

    @property
    def over(self) -> bool:
        return self.ended_s < inf

    def made(self, now_s: float, counts: StepCounts, chosen: int) -> bool:
        """Whether steps reported now were the trial's: its last ones come in late, and an arm that is `chosen` since is no trial."""
        own = bucket(counts.batch) == self.bucket and counts.gamma == self.gamma and counts.batch <= len(self.choices)
        return own and now_s - self.ended_s <= LATE_S and (not self.over or self.gamma != chosen)

    def loss(self, batch: int) -> float:
        """What it is predicted to lose at `batch`, as a multiple of the rate without speculation."""
        choice = self.choices[batch - 1]
        return max(choice.predicted - choice.speedups[self.gamma], 0.0)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What trials have lost. `entries`: (serving clock, predicted loss in tokens) of the last 60 s; `floor`: the lowest rate lately."""

    served_s: float = 0.0
    entries: tuple[tuple[float, float], ...] = ()
    floor: float | None = None

    def add(self, seconds: float, tokens: float, loss: float) -> "Allowance":
        """`seconds` of serving went by, in which `tokens` were predicted, and trials were predicted to lose `loss`."""
        if seconds <= 0:
            return self
        now_s, rate = self.served_s + seconds, tokens / seconds
        floor = rate if self.floor is None else self.floor + (rate - self.floor) * (1.0 - exp(-seconds / _FLOOR_S))
        kept = tuple(entry for entry in self.entries if entry[0] > now_s - WINDOW_S)
        return Allowance(now_s, (*kept, (now_s, loss)) if loss > 0 else kept, min(floor, rate))

    @property
    def lost(self) -> float:
        return sum(loss for _, loss in self.entries)

    def room(self, share: float) -> float:
        """Tokens that trials may lose more."""
        return _RESERVE_SHARE * share * WINDOW_S * (self.floor or 0.0) - self.lost
