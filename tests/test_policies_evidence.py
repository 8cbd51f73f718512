"""The short memory and the loss account: jumps are seen soon, chance is not taken for one, losses are paid back and forgotten."""

import random
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_policies_threshold import PROFILE, ran
from tided.model.engines import StepCounts
from tided.policies.evidence import CREDIT_S, MEMORY_S, Evidence, LossAccount, lost_s
from tided.policies.speedup import Acceptance, step_s


def drawn(draw: random.Random, requests: list[float], steps: int, gamma: int = 2) -> StepCounts:
    """`steps` steps of requests with these alphas."""
    accepted = [0] * (gamma + 1)
    for alpha in requests:
        for _ in range(steps):
            right = 0
            while right < gamma and draw.random() < alpha:
                right += 1
            accepted[right] += 1
    return StepCounts(len(requests), gamma, steps, 1.0, tuple(accepted))


def followed(alphas: list[float], seed: int, batch: int = 2) -> list[bool]:
    """For each half second of ten steps, with the domain's alpha in it: whether the short memory was believed."""
    draw, evidence, long, believed = random.Random(seed), Evidence(), Acceptance(), list[bool]()
    requests = [0.0] * batch
    for number, alpha in enumerate(alphas, 1):
        if number % 10 == 0:  # requests last five seconds, and differ
            requests = [draw.gauss(0.0, 0.08) for _ in requests]
        counts = drawn(draw, [min(max(alpha + own, 0.0), 1.0) for own in requests], 10)
        new = Acceptance.of([counts])
        evidence, long = evidence.add(number / 2, [counts]), long.faded(new.steps).plus(new)
        believed.append(evidence.best(long) is not long)
    return believed


def test_chance_is_seldom_taken_for_a_jump() -> None:
    believed = [found for seed in range(10) for found in followed([0.6] * 400, seed)]
    assert sum(believed) / len(believed) < 0.02


@pytest.mark.parametrize(("before", "after"), [(0.7, 0.1), (0.1, 0.7)])
def test_a_jump_is_believed_within_a_second_or_two(before: float, after: float) -> None:
    delays: list[int] = []
    for seed in range(20):
        believed = followed([before] * 100 + [after] * 20, seed)[100:]
        delays.append(believed.index(True) + 1)
    assert sorted(delays)[len(delays) // 2] <= 3
    assert max(delays) <= 6


def test_little_evidence_changes_nothing() -> None:
    long = Acceptance.prior((0.6,) * 4, 100.0)
    assert Evidence().best(long) is long
    assert Evidence().add(0.0, ran(1, 0.0)).best(long) is long
    assert Evidence().add(0.0, ran(1, 0.0)).best(Acceptance()).alpha is None


def test_lost_seconds_by_hand() -> None:
    # Ten steps of one request, gamma 2, nothing accepted: each took a step that verifies three tokens and two drafts, for one token.
    [nothing] = ran(10, 0.0, batch=1, gamma=2)
    assert lost_s(PROFILE, [nothing], 8, 4) == pytest.approx(10 * (step_s(PROFILE, 1, 2) - step_s(PROFILE, 1, 0)))
    [everything] = ran(10, 1.0, batch=1, gamma=2)
    assert lost_s(PROFILE, [everything], 8, 4) == pytest.approx(
        10 * (step_s(PROFILE, 1, 2) - 3 * step_s(PROFILE, 1, 0))
    )
    assert lost_s(PROFILE, ran(10), 8, 4) == 0.0
    assert lost_s(PROFILE, ran(10, 0.5, batch=9), 8, 4) == 0.0  # a batch size that no decision was made for


def test_gains_pay_losses_back_and_for_little_in_advance() -> None:
    account = LossAccount().add(0.0, -50.0)
    assert account.balance_s == -CREDIT_S
    account = account.add(0.0, 1.0 + CREDIT_S)
    assert account.balance_s == pytest.approx(1.0)
    assert account.add(1.0, -0.5).balance_s == pytest.approx(exp(-1 / MEMORY_S) - 0.5)
    assert account.add(MEMORY_S, 0.0).balance_s == pytest.approx(exp(-1))


def test_what_a_probe_found_a_while_ago_is_not_recent() -> None:
    long = Acceptance.prior((0.1,) * 4, 400.0)
    stale = Evidence().add(0.0, ran(60, 0.1))
    assert stale.add(0.5, ran(12, 0.7)).best(long) is long
    assert stale.add(60.0, ran(12, 0.7)).best(long).alpha == pytest.approx(0.7, abs=0.1)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-2, 2)), max_size=40))
def test_the_account_stops_with_hysteresis(entries: list[tuple[float, float]]) -> None:
    account, now_s = LossAccount(), 0.0
    for wait_s, seconds in entries:
        now_s += wait_s
        account = account.add(now_s, seconds)
        assert account.balance_s >= -CREDIT_S
        assert account.overdrawn(0.02, already=True) or not account.overdrawn(0.02, already=False)


def test_what_was_scored_offline_is_evidence_like_steps_that_drafted() -> None:
    counts = StepCounts(1, 1, 100, 1.0, (40, 60))
    shadow = Acceptance.of([counts])
    assert Evidence().add(1.0, (), shadow) == Evidence().add(1.0, (counts,))
    long = Acceptance((20.0,), (1000.0,))  # nothing was drafted for long, and what there was is old
    assert Evidence().add(1.0, (), shadow).best(long.plus(shadow)).alpha == 0.6
