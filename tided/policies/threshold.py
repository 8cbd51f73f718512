"""The threshold policy: at each batch size the number of drafted tokens with the largest speedup that Eq. 5 predicts.

It turns on above 1 + margin, off below 1 + margin - hysteresis, changes from one gamma to another only for a gain above the
hysteresis, and at most once in `dwell_steps` engine steps, unless it surely loses. A new version is judged at once. Where the newest
counts surely differ from the longer memory, they are believed (`Evidence`). T(n) follows the steps that are served (`Calibration`).

While nothing is drafted there is no acceptance signal, so now and then it drafts one token, until `probe_steps` of them were judged:
gamma = 0 is never a trap. After each probe it waits for so long that probes cost no more than the share `probe_loss` of the time, and
at least `probe_every_s`; time in which the engine does nothing does not count. Traffic that turns against every decision is met by the
loss account: once drafting has cost `most_lost` of the last minute beyond what it gained, probes aside, nothing is drafted until a
quarter of that is forgotten.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from tided.config import SpeculationConfig
from tided.model.errors import Refused
from tided.policies.base import BatchChoice, SpeculationDecision, SpeculationObservation
from tided.policies.calibration import Calibration
from tided.policies.choice import Held, Rule, could_pay, predictions
from tided.policies.evidence import Evidence, LossAccount, figures, lost_s
from tided.policies.speedup import Acceptance

_EAGER_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class ThresholdState:
    """`served_s`: for how long the engine has had requests, by `at_s`; the two that follow are on that clock.

    `signal_s`: when a drafted token was judged last, or first looked for. `probe_due_s`: when the next probe may begin.
    `probe_lost_s`: seconds that the probe under way has cost. `stopped`: the loss account is overdrawn.
    """

    version: str = ""
    held: Held = field(default_factory=Held)
    at_s: float | None = None
    served_s: float = 0.0
    signal_s: float = 0.0
    probe_due_s: float = 0.0
    probe_steps_left: int = 0
    probe_lost_s: float = 0.0
    stopped: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    account: LossAccount = field(default_factory=LossAccount)
    calibration: Calibration | None = None

    def at(self, seen: SpeculationObservation) -> Self:
        """The same by the time of `seen`."""
        passed_s = 0.0 if self.at_s is None or not (seen.steps or seen.running) else max(seen.now_s - self.at_s, 0.0)
        return replace(self, at_s=seen.now_s, served_s=self.served_s + passed_s)


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """See the module. Fields as in the configuration's [speculation]."""

    margin: float = 0.03
    hysteresis: float = 0.03
    dwell_steps: int = 32
    probe_every_s: float = 5.0
    probe_steps: int = 16
    probe_loss: float = 0.01
    most_lost: float = 0.02

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
            probe_loss=config.probe_loss,
            most_lost=config.most_lost,
        )

    def start(self) -> ThresholdState:
        return ThresholdState()

    def decide(self, state: ThresholdState, seen: SpeculationObservation) -> tuple[ThresholdState, SpeculationDecision]:
        state = state.at(seen)
        if state.version != seen.version or len(state.held.gammas) != seen.max_batch:
            # What is known of its acceptance needs no probe at once.
            due_s = state.served_s + (0.0 if seen.acceptance.alpha is None else self.probe_every_s)
            held, now_s = Held((0,) * seen.max_batch), state.served_s
            state = ThresholdState(seen.version, held, seen.now_s, now_s, now_s, due_s, calibration=state.calibration)
        calibration = state.calibration
        if calibration is None or calibration.profile != seen.profile:
            calibration = Calibration.of(seen.profile, seen.now_s)
        calibration = calibration.add(seen.now_s, seen.measured)
        seen, state = replace(seen, profile=calibration.corrected()), replace(state, calibration=calibration)
        state, lost = self._learn(state, seen)
        acceptance = state.evidence.best(seen.acceptance)
        rule = Rule(self.margin, self.hysteresis, self.dwell_steps)
        choices, held = rule.settle(state.held, predictions(seen, acceptance), seen.steps, stopped=state.stopped)
        state = replace(state, held=held)
        state = self._probe(state, seen, lost)
        probing = state.probe_steps_left > 0
        gammas = tuple(max(gamma, 1) for gamma in held.gammas) if probing else held.gammas
        reason = self._reason(seen, state, choices, acceptance)
        return state, SpeculationDecision(
            gammas, choices, acceptance.alpha, probing, reason, figures(seen, state.evidence, state.account)
        )

    def _learn(self, state: ThresholdState, seen: SpeculationObservation) -> tuple[ThresholdState, float]:
        """The state with what was measured taken in, and the seconds that it lost."""
        lost = lost_s(seen.profile, seen.measured, seen.max_batch, seen.gamma_max)
        probed = state.probe_steps_left > 0 or not any(state.held.gammas)  # what probes cost has a bound of its own
        account = state.account.add(seen.now_s, 0.0 if probed else lost)
        stopped = account.overdrawn(self.most_lost, already=state.stopped)
        evidence, held = state.evidence.add(seen.now_s, seen.measured, seen.shadow), state.held.allowed(seen)
        return replace(state, held=held, evidence=evidence, account=account, stopped=stopped), lost

    def _probe(self, state: ThresholdState, seen: SpeculationObservation, lost: float) -> ThresholdState:
        now_s = state.served_s
        if not seen.version or seen.gamma_max == 0 or state.stopped:
            return replace(state, probe_steps_left=0)
        if state.probe_steps_left > 0:
            left = max(0, state.probe_steps_left - seen.trials)
            cost = state.probe_lost_s + lost
            due_s = now_s + max(self.probe_every_s, cost / self.probe_loss)
            return replace(state, probe_steps_left=left, probe_lost_s=cost, probe_due_s=due_s, signal_s=now_s)
        if seen.trials:
            # Of a probe that is over steps may still come in, and cost.
            due_s = max(now_s + self.probe_every_s, state.probe_due_s)
            if not any(state.held.gammas):
                due_s += max(lost, 0.0) / self.probe_loss
            return replace(state, probe_due_s=due_s, signal_s=now_s)
        soon_s = state.signal_s + _EAGER_SHARE * self.probe_every_s
        due_s = min(state.probe_due_s, soon_s) if seen.eager else state.probe_due_s
        batch = min(seen.running, seen.max_batch)
        if batch and now_s >= due_s and could_pay(seen.profile, batch, seen.gamma_max) is not None:
            return replace(state, probe_steps_left=self.probe_steps, probe_lost_s=0.0)
        return state

    def _reason(
        self,
        seen: SpeculationObservation,
        state: ThresholdState,
        choices: tuple[BatchChoice, ...],
        acceptance: Acceptance,
    ) -> str:
        if not seen.version:
            return "the engine serves no draft"
        alpha, probing = acceptance.alpha, state.probe_steps_left > 0
        if alpha is None:
            return (
                "probing: acceptance is not known yet" if probing else "acceptance is not known yet: waiting to probe"
            )
        at = choices[min(max(seen.running, 1), len(choices)) - 1]
        if state.stopped:
            return f"drafting cost {state.account.balance_s:.1f} s in the last minute: off until that is forgotten"
        if probing:
            return f"probing for acceptance at batch {at.batch} (alpha was {alpha:.2f})"
        if at.gamma:
            return (
                f"at batch {at.batch} drafting {at.gamma} is predicted to give {at.predicted:.2f}x (alpha {alpha:.2f})"
            )
        best = max(at.speedups)
        return f"at batch {at.batch} drafting would give {best:.2f}x at best (alpha {alpha:.2f}), below 1 + margin"
