"""tidectl's own computations: replay over generated traces and files, and plans; no daemon anywhere."""

import json
import subprocess
import sys
from pathlib import Path

from tests.ctl_run import tidectl
from tests.test_imports import imported_by
from tided.ctl.replay import BESIDE, bars
from tided.replay.generate import KINDS, generate
from tided.replay.trace import SUFFIX, save


def test_replay_shows_policies_beside_baselines_and_a_chart() -> None:
    shown = tidectl("replay", "slow-recurring", "--seconds", "60")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert max(len(line) for line in lines) <= 80
    for driver in (*BESIDE, "threshold", "bandit"):
        assert sum(line.startswith(driver + " ") for line in lines) == 2, driver
    assert "█" in shown.out


def test_replay_of_a_file_with_one_policy_as_json(tmp_path: Path) -> None:
    path = tmp_path / f"night{SUFFIX}"
    save(generate("slow-bursty", 1, 40.0), path)
    found = json.loads(tidectl("replay", str(path), "--policy", "threshold", "--json").out)
    assert [result["driver"] for result in found["results"]] == [*BESIDE[:-1], "threshold", BESIDE[-1]]
    assert {"tokens_per_s", "over_none", "regret", "worst_window", "switches"} <= found["results"][0].keys()


def test_replay_takes_the_policys_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[speculation]\nmargin = 1.0\n")
    found = json.loads(
        tidectl(
            "--config", str(config), "replay", "slow-stationary", "--seconds", "20", "--policy", "threshold", "--json"
        ).out
    )
    [threshold] = [result for result in found["results"] if result["driver"] == "threshold"]
    assert threshold["drafted_share"] < 0.5  # nothing is worth drafting with such a margin: probes only


def test_what_cannot_be_replayed_is_refused() -> None:
    assert tidectl("replay", "weekly").code == 1
    unknown = tidectl("replay", "slow-bursty", "--policy", "treshold", "--seconds", "10")
    assert unknown.code == 1
    assert "did you mean 'threshold'?" in unknown.err


def test_plan_of_the_papers_cluster() -> None:
    shown = tidectl("plan", "H100=8", "MI250=4", "--speedup", "1.15", "--training", "4")
    assert shown.code == 0
    assert "1.07x" in shown.out
    assert "train: " in shown.out
    found = json.loads(tidectl("plan", "A=2:1:0", "b=2:0.1:1", "--speedup", "1.3", "--spread", "0.1", "--json").out)
    assert found["best"]["shares"][1] == {"kind": "b", "serving": 1, "training": 1}
    assert found["worth_it"]


def test_plan_with_what_comes_before_the_first_draft() -> None:
    options = ("A=3:10:50", "--speedup", "1.8", "--collect", "100", "--work", "25000")
    shown = tidectl("plan", *options, "--over", "1600").out
    assert "first adapted draft after 600 s; what it cost is earned back after 1,600 s" in shown
    assert "expected over an hour 1.11x, a day 1.20x, a week 1.20x" in shown
    assert json.loads(tidectl("plan", *options, "--json").out)["outlook"][0]["horizon_s"] == 3600.0


def test_plan_refuses_what_it_does_not_know() -> None:
    for wrong, why in (
        ("X=2", "no published rates"),
        ("H100", "expected KIND=COUNT"),
        ("X=2:a:b", "expected KIND=COUNT"),
    ):
        refused = tidectl("plan", wrong, "H100=1", "--speedup", "1.2")
        assert refused.code == 1
        assert why in refused.err


def test_other_commands_do_not_pay_for_it() -> None:
    code = "import sys; import tided.ctl.main; print('tided.replay' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
    assert not imported_by(sys.executable, ("tided.ctl.replay", "tided.ctl.plan")) & {"torch", "transformers"}


def test_bars() -> None:
    assert bars([0.0, 1.0, 8.0], 8.0) == " ▂█"
    assert bars([0.0], 0.0) == " "
    assert len(KINDS) == 18
