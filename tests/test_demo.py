"""The demo: what it says and draws from made-up records, and one run on a tiny model."""

import io
import json
import sys
from pathlib import Path

import pytest

from bench.report import write_json
from demo.chart import draw
from demo.record import Happening, Record, Turn, accept_length, rates, ratio
from demo.run import Demo, Plan
from demo.summary import promises, summary
from tests.tiny import make_target

PNG = b"\x89PNG\r\n"


def record() -> Record:
    """Two phases in which everything happens that should."""
    turns = [
        Turn(10.0 * i, 1, "d@0" if i < 10 else "d@1", 20.0 if i < 10 else 36.0, 24.0, 1.0 if i < 10 else 2.4)
        for i in range(20)
    ]
    turns += [Turn(200 + 10.0 * i, 2, "d@1", 22.0, 24.0, None) for i in range(10)]
    happenings = [
        Happening(40, 1, "training-started", "training-started: cold"),
        Happening(95, 1, "draft-swapped", "draft-swapped: d@1"),
        Happening(230, 2, "drift-detected", "drift-detected: acceptance fell"),
        Happening(260, 2, "draft-swapped", "draft-swapped: d@2"),  # its training began in phase 1
        Happening(265, 2, "training-started", "training-started: drift"),
        Happening(280, 2, "pool-switched", "pool-switched: d@2 -> d@1"),
        Happening(281, 2, "draft-swapped", "draft-swapped: d@1"),  # of the pool
        Happening(300, 2, "draft-swapped", "draft-swapped: d@3"),
    ]
    timeline = [{"at_s": float(i), "gammas": [0 if i < 95 else 3, 0]} for i in range(300)]
    return Record([("Python coding", 0.0), ("French customer service", 200.0)], turns, happenings, timeline)


def test_the_figures_are_of_the_newest_turns_of_a_phase() -> None:
    recent = record().recent(1)
    assert ratio(recent) == pytest.approx(1.5)
    assert rates(recent) == (36.0, 24.0)
    assert accept_length(recent) == pytest.approx(2.4)
    assert accept_length(record().recent(2)) is None
    assert ratio([]) is None


def test_the_summary_tells_what_happened_in_plain_words() -> None:
    text = summary(record())
    assert "1.50 times as fast as the same engine without speculation" in text
    assert "drift was seen 30 s after the traffic changed" in text
    assert "swapped in 100 s after it began" in text
    assert all(kept for _, kept in promises(record()))


def test_a_promise_that_was_not_kept_is_said() -> None:
    late = record()
    late.happenings = [Happening(40, 1, "training-started", "cold"), Happening(310, 1, "draft-swapped", "late")]
    late.errors = 1
    assert [kept for _, kept in promises(late)] == [False, True, False, False, False]
    assert "no new draft passed its gate" in summary(late)
    assert "[NO ] no request failed" in summary(late)


def test_the_chart_is_a_picture_and_its_data_is_json(tmp_path: Path) -> None:
    draw(record(), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    draw(Record(), tmp_path / "empty.png")
    write_json(tmp_path / "demo.json", record().to_plain())
    assert len(json.loads((tmp_path / "demo.json").read_text())["turns"]) == 30


@pytest.mark.real
async def test_the_demo_runs_from_end_to_end_on_a_tiny_model(
    tmp_path: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    changes = {
        "engine": {"max_context": 384, "dtype": "float32"},
        "training": {"min_rows": 300, "budget_s": 2.0},
        "gate": {"min_requests": 2, "min_tokens": 20},
        "samples": {"shard_age_s": 1.0},
    }
    plan = Plan(
        make_target(tmp_path / "model"),
        short_dir / "demo",
        ends_s=(3.0, 6.0),
        adapt_s=1.0,
        concurrency=4,
        max_tokens=12,
        changes=changes,
        ends_early=False,
    )
    demo = Demo(plan)
    await demo.run()
    assert demo.record.phase == 2
    assert {turn.phase for turn in demo.record.turns} == {1, 2}
    assert demo.record.errors == 0
    assert demo.record.timeline
    assert "phase 2: French customer service" in output.getvalue()
