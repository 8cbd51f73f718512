"""Equations 2 to 5 and their estimators: values worked out by hand, and properties."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.model.engines import LatencyProfile, StepCounts
from tided.policies import speedup as eq
from tided.policies.speedup import Acceptance

alphas = st.floats(0.0, 1.0)
gammas = st.integers(0, 8)
PROFILE = LatencyProfile((1, 2, 4, 8, 16, 40), (0.05, 0.052, 0.056, 0.08, 0.13, 0.28), (1, 8), (0.004, 0.012))


def test_eq_2_by_hand() -> None:
    assert eq.expected_length(0.6, 3) == pytest.approx(1 + 0.6 + 0.36 + 0.216)
    assert eq.expected_length(1.0, 3) == 4.0
    assert eq.expected_length(0.0, 3) == 1.0
    assert eq.expected_length(0.7, 0) == pytest.approx(1.0)


def test_the_papers_trap_alpha_is_not_accepted_over_drafted() -> None:
    # The paper: gamma 3, alpha 0.6: E[l] = 2.18, accepted / drafted = 0.39.
    draw = random.Random(0)
    histogram = [0, 0, 0, 0]
    for _ in range(200_000):
        accepted = 0
        while accepted < 3 and draw.random() < 0.6:
            accepted += 1
        histogram[accepted] += 1
    drafted = 3 * sum(histogram)
    hits = sum(k * n for k, n in enumerate(histogram))
    assert hits / drafted == pytest.approx(0.39, abs=0.01)
    assert eq.alpha_from_counts(histogram) == pytest.approx(0.6, abs=0.005)


@given(st.floats(0.0, 0.999), st.integers(1, 8))
def test_inversion_of_eq_2(alpha: float, gamma: int) -> None:
    assert eq.alpha_from_length(eq.expected_length(alpha, gamma), gamma) == pytest.approx(alpha, abs=1e-6)


@given(st.floats(0.0, 20.0), st.floats(0.0, 8.0))
def test_inversion_is_a_probability_for_any_measurement(length: float, gamma: float) -> None:
    assert 0.0 <= eq.alpha_from_length(length, gamma) <= 1.0


@given(alphas, alphas, gammas)
def test_length_grows_with_alpha_and_stays_in_bounds(a: float, b: float, gamma: int) -> None:
    low, high = sorted((eq.expected_length(a, gamma), eq.expected_length(b, gamma)))
    assert (eq.expected_length(min(a, b), gamma), eq.expected_length(max(a, b), gamma)) == pytest.approx((low, high))
    assert 1.0 <= low <= high <= gamma + 1.0 + 1e-9


def test_eq_5_by_hand() -> None:
    # batch 2, gamma 3: T(2) = 0.052, T(8) = 0.08, D(2) = 0.004 + (0.008 / 7), E[l] = 2.176
    expected = 2.176 / ((3 * (0.004 + 0.008 / 7) + 0.08) / 0.052)
    assert eq.speedup(PROFILE, 2, 3, 0.6) == pytest.approx(expected)
    assert eq.speedup(PROFILE, 5, 0, 0.9) == 1.0


def test_interpolation_goes_on_beyond_the_ends() -> None:
    assert eq.target_s(PROFILE, 3) == pytest.approx(0.054)
    assert eq.target_s(PROFILE, 80) == pytest.approx(0.28 + 40 * (0.15 / 24))
    assert eq.draft_s(PROFILE, 0) > 0
    assert eq.interpolate((4,), (0.1,), 99) == 0.1


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=8), alphas, st.integers(1, 8), st.integers(1, 4))
def test_a_smoothed_profile_has_no_spikes_and_predicts_no_more_than_the_length(
    times: list[float], alpha: float, batch: int, gamma: int
) -> None:
    noisy = LatencyProfile(tuple(2**i for i in range(len(times))), tuple(times), (1, 8), (0.002, 0.001))
    profile = eq.smoothed(noisy)
    for before, time in zip(noisy.target_s, profile.target_s, strict=True):
        assert time <= before
    for i, time in enumerate(profile.target_s):
        assert time <= eq.DIP * min(profile.target_s[i:]) * (1 + 1e-9)
    assert eq.speedup(profile, batch, gamma, alpha) <= eq.expected_length(alpha, gamma) + 1e-9


def test_a_kernel_that_is_slower_for_less_is_no_spike() -> None:
    measured = replace(PROFILE, target_s=(0.0257, 0.0287, 0.0237, 0.0314, 0.09))
    assert eq.smoothed(measured).target_s[:4] == measured.target_s[:4]
    spiked = replace(measured, target_s=(0.0257, 0.0587, 0.0237, 0.0314, 0.09))
    assert eq.smoothed(spiked).target_s[1] == pytest.approx(eq.DIP * 0.0237)


def test_acceptance_counts_by_position() -> None:
    # gamma 2: 10 steps rejected at once, 5 after one, 5 accepted whole; gamma 1: 4 rejected, 6 accepted; gamma 0 drafts nothing.
    seen = Acceptance.of(
        [
            StepCounts(1, 2, 20, 1.0, (10, 5, 5)),
            StepCounts(1, 1, 10, 1.0, (4, 6)),
            StepCounts(4, 0, 9, 1.0, (36,)),
        ]
    )
    assert seen.trials == (30.0, 10.0)
    assert seen.hits == (16.0, 5.0)
    assert seen.alpha == pytest.approx(21 / 40)
    assert seen.steps == 30


def test_measured_positions_refine_eq_2_and_untried_ones_fall_back() -> None:
    falling = Acceptance((9000.0, 5000.0), (10_000.0, 9000.0))
    assert falling.length(2) == pytest.approx(1 + 0.9 + 0.9 * 0.556, abs=0.01)
    assert falling.conditional(5) <= falling.conditional(1)
    barely = Acceptance((9000.0, 0.0), (10_000.0, 1.0))
    assert barely.conditional(1) == pytest.approx(0.9, abs=0.1)  # one failure says little
    assert Acceptance().length(4) == 1.0


@given(alphas, gammas)
def test_equal_positions_are_eq_2(alpha: float, gamma: int) -> None:
    equal = Acceptance.prior((alpha,) * 8, 100.0)
    assert equal.length(gamma) == pytest.approx(eq.expected_length(alpha, gamma), rel=1e-6)
