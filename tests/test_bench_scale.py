"""What the scale bench makes of raw figures: dispatch, memory that grows or does not, and jobs that come at random."""

import random
from dataclasses import asdict
from typing import Any

import pytest

from bench.crowd import Dispatched, Ending
from bench.dataplane import Turn
from bench.dataplane import claims_of as dataplane_claims
from bench.report import Claim
from bench.scale import SIZES, Size, arrivals, claims_of, growth_claims, growth_mb, slope_mb_h, waited_ms
from tided.model.jobs import JobKind

SIZE = Size(20, 10, 1000, 10, 100.0, 10.0)


def part(waits: list[int], rss: list[float], busy: int = 5) -> dict[str, Any]:
    dispatched = [asdict(Dispatched(f"j{i}", 1, 1000, 1000 + wait)) for i, wait in enumerate(waits)]
    return {
        "converged_s": 2.0,
        "late_s": 0.0,
        "took_s": 110.0,
        "rss": [[float(second), value] for second, value in enumerate(rss)],
        "cycles_s": [0.1, 0.2, 0.3],
        "dispatched": dispatched,
        "burst": dispatched[:3],
        "claim_ms": [1.0, 2.0],
        "most_busy": {"train": busy, "score": 1},
        "finished": {"finished": 1010, "failed": 20},
        "tided_cpu": 0.25,
        "valkey_cpu": 0.1,
        "status_ms": [10.0, 20.0, 30.0],
    }


def by_id(claims: list[Claim]) -> dict[str, Claim]:
    return {claim.id: claim for claim in claims}


def test_dispatch_is_from_due_to_claimed() -> None:
    assert waited_ms([Dispatched("j", 2, 500, 512), Dispatched("k", 1, 500, 500)]) == [12, 0]


def test_the_goals_are_those_of_the_full_size() -> None:
    fine = by_id(claims_of("full", SIZE, part([5] * 99 + [50], [100.0] * 60)))
    assert fine["full.dispatch_p99"].met
    assert fine["full.rss"].met
    assert fine["full.growth"].met
    assert fine["full.cycle_p50"].value == pytest.approx(200.0)
    assert fine["full.attempts"].value == "1,010 finished, 20 failed, 0 lost"
    slow = by_id(claims_of("full", SIZE, part([5] * 90 + [150] * 10, [251.0] * 60)))
    assert slow["full.dispatch_p99"].met is False
    assert slow["full.rss"].met is False
    small = by_id(claims_of("small", SIZE, part([150] * 10, [251.0] * 60)))
    assert all(claim.met is None for claim in small.values())


def test_without_an_idle_worker_nothing_is_said_about_dispatch() -> None:
    claims = by_id(claims_of("full", SIZE, part([1] * 10, [100.0] * 60, busy=20)))
    assert claims["full.idle"].value == 0
    assert claims["full.dispatch_p99"].met is False


def test_a_leak_is_seen_and_the_warm_up_is_not_one() -> None:
    leaking = [(float(second), 100.0 + 0.1 * second) for second in range(100)]
    assert slope_mb_h(leaking, 10.0) == pytest.approx(360.0)
    assert growth_mb(leaking, 10.0) == pytest.approx(6.0, abs=0.2)
    flat = [(float(second), 50.0 + 5 * min(second, 10)) for second in range(100)]
    assert slope_mb_h(flat, 10.0) == 0.0
    assert growth_mb(flat, 10.0) == 0.0


def test_growth_is_full_over_small() -> None:
    small, full = part([1], [100.0] * 9), {**part([1], [150.0] * 9), "cycles_s": [0.4], "tided_cpu": 0.5}
    claims = by_id(growth_claims(small, full))
    assert claims["growth.rss"].value == pytest.approx(1.5)
    assert claims["growth.cycle"].value == pytest.approx(2.0)
    assert claims["growth.cpu"].value == pytest.approx(2.0)


def test_jobs_come_in_order_and_some_go_wrong() -> None:
    came = list(arrivals(SIZE, random.Random(0)))
    times = [at_s for at_s, _ in came]
    endings = [spec.options["ending"] for _, spec in came]
    assert len(came) == SIZE.jobs
    assert times == sorted(times)
    assert 0.0 <= times[0] <= times[-1] <= SIZE.seconds
    assert 5 <= endings.count(Ending.FAIL) <= 40
    assert 1 <= endings.count(Ending.VANISH) <= 25
    assert {spec.kind for _, spec in came} == {JobKind.TRAIN, JobKind.SCORE}


def test_the_full_size_leaves_workers_idle() -> None:
    """Half of the jobs are of a kind, and take four seconds on average."""
    for size in SIZES.values():
        assert size.jobs / size.seconds / 2 * 4 < 0.6 * size.workers


def test_either_figure_meets_the_goal_of_the_data_plane() -> None:
    def goal(speed: float, memcpy: float) -> bool | None:
        return by_id(dataplane_claims({"one": [Turn(speed, memcpy, 1.0, 1.0, 1.0)] * 3}, 50.0))[
            "dataplane.one.mb_s"
        ].met

    assert goal(500.0, 10_000.0)
    assert goal(400.0, 3_000.0)
    assert goal(400.0, 10_000.0) is False


def test_other_arms_of_the_data_plane_are_compared_in_pairs() -> None:
    one = [Turn(speed, 10_000.0, 1.0, 1.0, 1.0) for speed in (100.0, 200.0, 400.0)]
    ring = [Turn(2 * turn.megabytes_s, 10_000.0, 1.0, 1.0, 1.0) for turn in one]
    claims = by_id(dataplane_claims({"one": one, "ring": ring}, 50.0))
    assert claims["dataplane.ring.over"].value == pytest.approx(2.0)
    assert claims["dataplane.ring.mb_s"].met is None
