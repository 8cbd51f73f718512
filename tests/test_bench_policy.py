"""The bench of policies: claims from short replays, and that each goal is judged by the worst trace."""

from dataclasses import replace

import pytest

from bench import policy
from bench.policy import Row, judged
from tided.replay.compare import POLICIES, Result


def row(driver: str, trace: str, regime: str, regret: float, over_none: float) -> Row:
    return Row(trace, regime, 0, Result(driver, 1.0, over_none, regret, 1.0, 0, 0.0, ()))


def test_each_goal_is_judged_by_the_worst_trace() -> None:
    drivers = (*policy.BASELINES, *POLICIES)
    good = [
        row(driver, name, regime, 0.01, 1.2)
        for driver in drivers
        for name, regime in (("a", "moving"), ("b", "moving"), ("still", "stationary"), ("foe", "adversarial"))
    ]
    assert all(claim.met is not False for claim in judged(good))
    bad = [
        replace(item, result=replace(item.result, regret=0.06, over_none=0.96)) if item.trace == "b" else item
        for item in good
    ]
    failed = {claim.id: claim.what for claim in judged(bad) if claim.met is False}
    assert set(failed) == {f"{name}-{what}" for name in POLICIES for what in ("moving", "over-none-other")}
    assert all("(b)" in what for what in failed.values())
    adversarial = [
        replace(item, result=replace(item.result, regret=0.5)) if item.trace == "foe" else item for item in good
    ]
    assert all(claim.met is not False for claim in judged(adversarial))


def test_short_replays_run_over_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "KINDS", ("slow-recurring", "slow-stationary", "slow-adversarial"))
    rows = policy.replayed(1, 30.0)
    assert {found.trace for found in rows} >= set(policy.KINDS)
    assert {claim.id for claim in judged(rows)} >= {"threshold-moving", "ema-steps-worst", "trace-slow-recurring"}


def test_the_cost_is_counted_from_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "ENGINES", 20)
    p99, cpu = policy.cost("threshold")
    assert isinstance(p99.value, float)
    assert isinstance(cpu.value, float)
    assert p99.value >= cpu.value / 1000
