"""Who sets the drafted tokens while a trace is replayed. tided sees what its daemon would see: a report every half second, then a
decision, in force a moment later. `tided.replay.baselines` holds what engines and operators do without it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from tided.model.engines import StepCounts
from tided.policies.base import SpeculationDecision, SpeculationObservation, SpeculationPolicy
from tided.policies.speedup import Acceptance, smoothed
from tided.replay.trace import Trace

REPORT_S = 0.5
"""Between an engine's reports, and between control cycles: the defaults of config.toml."""
APPLY_S = 0.25
"""From the end of a report's time to the schedule in force: report, cycle, command, step boundary."""


@dataclass
class Driver:
    """A fixed schedule, and the base of those that change theirs. `gammas[b - 1]` holds now; `changes` counts changes of it.

    `tick(now_s)` is called once time has reached `due_s`, `stepped` after each step with its number in the trace.
    """

    name: str
    gammas: Sequence[int]
    changes: int = 0
    due_s: float = inf

    def tick(self, now_s: float) -> None:
        """Time has come to `due_s`; sets the next."""

    def stepped(self, step: int, batch: int, gamma: int, seconds: float) -> None:
        """The engine ran `step` of the trace."""

    def change(self, gammas: Sequence[int]) -> None:
        """Put `gammas` in force."""
        if tuple(gammas) != tuple(self.gammas):
            self.gammas, self.changes = gammas, self.changes + 1


@dataclass
class Tided(Driver):
    """A policy, told what the daemon would tell it. `in_force`: the decision that the present schedule comes from."""

    policy: SpeculationPolicy[Any] = field(kw_only=True)
    trace: Trace = field(kw_only=True)
    in_force: SpeculationDecision | None = None

    def __post_init__(self) -> None:
        header = self.trace.header
        self._profile = smoothed(header.told or header.profile)
        self._state = self.policy.start()
        self._acceptance = Acceptance()
        self._counts: dict[tuple[int, int], tuple[list[int], float]] = {}
        self._running = 0
        self._waiting: SpeculationDecision | None = None
        self._report_s = 0.0
        self.due_s = 0.0

    def stepped(self, step: int, batch: int, gamma: int, seconds: float) -> None:
        steps, before_s = self._counts.get((batch, gamma), ([], 0.0))
        steps.append(step)
        self._counts[batch, gamma] = steps, before_s + seconds
        self._running = batch

    def tick(self, now_s: float) -> None:
        if self._waiting is not None:
            self.change(self._waiting.gammas)
            self.in_force, self._waiting, self.due_s = self._waiting, None, self._report_s
            return
        measured = self._take()
        new = Acceptance.of(measured)
        self._acceptance = self._acceptance.faded(new.steps).plus(new)
        header = self.trace.header
        seen = SpeculationObservation(
            now_s=self._report_s,
            version="draft",
            profile=self._profile,
            acceptance=self._acceptance,
            measured=measured,
            running=self._running,
            max_batch=header.max_batch,
            gamma_max=header.gamma_max,
        )
        self._state, self._waiting = self.policy.decide(self._state, seen)
        self.due_s = self._report_s + APPLY_S
        self._report_s += REPORT_S
        self._running = 0

    def _take(self) -> tuple[StepCounts, ...]:
        """The report: counts since the last one."""
        taken, self._counts = self._counts, {}
        found: list[StepCounts] = []
        for (batch, gamma), (steps, seconds) in sorted(taken.items()):
            whole = self.trace.histograms[steps].sum(axis=0)
            accepted = (*whole[:gamma].tolist(), int(whole[gamma:].sum()))
            found.append(StepCounts(batch, gamma, len(steps), seconds, accepted))
        return tuple(found)
