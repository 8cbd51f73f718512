"""A trace out of reports: what was generated, reported and recorded replays as what was generated."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from bench import record as tool
from tests.conftest import Valkey
from tests.fake_plane import INFO
from tided.config import SpeculationConfig
from tided.model.engines import EngineInfo, Observation, StepCounts, TapTotals
from tided.model.errors import NotFound, Refused
from tided.policies.base import SpeculationDecision, SpeculationObservation
from tided.replay.compare import compare
from tided.replay.drivers import REPORT_S, Tided
from tided.replay.generate import generate
from tided.replay.record import recorded
from tided.replay.simulate import run
from tided.replay.trace import SUFFIX, Trace, load, save
from tided.store.client import connect
from tided.wire import keys
from tided.wire.control import encode


def info_of(trace: Trace) -> EngineInfo:
    header = trace.header
    return replace(INFO, profile=header.profile, gamma_max=header.gamma_max, max_batch=header.max_batch)


def report(at_s: float, steps: Iterable[StepCounts]) -> Observation:
    return Observation("local", "local-1", 1, round(1000 * at_s), INFO.version, 1, 0, tuple(steps), (), TapTotals())


class Held:
    """Always gamma_max, as an operator would set it to record; keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[Observation] = []

    def start(self) -> None:
        return None

    def decide(self, state: None, seen: SpeculationObservation) -> tuple[None, SpeculationDecision]:
        self.reports.append(report(seen.now_s, seen.measured))
        return None, SpeculationDecision((seen.gamma_max,) * seen.max_batch, (), None, False, "")


@pytest.mark.parametrize("kind", ["slow-recurring", "bursty"])
def test_recorded_traffic_replays_as_the_traffic_that_was_recorded(kind: str) -> None:
    trace, held = generate(kind, 2, 240.0), Held()
    run(trace, Tided("held", (trace.header.gamma_max,) * trace.header.max_batch, policy=held, trace=trace))
    again = recorded("again", "", info_of(trace), held.reports)
    assert again.header.duration_s == pytest.approx(trace.header.duration_s, abs=3 * REPORT_S)
    names = ["always-on", "fixed", "static", "threshold"]
    theirs, ours = (compare(each, names, SpeculationConfig()) for each in (trace, again))
    for name in names:
        assert ours.of(name).tokens_per_s == pytest.approx(theirs.of(name).tokens_per_s, rel=0.03), name
        assert ours.of(name).over_none == pytest.approx(theirs.of(name).over_none, rel=0.03), name


def test_only_steps_at_gamma_max_count_and_idle_time_stays() -> None:
    trace = generate("slow-bursty", 0, 10.0)
    full = StepCounts(2, 4, 3, 0.3, (2, 1, 1, 1, 0))  # one request ended: five of six were counted
    less = StepCounts(2, 1, 5, 0.5, (5, 5))
    made = recorded("x", "", info_of(trace), [report(1.0, [full, less]), report(1.5, []), report(9.0, [full])])
    assert made.batch.tolist() == [2] * 6
    assert made.at_s[3] - made.at_s[2] == pytest.approx(8.0 - 0.2, abs=1e-6)
    assert len(made.prefix) == 12
    assert set(made.prefix.tolist()) <= {0, 1, 2, 3}
    with pytest.raises(Refused, match="policy set gamma=4"):
        recorded("x", "", info_of(trace), [report(1.0, [less])])
    with pytest.raises(Refused, match="no latency profile"):
        recorded("x", "", replace(INFO, profile=None), [report(1.0, [full])])


async def test_the_tool_reads_reports_from_redis(valkey: Valkey, tmp_path: Path) -> None:
    redis = connect(valkey.url)
    counts = StepCounts(1, 4, 3, 0.3, (1, 1, 1, 0, 0))
    await redis.set(keys.info("local"), encode(info_of(generate("slow-bursty", 0, 10.0))), ex=60)

    async def reporting() -> None:
        while True:
            await redis.xadd(keys.observations("local"), {"m": encode(report(1.0, [counts]))})
            await redis.expire(keys.observations("local"), 60)
            await anyio.sleep(0.05)

    async with anyio.create_task_group() as group:
        group.start_soon(reporting)
        save(await tool.record(valkey.url, "local", anyio.sleep(1.5), "x", ""), tmp_path / f"x{SUFFIX}")
        with pytest.raises(NotFound):
            await tool.record(valkey.url, "other", anyio.sleep(0.1), "x", "")
        group.cancel_scope.cancel()
    await redis.aclose()
    assert set(load(tmp_path / f"x{SUFFIX}").batch.tolist()) == {1}
