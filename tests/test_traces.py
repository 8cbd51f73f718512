"""The traces that are shipped: bounded, as README.md lists them, and of use to every policy."""

from pathlib import Path

import pytest

from bench.engines.traces import MAX_BATCH, RECORDED
from bench.policy import TRACES
from tided.config import SpeculationConfig
from tided.replay.compare import POLICIES, compare
from tided.replay.trace import SUFFIX, Trace, load

MOST_BYTES = 300_000


SHIPPED = sorted(path.name.removesuffix(SUFFIX) for path in TRACES.glob(f"*{SUFFIX}"))


@pytest.fixture(scope="module", params=SHIPPED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trace(name: str) -> Trace:
    return load(TRACES / f"{name}{SUFFIX}")


def test_what_is_shipped_is_what_is_recorded_and_listed() -> None:
    assert SHIPPED
    assert set(SHIPPED) <= set(RECORDED)
    listed = Path("traces/README.md").read_text(encoding="utf-8")
    assert [name for name in RECORDED if (f"`{name}{SUFFIX}`" in listed) != (name in SHIPPED)] == []


def test_a_trace_is_small_and_says_what_it_is(name: str, trace: Trace) -> None:
    assert (TRACES / f"{name}{SUFFIX}").stat().st_size <= MOST_BYTES
    header, planned = trace.header, RECORDED[name]
    assert (header.name, header.about, header.regime) == (name, planned.about, planned.regime)
    assert (header.gamma_max, header.max_batch) == (4, MAX_BATCH)
    asked_s = sum(stage.seconds for stage in planned.stages)
    assert 0.9 * asked_s <= header.duration_s <= 1.6 * asked_s  # a stage ends with the last of its requests
    assert max(stage.concurrency for stage in planned.stages) <= int(trace.batch.max()) <= MAX_BATCH
    assert set(trace.prefix.tolist()) == set(range(header.gamma_max + 1))


def test_no_policy_is_slower_than_no_speculation_on_it(trace: Trace) -> None:
    found = compare(trace, [*POLICIES, "always-off", "clairvoyant"], SpeculationConfig())
    for driver in POLICIES:
        assert found.of(driver).over_none >= 0.98, driver
        assert found.of(driver).regret <= (0.03 if trace.header.regime == "stationary" else 0.05), driver
    assert found.of("clairvoyant").over_none >= max(found.of(driver).over_none for driver in POLICIES) - 0.01
