"""Turns and windows, from made-up measurements."""

import json
from collections.abc import Mapping

import pytest

from bench import turns
from bench.turns import Measured, Pair, TurnLog


def measured(at_s: float, seconds: float, tokens: int = 60, spec_steps: int = 0, accepted: int = 0) -> Measured:
    return Measured(at_s, seconds, 0.1, tokens, spec_steps, 4 * spec_steps, accepted)


def pairs_of(count: int, seconds: Mapping[str, float], every_s: float = 10.0) -> list[Pair]:
    return [
        Pair(i // 5, {arm: measured((i + 1) * every_s, took) for arm, took in seconds.items()}) for i in range(count)
    ]


def test_ratio_is_the_median_over_pairs() -> None:
    pairs = pairs_of(9, {"tided": 2.0, "none": 3.0})
    found = turns.ratio(pairs, "tided", "none")
    assert found is not None
    assert found.median == pytest.approx(1.5)
    assert turns.ratio([], "tided", "none") is None


def test_acceptance_weighs_by_steps_and_is_absent_without_them() -> None:
    pairs = [
        Pair(0, {"tided": measured(1, 1, spec_steps=10, accepted=10)}),
        Pair(0, {"tided": measured(2, 1, spec_steps=30, accepted=50)}),
        Pair(0, {"tided": measured(3, 1)}),
    ]
    assert turns.acceptance(pairs, "tided") == pytest.approx(1 + 60 / 40)
    assert turns.acceptance(pairs[2:], "tided") is None


def test_the_last_third_is_by_time() -> None:
    assert [pair.at_s for pair in turns.last_third(pairs_of(9, {"tided": 1.0}), 90.0)] == [60, 70, 80, 90]


def test_windows_hold_enough_of_each_arm() -> None:
    pairs = pairs_of(20, {"tided": 2.0, "none": 3.0})
    found = turns.windows(pairs)
    # The faster arm needs 15 answers of 2 s for 30 s.
    assert len(found) == 6
    assert all(window.ratio_to_none.pairs == 15 for window in found)
    assert turns.worst(found) == pytest.approx(1.5)
    assert turns.windows(pairs[:14]) == []
    assert turns.worst([]) is None


def test_a_slow_stretch_shows_in_the_worst_window_even_if_the_phase_is_fast() -> None:
    fast, slow = pairs_of(20, {"tided": 2.0, "none": 3.0}), pairs_of(16, {"tided": 4.0, "none": 3.0})
    worst = turns.worst(turns.windows([*fast, *slow]))
    assert worst is not None
    assert worst == pytest.approx(0.75)


def test_a_log_survives_json() -> None:
    log = TurnLog(pairs_of(3, {"tided": 2.0, "none": 3.0}), ["none: HTTP 500"])
    assert TurnLog.from_plain(json.loads(json.dumps(log.to_plain()))) == log
