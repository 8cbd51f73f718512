"""The bandit policy: learns what each number of drafted tokens really gives, with Eq. 5 as its prior.

An arm is a number of drafted tokens in a bucket of batch sizes (1, 2, 3-4, 5-8, ...). Its reward is the tokens a second that the engine
measured with it, as a multiple of what Eq. 5 predicts at the acceptance known by then: so a reward stays true while acceptance moves, and
what is learnt is where the profile is wrong. Rewards fade. An arm that was hardly tried is taken to be as far off as its bucket is.

The best arm is chosen as the threshold policy chooses (margin, hysteresis, dwell, loss account). Now and then another arm of the
bucket that is running is tried for about a second: the one that could be the best by its uncertainty; while nothing is drafted, one
token, for acceptance would not be known otherwise. The sum of the losses that the policy predicts for its trials stays below the
share `exploration` of the tokens that it predicts, in any 60 s of serving. The future is not known, so only a part of that is
spent, measured by the lowest rate of the past minutes.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from operator import mul
from typing import Any, Self

from tided.config import SpeculationConfig
from tided.model.engines import LatencyProfile, StepCounts
from tided.model.errors import Refused
from tided.policies.base import BatchChoice, SpeculationDecision, SpeculationObservation
from tided.policies.choice import Held, Rule, could_pay, predictions
from tided.policies.evidence import Evidence, LossAccount, figures, lost_s
from tided.policies.speedup import steps_s
from tided.policies.trials import RESERVED_S, Allowance, Arm, Trial, bucket

EXPLORATION = 0.02
"""Of the predicted tokens, what trials may lose."""
_TRIAL_S = 0.9  # at least this long, at the first decision after it
_HALF_LIFE_S = 120.0
_PRIOR_STEPS = 100.0  # request-steps that the prior of an arm's reward is worth
_UNSURE = 0.1  # relative uncertainty of an arm that was never tried: the paper finds Eq. 5 within 9%
_EAGER_SHARE = 0.25
_BUSY_SHARE = 4.0  # while drafting, acceptance is known anyway: trials may wait longer


@dataclass(frozen=True, slots=True)
class BanditState:
    """`held`: what is believed best. `arms` by (bucket, gamma): what was learnt against `profile`."""

    version: str = ""
    held: Held = field(default_factory=Held)
    profile: LatencyProfile | None = None
    stopped: bool = False
    at_s: float = 0.0
    evidence: Evidence = field(default_factory=Evidence)
    account: LossAccount = field(default_factory=LossAccount)
    arms: dict[tuple[int, int], Arm] = field(default_factory=dict[tuple[int, int], Arm])
    allowance: Allowance = field(default_factory=Allowance)
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class BanditPolicy:
    """See the module. Fields as in the configuration's [speculation]; `exploration` is its option of that name."""

    margin: float = 0.03
    hysteresis: float = 0.03
    dwell_steps: int = 32
    most_lost: float = 0.02
    probe_every_s: float = 5.0
    exploration: float = EXPLORATION

    @classmethod
    def of(cls, config: SpeculationConfig) -> Self:
        """The entry point. Raises `Refused` for other options than `exploration`, or a share that is none."""
        options: dict[str, Any] = dict(config.options)
        share = options.pop("exploration", EXPLORATION)
        if options:
            raise Refused(f"policy bandit takes speculation.options.exploration only, got {', '.join(options)}")
        if not isinstance(share, int | float) or not 0 < share <= 0.1:
            raise Refused(f"speculation.options.exploration: expected a share above 0 and at most 0.1, got {share!r}")
        return cls(
            margin=config.margin,
            hysteresis=config.hysteresis,
            dwell_steps=config.dwell_steps,
            most_lost=config.most_lost,
            probe_every_s=config.probe_every_s,
            exploration=float(share),
        )

    def start(self) -> BanditState:
        return BanditState()

    def decide(self, state: BanditState, seen: SpeculationObservation) -> tuple[BanditState, SpeculationDecision]:
        if state.version != seen.version or len(state.held.gammas) != seen.max_batch:
            held = Held((0,) * seen.max_batch)
            anew = BanditState(seen.version, held, state.profile, at_s=state.at_s)
            state = replace(anew, arms=state.arms, allowance=state.allowance)
        if (
            state.profile != seen.profile
        ):  # what was learnt about times holds for the next draft, but for no other profile
            state = replace(state, profile=seen.profile, arms={})
        state = replace(
            state, held=state.held.allowed(seen), evidence=state.evidence.add(seen.now_s, seen.measured, seen.shadow)
        )
        acceptance = state.evidence.best(seen.acceptance)
        predicted = predictions(seen, acceptance)
        state = self._learn(state, seen, predicted)
        rule = Rule(self.margin, self.hysteresis, self.dwell_steps)
        choices, held = rule.settle(state.held, self._estimates(state, predicted), seen.steps, stopped=state.stopped)
        state = replace(state, held=held)
        state = self._try(state, seen, choices, known=acceptance.alpha is not None)
        trial = state.trial if state.trial is not None and not state.trial.over else None
        gammas = tuple(
            trial.gamma if trial is not None and bucket(b) == trial.bucket else gamma
            for b, gamma in enumerate(held.gammas, 1)
        )
        told = (*figures(seen, state.evidence, state.account), *self._figures(state, seen))
        reason = self._reason(seen, state, choices, trial)
        return state, SpeculationDecision(gammas, choices, acceptance.alpha, trial is not None, reason, told)

    # --- what was measured ---

    def _learn(
        self, state: BanditState, seen: SpeculationObservation, predicted: tuple[tuple[float, ...], ...]
    ) -> BanditState:
        """Take rewards, the loss account and the allowance of trials on to `seen`."""
        keep = 0.5 ** (max(seen.now_s - state.at_s, 0.0) / _HALF_LIFE_S)
        arms = {key: arm.faded(keep) for key, arm in state.arms.items()}
        base = steps_s(seen.profile, seen.max_batch, 0)
        chosen: list[StepCounts] = []  # what was no trial
        seconds = tokens = loss = 0.0
        for counts in seen.measured:
            if counts.batch > seen.max_batch or counts.seconds <= 0:
                continue
            row, none = predicted[counts.batch - 1], counts.batch / base[counts.batch - 1][0]
            seconds += counts.seconds
            tokens += counts.seconds * none * row[state.held.gammas[counts.batch - 1]]
            if counts.gamma < len(row):
                emitted = sum((k + 1) * n for k, n in enumerate(counts.accepted))
                reward = emitted / counts.seconds / (none * row[counts.gamma])
                key = (bucket(counts.batch), counts.gamma)
                arms[key] = arms.get(key, Arm()).add(float(counts.steps * counts.batch), reward)
            if state.trial is not None and state.trial.made(seen.now_s, counts, state.held.gammas[counts.batch - 1]):
                loss += counts.seconds * none * state.trial.loss(counts.batch)
            else:
                chosen.append(counts)
        account = state.account.add(seen.now_s, lost_s(seen.profile, chosen, seen.max_batch, seen.gamma_max))
        return replace(
            state,
            at_s=seen.now_s,
            arms=arms,
            account=account,
            stopped=account.overdrawn(self.most_lost, already=state.stopped),
            allowance=state.allowance.add(seconds, tokens, loss),
        )

    # --- what is believed ---

    @staticmethod
    def _estimates(state: BanditState, predicted: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        """Speedups by Eq. 5, each corrected by what its arm gave beside no speculation; 1.0 at gamma = 0."""
        corrections: list[tuple[float, ...]] = []
        for at in range(bucket(len(predicted)) + 1):
            arms = [state.arms.get((at, gamma), Arm()) for gamma in range(len(predicted[0]))]
            weight, reward = sum(arm.weight for arm in arms), sum(arm.reward for arm in arms)
            common = (reward + _PRIOR_STEPS) / (weight + _PRIOR_STEPS)
            factors = [(arm.reward + _PRIOR_STEPS * common) / (arm.weight + _PRIOR_STEPS) for arm in arms]
            corrections.append(tuple(factor / factors[0] for factor in factors))
        return tuple(tuple(map(mul, row, corrections[bucket(b)])) for b, row in enumerate(predicted, 1))

    # --- trials ---

    def _try(
        self, state: BanditState, seen: SpeculationObservation, choices: tuple[BatchChoice, ...], *, known: bool
    ) -> BanditState:
        """Begin a trial, go on with it, or end it."""
        trial = state.trial
        if trial is not None and not trial.over:
            if state.stopped or trial.gamma > seen.gamma_max or seen.now_s - trial.began_s >= _TRIAL_S:
                trial = replace(trial, ended_s=seen.now_s)
            return replace(state, trial=trial)
        if state.stopped or not seen.version or seen.gamma_max == 0 or seen.running == 0:
            return state
        choice = choices[min(seen.running, seen.max_batch) - 1]
        every_s = self.probe_every_s * (_BUSY_SHARE if choice.gamma else _EAGER_SHARE if seen.eager else 1.0)
        gamma, batch = self._candidate(state, seen, choice), choice.batch
        if gamma is None or (trial is not None and known and seen.now_s - trial.began_s < every_s):
            return state
        trial = Trial(bucket(batch), gamma, choices, seen.now_s)
        none = batch / steps_s(seen.profile, seen.max_batch, 0)[batch - 1][0]
        cost = RESERVED_S * none * trial.loss(batch)
        return replace(state, trial=trial) if cost <= state.allowance.room(self.exploration) else state

    @staticmethod
    def _candidate(state: BanditState, seen: SpeculationObservation, choice: BatchChoice) -> int | None:
        """The arm worth a trial at this batch size, if there is one."""
        if choice.gamma == 0:
            return could_pay(seen.profile, choice.batch, seen.gamma_max)
        at = bucket(choice.batch)

        def hope(gamma: int) -> float:
            weight = state.arms.get((at, gamma), Arm()).weight
            return choice.speedups[gamma] * (1.0 + _UNSURE / sqrt(1.0 + weight / _PRIOR_STEPS))

        others = [gamma for gamma in range(seen.gamma_max + 1) if gamma != choice.gamma]
        best = max(others, key=hope)
        return best if hope(best) > choice.predicted else None

    # --- for people ---

    def _figures(self, state: BanditState, seen: SpeculationObservation) -> tuple[tuple[str, float], ...]:
        at = bucket(min(max(seen.running, 1), seen.max_batch))
        rewards = tuple(
            (f"measured over Eq. 5, gamma {gamma}", arm.reward / arm.weight)
            for (where, gamma), arm in sorted(state.arms.items())
            if where == at and arm.weight >= 1.0
        )
        return (
            *rewards,
            ("tokens lost to trials in 60 s", state.allowance.lost),
            ("tokens that trials may lose more", state.allowance.room(self.exploration)),
        )

    def _reason(
        self, seen: SpeculationObservation, state: BanditState, choices: tuple[BatchChoice, ...], trial: Trial | None
    ) -> str:
        if not seen.version:
            return "the engine serves no draft"
        at = choices[min(max(seen.running, 1), len(choices)) - 1]
        if state.stopped:
            return f"drafting cost {state.account.balance_s:.1f} s in the last minute: off until that is forgotten"
        if trial is not None:
            return f"trying {trial.gamma} drafted tokens at batch {at.batch}, where {at.gamma} seems best"
        if at.gamma:
            return f"at batch {at.batch} drafting {at.gamma} is expected to give {at.predicted:.2f}x"
        return f"at batch {at.batch} drafting would give {max(at.speedups):.2f}x at best, below 1 + margin"
