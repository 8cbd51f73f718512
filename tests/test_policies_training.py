"""Algorithm 1's averages: what counts as a sample, what is drift and what is noise."""

import random
from functools import reduce
from statistics import fmean, median, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.model.engines import RequestStats
from tided.policies.speedup import expected_length
from tided.policies.training import AcceptanceTrend, Ema, request_alpha


def request(alpha: float, gamma: int = 4, steps: int = 40, version: str = "v") -> RequestStats:
    accepted = round(steps * (expected_length(alpha, gamma) - 1))
    return RequestStats(20, 60, steps, steps * gamma, accepted, version)


def fed(trend: AcceptanceTrend, requests: list[RequestStats]) -> AcceptanceTrend:
    return reduce(AcceptanceTrend.add, requests, trend)


START = AcceptanceTrend.start(16, 128, 0.05).restart("v")


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_a_requests_alpha_does_not_depend_on_gamma(gamma: int) -> None:
    assert request_alpha(request(0.6, gamma, steps=1000)) == pytest.approx(0.6, abs=0.01)


def test_a_request_that_never_drafted_says_nothing() -> None:
    assert request_alpha(RequestStats(5, 9, 0, 0, 0, "v")) is None
    assert START.add(RequestStats(5, 9, 0, 0, 0, "v")) == START
    assert START.add(request(0.5, version="other")) == START


def test_the_average_is_right_from_the_first_sample() -> None:
    assert Ema(64).value is None
    assert Ema(64).add(0.7).value == pytest.approx(0.7)
    assert Ema(64).add(0.7).add(0.5).value == pytest.approx(0.6, abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.floats(0.1, 1))
def test_an_average_lies_within_its_samples(values: list[float], weight: float) -> None:
    average = reduce(lambda ema, value: ema.add(value, weight), values, Ema(8)).value
    assert average is not None
    assert min(values) - 1e-9 <= average <= max(values) + 1e-9


def test_a_fall_is_drift_and_is_seen_soon() -> None:
    steady = fed(START, [request(0.6)] * 100)
    assert not steady.drifting
    trend, count = steady, 0
    while not trend.drifting:
        trend, count = trend.add(request(0.1)), count + 1
    assert count <= 4


def test_a_rise_is_no_drift() -> None:
    steady = fed(START, [request(0.3)] * 100)
    risen = fed(steady, [request(0.8)] * 30)
    assert (steady.rising, risen.rising, risen.drifting) == (False, True, False)
    assert not fed(START, [request(0.8)] * 3).rising


def test_noise_is_no_drift() -> None:
    draw = random.Random(0)
    trend = START
    for _ in range(2000):
        trend = trend.add(request(min(1.0, max(0.0, draw.gauss(0.6, 0.05)))))
        assert not trend.drifting


def drawn(draw: random.Random, alpha: float, gamma: int = 4, steps: int = 25) -> RequestStats:
    """A request as traffic has them: its own alpha, Beta-distributed around `alpha` (deviation 0.15 at 0.5), and 25 steps drawn from it."""
    own = draw.betavariate(10 * alpha, 10 * (1 - alpha))
    accepted = 0
    for _ in range(steps):
        accepted += next((k for k in range(gamma) if draw.random() >= own), gamma)
    return RequestStats(20, 60, steps, steps * gamma, accepted, "v")


def falls(seed: int, window: int, requests: int = 1500) -> int:
    """How often steady traffic is said to drift."""
    draw, trend, low, found = random.Random(seed), AcceptanceTrend.start(window, 512, 0.05).restart("v"), False, 0
    for _ in range(requests):
        trend = trend.add(drawn(draw, 0.5))
        found += trend.drifting and not low
        low = trend.drifting
    return found


def delay(seed: int, window: int, to: float) -> int:
    """Requests from a fall of the true alpha, from 0.5, until it is seen."""
    draw, trend = random.Random(seed), AcceptanceTrend.start(window, 512, 0.05).restart("v")
    trend = fed(trend, [drawn(draw, 0.5) for _ in range(300)])
    for count in range(1, 1000):
        trend = trend.add(drawn(draw, to))
        if trend.drifting:
            return count
    return 1000


@pytest.mark.parametrize("window", [24, 64])
def test_requests_that_differ_are_no_drift_and_a_fall_is_seen_soon(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of docs/concepts.md: without the guard a short window sees drift all the time."""
    seeds = range(5)
    assert sum(falls(seed, window) for seed in seeds) == 0
    assert median(delay(seed, window, 0.25) for seed in seeds) <= 20
    assert median(delay(seed, window, 0.1) for seed in seeds) <= 12
    assert median(delay(seed, window, 0.4) for seed in seeds) <= 300
    monkeypatch.setattr("tided.policies.training.SURE", 0.0)
    assert sum(falls(seed, window) for seed in seeds) > (50 if window == 24 else 1)


@given(st.floats(0.2, 0.9), st.floats(0.25, 1.0), st.integers(8, 64), st.integers(4, 16))
def test_a_clean_fall_is_seen_within_a_window(alpha: float, share: float, window: int, ratio: int) -> None:
    """Windows of at least 8, 4 times apart: a fall by a quarter or more of requests that are all alike is never taken for noise."""
    trend = fed(
        AcceptanceTrend.start(window, ratio * window, 0.05).restart("v"), [request(alpha, steps=400)] * 2 * window
    )
    assert not trend.drifting
    seen = False
    for _ in range(window):
        trend = trend.add(request(alpha * (1 - share), steps=400))
        seen = seen or trend.drifting
    assert seen or alpha * share < 0.15


def test_the_standard_error_is_that_of_the_difference() -> None:
    """Many runs of independent requests: the averages differ as much as each run says they may."""
    differences, errors = list[float](), list[float]()
    for seed in range(150):
        draw = random.Random(seed)
        trend = fed(START, [drawn(draw, 0.5) for _ in range(60)])
        assert trend.short.value is not None
        assert trend.long.value is not None
        assert trend.standard_error is not None
        differences.append(trend.short.value - trend.long.value)
        errors.append(trend.standard_error)
    assert fmean(errors) == pytest.approx(pstdev(differences), rel=0.15)


def test_a_few_requests_after_a_swap_are_not_enough() -> None:
    assert not fed(START, [request(0.9), request(0.1), request(0.1)]).drifting


def test_another_version_starts_anew() -> None:
    drifting = fed(START, [request(0.6)] * 100 + [request(0.1)] * 10)
    assert drifting.drifting
    fresh = drifting.restart("w")
    assert fresh.short.value is None
    assert not fresh.drifting


def test_a_request_that_a_probe_grazed_counts_less() -> None:
    steady = fed(START, [request(0.6)] * 100)
    grazed, whole = steady.add(request(0.0, steps=1)), steady.add(request(0.0))
    assert grazed.short.value is not None
    assert whole.short.value is not None
    assert steady.short.value is not None
    assert steady.short.value > grazed.short.value > whole.short.value
