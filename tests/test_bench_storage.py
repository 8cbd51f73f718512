"""What the storage bench says of a run follows from its moments alone."""

from bench.storage import Moment, claims


def run(*kept: int) -> list[Moment]:
    """One moment a cycle, a tenth of it in Redis."""
    return [Moment(cycle, size // 10, size - size // 10) for cycle, size in enumerate(kept)]


def test_a_flat_run_within_its_bound_meets_its_goals() -> None:
    found = {claim.id: claim for claim in claims(run(10, 50, *[100] * 34), 2400, 36, 7_000_000, "x = 1")}
    assert found["storage.ratio"].value == 24.0
    assert found["storage.flat"].value == 1.0
    assert [found[name].met for name in ("storage.cycles", "storage.ratio", "storage.flat")] == [True] * 3
    assert "x = 1" in found["storage.peak"].what
    assert found["storage.drafts"].value == 7.0


def test_one_peak_one_drift_or_too_few_cycles_are_seen() -> None:
    found = {claim.id: claim for claim in claims(run(*[100] * 20, 101, *[100] * 15), 2400, 36, 0, "")}
    assert found["storage.ratio"].met is False
    growing = {claim.id: claim for claim in claims(run(*range(100, 136)), 10**6, 36, 0, "")}
    assert growing["storage.flat"].met is False
    short = {claim.id: claim for claim in claims(run(*[100] * 12), 10**6, 12, 0, "")}
    assert short["storage.cycles"].met is False
