"""The bandit: what it learns from rewards, which arms it tries, and that trying is bounded, in replay over generated traces."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_policies_threshold import PROFILE, ran, seen
from tided.config import SpeculationConfig
from tided.model.engines import StepCounts
from tided.model.errors import Refused
from tided.policies.bandit import BanditPolicy, BanditState
from tided.policies.base import SpeculationDecision, SpeculationObservation, SpeculationPolicy
from tided.policies.evidence import LossAccount
from tided.policies.registry import policy_for
from tided.policies.speedup import smoothed, step_s
from tided.policies.trials import WINDOW_S, bucket
from tided.replay.drivers import Tided
from tided.replay.generate import KINDS, generate
from tided.replay.simulate import run
from tided.replay.trace import Trace

POLICY = BanditPolicy()


def decide(*observations: SpeculationObservation, policy: BanditPolicy = POLICY) -> list[SpeculationDecision]:
    state, decisions = policy.start(), list[SpeculationDecision]()
    for observation in observations:
        state, decision = policy.decide(state, observation)
        decisions.append(decision)
    return decisions


def served(
    alpha: float, factors: dict[int, float], seconds: int = 120, batch: int = 1, policy: BanditPolicy = POLICY
) -> Iterable[SpeculationDecision]:
    """Half seconds of an engine whose steps take `factors[gamma]` times what its profile says, and that does as it is told."""
    state, gammas = policy.start(), (0,) * 8
    for half in range(2 * seconds):
        gamma = gammas[batch - 1]
        [counts] = ran(40, alpha, batch, gamma) if gamma else ran(40, batch=batch)
        took = 40 * step_s(PROFILE, batch, gamma) * factors.get(gamma, 1.0)
        observation = seen(alpha, now_s=half / 2, running=batch, measured=(replace(counts, seconds=took),))
        state, decision = policy.decide(state, observation)
        gammas = decision.gammas
        yield decision


def test_it_is_a_speculation_policy_by_entry_point() -> None:
    policy: SpeculationPolicy[BanditState] = POLICY
    assert policy.start() == BanditState()
    assert policy_for(SpeculationConfig(policy="bandit")) == POLICY
    made = policy_for(SpeculationConfig(policy="bandit", margin=0.1, options={"exploration": 0.01}))
    assert made == BanditPolicy(margin=0.1, exploration=0.01)
    with pytest.raises(Refused, match="exploration only, got depth"):
        BanditPolicy.of(SpeculationConfig(options={"depth": 1}))
    for share in (0, 0.5, "much"):
        with pytest.raises(Refused, match="above 0 and at most"):
            BanditPolicy.of(SpeculationConfig(options={"exploration": share}))


def test_buckets() -> None:
    assert [bucket(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [0, 1, 2, 2, 3, 3, 4, 4, 5]


def test_without_rewards_it_is_eq_5() -> None:
    [decision] = decide(seen(0.6, measured=()))
    assert decision.gammas[0] >= 2
    assert decision.gammas[7] == 0


def test_unknown_acceptance_is_tried_within_the_allowance() -> None:
    decisions = decide(*(seen(None, now_s=i / 2, measured=ran(10)) for i in range(20)))
    assert any(decision.probing and decision.gammas[0] == 1 for decision in decisions)
    assert not any(decision.probing for decision in decide(*(seen(None, now_s=float(i), running=0) for i in range(20))))


def test_it_learns_that_drafting_is_dearer_than_the_profile_says() -> None:
    """By Eq. 5 three or four tokens are best at batch 1; the engine takes 40% longer for more than two."""
    last = list(served(0.7, {3: 1.4, 4: 1.4}, seconds=300))[-60:]
    assert {decision.choices[0].gamma for decision in last} <= {1, 2}
    believed = list(served(0.7, {}))[-60:]
    assert {decision.choices[0].gamma for decision in believed} <= {3, 4}


def test_another_profile_is_learnt_anew() -> None:
    [counts] = ran(40, 0.7, 1, 2)
    slow = replace(counts, seconds=2 * counts.seconds)
    served_slowly = [seen(0.7, now_s=half / 2, measured=(slow,)) for half in range(20)]
    other = seen(0.7, now_s=10.0, measured=(), profile=replace(PROFILE, idle_drafts=1.0))
    *_, learnt, forgotten = decide(*served_slowly, other)
    assert dict(learnt.figures)["measured over Eq. 5, gamma 2"] < 0.9
    assert "measured over Eq. 5, gamma 2" not in dict(forgotten.figures)


def test_load_that_slows_everything_changes_nothing() -> None:
    chosen = {decision.choices[0].gamma for decision in list(served(0.7, dict.fromkeys(range(5), 2.0)))[60:]}
    assert chosen <= {3, 4}


def test_a_useless_draft_is_off_and_tried_now_and_then() -> None:
    decisions = list(served(0.05, {}, seconds=120, batch=8))
    assert {decision.choices[7].gamma for decision in decisions[2:]} == {0}
    begun = sum(b.probing and not a.probing for a, b in pairwise(decisions))
    assert 2 <= begun <= 24


def test_only_the_bucket_that_runs_is_tried() -> None:
    tried = [decision for decision in served(0.05, {}, batch=4) if decision.probing]
    assert tried
    for decision in tried:
        assert decision.gammas[:2] == (0, 0)
        assert decision.gammas[2:4] == (1, 1)
        assert decision.gammas[4:] == (0, 0, 0, 0)


def test_a_decision_carries_its_figures() -> None:
    *_, last = served(0.7, {4: 1.3})
    figures = dict(last.figures)
    assert "tokens that trials may lose more" in figures
    assert any(name.startswith("measured over Eq. 5, gamma") for name in figures)


@given(st.floats(0.0, 1.0), st.integers(0, 8), st.integers(1, 16), st.lists(st.integers(0, 40), max_size=20))
def test_never_above_what_is_allowed(alpha: float, gamma_max: int, max_batch: int, running: list[int]) -> None:
    observations = [
        seen(alpha, gamma_max=gamma_max, max_batch=max_batch, now_s=3.0 * i, running=batch, measured=ran(20))
        for i, batch in enumerate(running)
    ]
    for decision in decide(*observations):
        assert len(decision.gammas) == max_batch
        assert all(0 <= gamma <= gamma_max for gamma in decision.gammas)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_better_draft_never_drafts_less(a: float, b: float) -> None:
    low, high = (decide(seen(alpha))[0] for alpha in sorted((a, b)))
    assert all(x.gamma <= y.gamma for x, y in zip(low.choices, high.choices, strict=True))


@given(st.permutations([StepCounts(1, 2, 9, 0.5, (3, 3, 3)), *ran(20, 0.5, 2, 1), *ran(7), *ran(12, 0.9, 4, 3)]))
def test_the_order_of_evidence_within_an_observation_makes_no_difference(measured: list[StepCounts]) -> None:
    first = decide(seen(0.5), seen(0.5, now_s=0.5, measured=tuple(sorted(measured, key=str))))[1]
    other = decide(seen(0.5), seen(0.5, now_s=0.5, measured=tuple(measured)))[1]
    assert first.gammas == other.gammas
    assert [value for _, value in first.figures] == pytest.approx([value for _, value in other.figures])


@dataclass
class Accountant(Tided):
    """Adds up by the decisions alone what trials were predicted to lose, and what was predicted in all: (serving clock, loss, tokens)."""

    book: list[tuple[float, float, float]] = field(default_factory=list[tuple[float, float, float]])

    def stepped(self, step: int, batch: int, gamma: int, seconds: float) -> None:
        super().stepped(step, batch, gamma, seconds)
        decision, clock = self.in_force, self.book[-1][0] if self.book else 0.0
        if decision is None:
            return
        profile, choice = smoothed(self.trace.header.told or self.trace.header.profile), decision.choices[batch - 1]
        best = seconds * batch / step_s(profile, batch, 0) * choice.predicted
        loss = best * (1.0 - choice.speedups[gamma] / choice.predicted) if decision.probing else 0.0
        self.book.append((clock + seconds, max(loss, 0.0), best))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000))
def test_trials_lose_at_most_their_share_in_any_minute(kind: str, seed: int) -> None:
    trace = generate(kind, seed, 200.0)
    assert worst_share(trace, POLICY) <= POLICY.exploration


def worst_share(trace: Trace, policy: BanditPolicy) -> float:
    """The largest share of the predicted tokens that trials were predicted to lose, of all windows of 60 s of serving."""
    driver = Accountant("bandit", (0,) * trace.header.max_batch, policy=policy, trace=trace)
    run(trace, driver)
    first, loss, tokens, worst = 0, 0.0, 0.0, 0.0
    for clock, lost, best in driver.book:
        loss, tokens = loss + lost, tokens + best
        while driver.book[first][0] <= clock - WINDOW_S:
            loss, tokens = loss - driver.book[first][1], tokens - driver.book[first][2]
            first += 1
        if clock >= WINDOW_S:
            worst = max(worst, loss / tokens)
    assert len(driver.book) > 100
    return worst


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.floats(0.0, 1.0))
def test_what_is_allowed_may_change_at_any_time(most: list[int], alpha: float) -> None:
    observations = [
        seen(alpha, gamma_max=gamma_max, now_s=i / 2, measured=ran(5, alpha, batch=2, gamma=max(gamma_max, 1)))
        for i, gamma_max in enumerate(most)
    ]
    for gamma_max, decision in zip(most, decide(*observations), strict=True):
        assert all(gamma <= gamma_max for gamma in decision.gammas)


def test_a_new_version_does_not_answer_for_what_the_old_one_lost() -> None:
    state = replace(POLICY.start(), version="v1", stopped=True, account=LossAccount(5.0))
    after, decision = POLICY.decide(state, seen(0.7, version="v2", measured=()))
    assert decision.choices[0].gamma > 0
    assert not after.stopped
