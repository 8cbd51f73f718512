"""The planner: the paper's figures from its rates, break-even, and when it says not to train."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.model.errors import Refused
from tided.policies.planner import PAPER, Device, Share, Speedup, WarmUp, plan

CLUSTER = (replace(PAPER["H100"], count=8), replace(PAPER["MI250"], count=4))


def exactly(speedup: float) -> Speedup:
    return Speedup(speedup, speedup, speedup)


@pytest.mark.parametrize(("speedup", "paper"), [(1.15, 1.08), (1.30, 1.22)])
def test_the_papers_cluster(speedup: float, paper: float) -> None:
    """The paper: training on 4 MI250 beside 8 H100 gives 1.07-1.08x at s = 1.15 and 1.21-1.22x at 1.30."""
    found = plan(CLUSTER, exactly(speedup), training_needed=4.0)
    assert found.best.shares == (Share("H100", 8, 0), Share("MI250", 0, 4))
    assert found.best.gain[1] == pytest.approx(8 * 6.76 * speedup / (8 * 6.76 + 4), abs=1e-9)
    assert found.best.gain[1] == pytest.approx(paper, abs=0.011)
    assert found.best.break_even == pytest.approx(58.08 / 54.08)
    assert found.worth_it
    assert found.reason.startswith("train: ")


def test_it_says_do_not_train_when_that_is_right() -> None:
    assert plan(CLUSTER, exactly(1.05), training_needed=4.0).reason.startswith("do not train: ")
    unsure = plan(CLUSTER, Speedup(1.0, 1.15, 1.3), training_needed=4.0)
    assert not unsure.worth_it
    assert unsure.reason.startswith("do not train yet: 1.07x is expected, but 0.93x to 1.21x is possible")
    two = plan([replace(PAPER["H100"], count=2)], exactly(1.3))
    assert two.best.break_even == 2.0
    assert not two.worth_it


def test_no_more_devices_train_than_the_traffic_needs() -> None:
    assert plan(CLUSTER, exactly(1.2)).best.shares == (Share("H100", 8, 0), Share("MI250", 3, 1))


def test_until_the_first_draft_the_trainers_only_cost() -> None:
    # One of three serves less: 2/3 of the rate is left, so 1.5 is the break-even speedup, and 600 s of collecting and training come first.
    three = [Device("A", 3, 10.0, 50.0)]
    warm_up = WarmUp(collect_s=100.0, work=25_000.0)
    found = plan(three, exactly(1.8), warm_up=warm_up, horizon_s=2400.0)
    assert found.best.warm_up_s == pytest.approx(600.0)
    assert found.best.gain[1] == pytest.approx((600 * 1.0 + 1800 * 1.8) / 2400 * 2 / 3)
    assert found.best.break_even == pytest.approx(1.0 + 0.5 / 0.75)
    assert found.best.pays_after_s == pytest.approx(600 * 0.8 / 0.3)
    # Over exactly that time nothing is lost and nothing won.
    assert plan(three, exactly(1.8), warm_up=warm_up, horizon_s=1600.0).best.gain[1] == pytest.approx(1.0)
    hour, day, week = (outlook.gain for outlook in found.outlook)
    assert hour == pytest.approx((600 + 3000 * 1.8) / 3600 * 2 / 3)
    assert hour < day < week < 1.2
    assert plan(three, exactly(1.8)).best.gain[1] == pytest.approx(1.2)


def test_a_horizon_that_ends_before_the_first_draft_pays_nothing_at_any_speedup() -> None:
    two = [Device("core", 1, 20.0, 600.0), Device("quarter", 1, 5.0, 150.0)]
    found = plan(two, exactly(3.0), warm_up=WarmUp(collect_s=120.0), horizon_s=60.0)
    assert (found.best.break_even, found.best.gain[1], found.worth_it) == (None, pytest.approx(0.8), False)
    assert found.reason.startswith(
        "do not train: the devices that train cost 20% of the serving rate: no adapted draft would serve"
    )
    assert found.reason.endswith("it would pay after 137 s")
    assert plan(two, exactly(1.2), warm_up=WarmUp(60.0)).best.pays_after_s is None


def test_a_slower_trainer_is_taken_only_where_the_horizon_is_long_enough() -> None:
    devices = [Device("fast", 2, 1.2, 10.0), Device("slow", 1, 1.0, 0.1)]
    warm_up = WarmUp(work=100.0)
    short = plan(devices, exactly(2.0), warm_up=warm_up, horizon_s=1000.0)
    long = plan(devices, exactly(2.0), warm_up=warm_up, horizon_s=100_000.0)
    assert [share.training for share in short.best.shares] == [1, 0]
    assert [share.training for share in long.best.shares] == [0, 1]


def test_nonsense_is_refused() -> None:
    with pytest.raises(Refused, match="at least two"):
        plan([Device("A", 1, 1.0, 1.0)], exactly(1.2))
    with pytest.raises(Refused, match="trains at 100"):
        plan(CLUSTER, exactly(1.2), training_needed=100.0)
    with pytest.raises(Refused, match="positive rates"):
        plan([Device("A", 4, 0.0, 1.0)], exactly(1.2))
    with pytest.raises(Refused, match="low <= middle <= high"):
        Speedup(1.3, 1.2, 1.4)
    with pytest.raises(Refused, match="warm-up: "):
        WarmUp(-1.0)
    with pytest.raises(Refused, match="horizon must be above 0"):
        plan(CLUSTER, exactly(1.2), horizon_s=0.0)


devices = st.lists(
    st.builds(Device, st.just("A"), st.integers(1, 4), st.floats(0.5, 8.0), st.floats(0.1, 4.0)), min_size=2, max_size=3
)


@given(devices, st.floats(1.0, 2.0), st.floats(0.0, 1.0))
def test_break_even_is_where_it_breaks_even(given_devices: list[Device], speedup: float, needed: float) -> None:
    try:
        found = plan(given_devices, exactly(speedup), needed)
    except Refused:
        return
    assert found.best.break_even is not None
    assert found.worth_it == (speedup / found.best.break_even > 1.0)
    assert found.best.training_rate >= needed
    assert sum(share.serving for share in found.best.shares) >= 1
    assert plan(given_devices, exactly(speedup + 0.1), needed).best.gain[1] > found.best.gain[1]
