"""The planner: the paper's figures from its rates, break-even, and when it says not to train."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.model.errors import Refused
from tided.policies.planner import PAPER, Device, Share, Speedup, plan

CLUSTER = (replace(PAPER["H100"], count=8), replace(PAPER["MI250"], count=4))


def exactly(speedup: float) -> Speedup:
    return Speedup(speedup, speedup, speedup)


@pytest.mark.parametrize(("speedup", "paper"), [(1.15, 1.08), (1.30, 1.22)])
def test_the_papers_cluster(speedup: float, paper: float) -> None:
    """tide.md: training on 4 MI250 beside 8 H100 gives 1.07-1.08x at s = 1.15 and 1.21-1.22x at 1.30."""
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


def test_nonsense_is_refused() -> None:
    with pytest.raises(Refused, match="at least two"):
        plan([Device("A", 1, 1.0, 1.0)], exactly(1.2))
    with pytest.raises(Refused, match="trains at 100"):
        plan(CLUSTER, exactly(1.2), training_needed=100.0)
    with pytest.raises(Refused, match="positive rates"):
        plan([Device("A", 4, 0.0, 1.0)], exactly(1.2))
    with pytest.raises(Refused, match="low <= middle <= high"):
        Speedup(1.3, 1.2, 1.4)


devices = st.lists(
    st.builds(Device, st.just("A"), st.integers(1, 4), st.floats(0.5, 8.0), st.floats(0.1, 4.0)), min_size=2, max_size=3
)


@given(devices, st.floats(1.0, 2.0), st.floats(0.0, 1.0))
def test_break_even_is_where_it_breaks_even(given_devices: list[Device], speedup: float, needed: float) -> None:
    try:
        found = plan(given_devices, exactly(speedup), needed)
    except Refused:
        return
    assert found.worth_it == (speedup / found.best.break_even > 1.0)
    assert found.best.training_rate >= needed
    assert sum(share.serving for share in found.best.shares) >= 1
    assert plan(given_devices, exactly(speedup + 0.1), needed).best.gain[1] > found.best.gain[1]
