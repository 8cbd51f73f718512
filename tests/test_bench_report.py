"""Claims on disk and in docs/benchmarks.md, and the paired bootstrap."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import report
from bench.report import Claim, at_least, at_most, paired_ratio


def test_claims_say_whether_their_goal_is_met() -> None:
    assert at_least("a", "", 1.2, 1.2).met
    assert not at_least("a", "", 1.19, 1.2).met
    assert at_most("a", "", 2.0, 2.0).met
    assert not at_most("a", "", 2.1, 2.0).met


def test_write_keeps_other_claims_only_when_told_to(tmp_path: Path) -> None:
    report.write("x", [Claim("a", "first", 1), Claim("b", "second", 2)], directory=tmp_path)
    path = report.write("x", [Claim("b", "second", 3)], keep=True, directory=tmp_path, extra={"more": [1]})
    read = json.loads(path.read_text())
    assert {claim["id"]: claim["value"] for claim in read["claims"]} == {"a": 1, "b": 3}
    assert read["more"] == [1]
    assert read["machine"]["cores"] >= 1
    report.write("x", [Claim("c", "third", 4)], directory=tmp_path)
    assert [claim["id"] for claim in json.loads(path.read_text())["claims"]] == ["c"]
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]


def test_markdown_has_a_table_for_each_report(tmp_path: Path) -> None:
    report.write("engine", [at_least("r", "ours over theirs", 1.05, 1.0, "x")], directory=tmp_path)
    text = report.markdown(directories=[tmp_path])
    assert "## engine" in text
    assert "| ours over theirs | 1.05 x | >= 1 | yes |" in text


def test_markdown_keeps_what_was_not_run_again(tmp_path: Path) -> None:
    report.write("b", [at_least("r", "old", 1, 1)], directory=tmp_path)
    report.write("c", [at_least("r", "kept", 1, 1)], directory=tmp_path)
    before = report.markdown(directories=[tmp_path])
    assert report.markdown(before, directories=[tmp_path]) == before
    (tmp_path / "c.json").unlink()
    report.write("a", [at_least("r", "new", 1, 1)], directory=tmp_path)
    report.write("b", [at_least("r", "newer", 1, 1)], directory=tmp_path)
    text = report.markdown(before, directories=[tmp_path])
    assert [line for line in text.splitlines() if line.startswith("##")] == ["## a", "## b", "## c"]
    assert "| newer |" in text
    assert "| old |" not in text
    assert "| kept |" in text


def test_the_interval_of_a_paired_ratio_covers_it_and_ignores_common_noise() -> None:
    rng = np.random.default_rng(1)
    common = rng.uniform(0.5, 2.0, 60)
    theirs = 30 * common
    ours = 1.3 * theirs * rng.normal(1.0, 0.02, 60)
    found = paired_ratio(ours.tolist(), theirs.tolist())
    assert found.low < 1.3 < found.high
    assert found.high - found.low < 0.05
    assert found.pairs == 60


def test_unpaired_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        paired_ratio([1.0], [1.0, 2.0])
