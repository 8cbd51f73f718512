"""Is a version worse? What two windows and the other engines say together, by hand and on simulated requests."""

import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.machine.watch import (
    MIN_PEER_REQUESTS,
    Judgement,
    Verdict,
    judge,
    length_error,
    traffic_moved,
)
from tided.model.deployments import ServedSums, WatchPeer

MARGIN = 0.1


def alike(requests: int, length: float, steps: int = 25) -> ServedSums:
    """Requests that do not differ."""
    total = ServedSums()
    for _ in range(requests):
        total = total.plus(ServedSums.of(steps, steps * (length - 1.0)))
    return total


def drawn(draw: random.Random, requests: int, length: float, spread: float = 0.35) -> ServedSums:
    """Requests of which each has an acceptance length of its own."""
    total = ServedSums()
    for _ in range(requests):
        steps = draw.randrange(10, 40)
        total = total.plus(ServedSums.of(steps, steps * max(0.0, draw.gauss(length - 1.0, spread))))
    return total


def peer(before: float, now: ServedSums, error: float = 0.0, name: str = "b") -> WatchPeer:
    return WatchPeer(name, "v", before, error, now)


def looked(watched: ServedSums, before: float = 2.0, error: float = 0.0, *peers: WatchPeer) -> Judgement:
    return judge(watched, before, error, peers, MARGIN)


def test_the_error_is_that_of_a_ratio_over_requests() -> None:
    assert length_error(ServedSums.of(25, 30)) == inf
    assert length_error(alike(10, 2.2)) == 0.0
    sums = ServedSums.of(10, 5).plus(ServedSums.of(10, 15))
    assert sums.length == 2.0
    assert length_error(sums) == pytest.approx(
        0.5
    )  # 0.5 and 1.5 a step: a standard deviation of 0.71, over the root of 2
    draw = random.Random(1)
    found = [drawn(draw, 40, 2.0) for _ in range(400)]
    mean = sum(sums.length for sums in found) / len(found)
    true = (sum((sums.length - mean) ** 2 for sums in found) / len(found)) ** 0.5
    assert sum(length_error(sums) for sums in found) / len(found) == pytest.approx(true, rel=0.1)


def test_requests_that_fade_count_for_less() -> None:
    faded = ServedSums()
    for number in range(200):
        faded = faded.plus(ServedSums.of(20, 10 if number % 2 else 30), 0.9)
    assert faded.requests == pytest.approx(10.0, abs=0.1)
    assert 0.05 < length_error(faded) < 0.25


@pytest.mark.parametrize(
    ("length", "verdict"), [(2.2, Verdict.FINE), (1.81, Verdict.FINE), (1.79, Verdict.WORSE), (1.2, Verdict.WORSE)]
)
def test_without_spread_the_margin_decides(length: float, verdict: Verdict) -> None:
    found = looked(alike(20, length))
    assert found.verdict is verdict
    assert found.below is (verdict is Verdict.WORSE)


def test_what_cannot_be_told_is_not_told() -> None:
    assert looked(ServedSums()).verdict is Verdict.UNSURE
    assert looked(ServedSums.of(25, 5)).verdict is Verdict.UNSURE
    assert looked(ServedSums.of(25, 5)).below
    assert not looked(ServedSums()).below
    assert looked(alike(20, 1.7), 2.0, 0.4).verdict is Verdict.UNSURE  # the incumbent's own figure is too vague
    assert looked(alike(20, 1.0), 0.0).verdict is Verdict.FINE  # nothing to be worse than


def test_no_blame_when_the_incumbent_fell_too() -> None:
    fell = peer(2.0, alike(20, 1.5))
    assert looked(alike(20, 1.5)).verdict is Verdict.WORSE
    found = looked(alike(20, 1.5), 2.0, 0.0, fell)
    assert found.verdict is Verdict.FINE
    assert (found.moved, found.expected, found.floor) == pytest.approx((0.75, 1.5, 1.35))
    assert looked(alike(20, 1.3), 2.0, 0.0, fell).verdict is Verdict.WORSE  # more than it fell elsewhere
    # A rise elsewhere proves nothing; neither do a few requests.
    assert looked(alike(20, 1.9), 2.0, 0.0, peer(2.0, alike(20, 3.0))).verdict is Verdict.FINE
    few = peer(2.0, alike(MIN_PEER_REQUESTS - 1, 1.5))
    assert looked(alike(20, 1.5), 2.0, 0.0, few).verdict is Verdict.WORSE
    # The level of another engine's version says nothing, only its change.
    assert looked(alike(20, 2.0), 2.0, 0.0, peer(4.0, alike(20, 4.0))).expected == 2.0


def test_a_fall_elsewhere_that_is_vague_makes_the_verdict_vague() -> None:
    vague = peer(2.0, alike(20, 1.5), error=0.8)
    assert looked(alike(20, 1.2), 2.0, 0.0, vague).verdict is Verdict.UNSURE


def test_a_change_of_the_engines_shares_is_none_of_acceptance() -> None:
    busy = (peer(3.0, alike(5, 3.0), name="b"), peer(1.5, alike(200, 1.5), name="c"))
    assert traffic_moved(busy) == pytest.approx((1.0, 0.0))


def verdicts(factor: float, moved: float, requests: int, runs: int = 300) -> dict[Verdict, float]:
    """Shares of the verdicts on a draft that accepts `factor` of the incumbent's length; of all, `moved` of before is accepted."""
    draw, found = random.Random(7), dict.fromkeys(Verdict, 0.0)
    for _ in range(runs):
        before, others = drawn(draw, 40, 2.0), drawn(draw, 40, 2.0)
        others_now = peer(others.length, drawn(draw, requests, 2.0 * moved), length_error(others))
        watched = drawn(draw, requests, 2.0 * moved * factor)
        seen = looked(watched, before.length, length_error(before), others_now)
        found[seen.verdict] += 1 / runs
    return found


@pytest.mark.parametrize("moved", [1.0, 0.75])
def test_on_simulated_traffic_the_bad_are_found_and_the_good_are_not_blamed(moved: float) -> None:
    assert verdicts(0.7, moved, 60)[Verdict.WORSE] > 0.6
    assert verdicts(0.7, moved, 60)[Verdict.FINE] < 0.01
    assert verdicts(1.0, moved, 60)[Verdict.WORSE] < 0.01
    assert verdicts(1.2, moved, 60)[Verdict.FINE] > 0.9
    assert verdicts(1.2, moved, 20)[Verdict.WORSE] == 0.0


SUMS = st.builds(alike, st.integers(0, 40), st.floats(1.0, 5.0, allow_nan=False), st.integers(1, 40))


@given(
    SUMS,
    st.floats(0, 5),
    st.floats(0, 2),
    st.lists(st.builds(peer, st.floats(1, 5), SUMS, st.floats(0, 1)), max_size=4),
)
def test_it_is_total_and_other_engines_never_make_it_worse(
    watched: ServedSums, before: float, error: float, peers: list[WatchPeer]
) -> None:
    alone, together = judge(watched, before, error, (), MARGIN), judge(watched, before, error, peers, MARGIN)
    assert together.expected <= max(alone.expected, 1.0)
    assert not (together.below and not alone.below and before >= 1.0)
    again = judge(watched, before, error, list(reversed(peers)), MARGIN)
    assert again.expected == pytest.approx(together.expected)
