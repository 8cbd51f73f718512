"""The gate: sure gains pass, noise and losses fail, too little waits."""

import numpy as np
import pytest

from tided.config import GateConfig
from tided.model.drafts import Evaluation
from tided.services.gate import Verdict, judge

CONFIG = GateConfig()


def evaluation(lengths: list[float], tokens: int = 100, version: str = "a", gamma: int = 4) -> Evaluation:
    groups = tuple(f"{i:032x}" for i in range(len(lengths)))
    return Evaluation(version, gamma, groups, tuple(lengths), (tokens,) * len(lengths), (0.5,))


def scattered(mean: float, n: int, seed: int, spread: float = 0.4) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).normal(mean, spread, n)]


def test_a_sure_gain_passes_with_its_figures() -> None:
    old = scattered(1.8, 60, 0)
    decision = judge(evaluation(old), evaluation([x + 0.2 for x in old]), CONFIG)
    assert decision.verdict is Verdict.PASS
    assert decision.gain == pytest.approx(0.2)
    assert decision.lower == pytest.approx(0.2)  # paired: the requests' own scatter cancels
    assert (decision.requests, decision.tokens) == (60, 6000)
    assert "1." in decision.reason


def test_a_loss_and_no_difference_fail() -> None:
    old = scattered(1.8, 60, 0)
    assert judge(evaluation(old), evaluation([x - 0.1 for x in old]), CONFIG).verdict is Verdict.FAIL
    assert judge(evaluation(old), evaluation(old), CONFIG).verdict is Verdict.FAIL


def test_pure_noise_passes_about_as_often_as_the_confidence_allows() -> None:
    passes = sum(
        judge(evaluation(scattered(1.8, 50, s)), evaluation(scattered(1.8, 50, 10_000 + s)), CONFIG).verdict
        is Verdict.PASS
        for s in range(200)
    )
    assert passes <= 20  # 5% of 200 is 10; 20 is beyond three standard deviations


@pytest.mark.parametrize(("requests", "tokens"), [(29, 1000), (40, 40)])
def test_too_few_requests_or_tokens_wait(requests: int, tokens: int) -> None:
    old = [1.5] * requests
    decision = judge(evaluation(old, tokens), evaluation([3.0] * requests, tokens), CONFIG)
    assert decision.verdict is Verdict.WAIT
    assert "needed" in decision.reason


def test_only_requests_that_both_scored_count() -> None:
    old = evaluation([1.5] * 40)
    new = evaluation([2.5] * 100)
    assert judge(old, new, CONFIG).requests == 40


def test_evaluations_at_different_gamma_do_not_compare() -> None:
    assert judge(evaluation([1.5] * 40), evaluation([2.5] * 40, gamma=2), CONFIG).verdict is Verdict.WAIT


def test_a_prompt_that_came_several_times_is_matched_one_to_one() -> None:
    twice = Evaluation("a", 4, ("00",) * 40, (1.5,) * 40, (100,) * 40, ())
    better = Evaluation("b", 4, ("00",) * 50, (2.0,) * 50, (100,) * 50, ())
    decision = judge(twice, better, CONFIG)
    assert (decision.verdict, decision.requests) == (Verdict.PASS, 40)


def test_it_is_deterministic() -> None:
    old, new = evaluation(scattered(1.8, 60, 1)), evaluation(scattered(1.85, 60, 2))
    assert judge(old, new, CONFIG) == judge(old, new, CONFIG)
