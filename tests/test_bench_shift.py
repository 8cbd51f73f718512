"""The study: its report from made-up parts, and the whole harness once on a tiny model."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from bench.shift import MEASURE_STRIDE, study
from bench.shift_plan import Places, Plan, smoke
from bench.shift_report import claims_of, compose
from bench.study import prompts_of
from tests.tiny import make_target

PROFILE = {"tokens": [1, 5], "target_s": [0.04, 0.05], "batches": [1], "draft_s": [0.004]}
TOTALS = {"tapped": 100, "stored": 90, "shed": 10, "lost": 0, "in_flight": 0, "duplicated": 0}


def answer(at_s: float, seconds: float, steps: int = 0, accepted: int = 0) -> dict[str, float]:
    return {
        "at_s": at_s,
        "seconds": seconds,
        "ttft_s": 0.0,
        "tokens": 60,
        "spec_steps": steps,
        "drafted": 4 * steps,
        "accepted": accepted,
    }


def part(
    name: str, *, tided_s: float, static_s: float, swapped: bool, measured: tuple[str, ...] = ("m",)
) -> dict[str, Any]:
    """A phase of 600 s with 60 pairs: none takes 3 s, tided accepts 1.5 of 4 drafted tokens, static 0.1."""
    pairs = [
        {
            "block": i // 5,
            "answers": {
                "none": answer(10 * i + 10, 3.0),
                "static": answer(10 * i + 10, static_s, 50, 5),
                "tided": answer(10 * i + 10, tided_s, 24, 36),
            },
        }
        for i in range(60)
    ]
    events = [{"kind": "draft-swapped", "at_ms": 1000 + 300_000, "message": "", "data": {}}] if swapped else []
    return {
        "phase": {"name": name, "domain": "code", "seconds": 600.0},
        "seconds": 600.0,
        "began_ms": 1000,
        "turns": {"pairs": pairs, "errors": []},
        "adaptation": {"tokens": 600, "seconds": 60.0, "errors": 0},
        "trained_prompts": ["t"],
        "measured_prompts": list(measured),
        "events": events,
        "samples_start": dict.fromkeys(TOTALS, 0),
        "samples_end": TOTALS,
        "profile": PROFILE,
        "jobs": [],
        "swaps": 1,
        "drifts": 0,
        "served": {"version": "v", "path": "p", "gammas": [4]},
    }


def test_a_study_that_shows_everything_meets_every_claim() -> None:
    parts = [
        part("1", tided_s=1.6, static_s=3.0, swapped=True),
        part("2", tided_s=1.8, static_s=3.2, swapped=True),
        part("3", tided_s=1.6, static_s=1.7, swapped=False),
    ]
    body = compose(parts, {"compared": 120, "mismatches": 0, "ties": 1, "tokens": 5000, "gaps": [1e-5]})
    first = body["phases"][0]
    assert first["accept_length_end"] == pytest.approx(2.5)
    assert first["ratio_to_none"] == pytest.approx(3.0 / 1.6)
    # Eq. 5: 2.5 tokens for four draft steps and one target step over five tokens, against one token for T(1).
    assert body["predicted_speedup"] == pytest.approx(2.5 / ((4 * 0.004 + 0.05) / 0.04))
    assert body["rates"][0]["generated_per_min"] == pytest.approx(600)
    assert body["swaps"][0]["at_s"] == pytest.approx(300)
    missed = [claim.id for claim in claims_of(body) if claim.met is False]
    assert missed == ["phase1.eq5"]


def test_what_did_not_happen_is_a_claim_that_is_not_met() -> None:
    parts = [
        part("1", tided_s=3.3, static_s=3.0, swapped=False, measured=("m", "t")),
        part("2", tided_s=3.3, static_s=3.0, swapped=False),
    ]
    parts[0]["samples_end"] = {**TOTALS, "lost": 2}
    for pair in parts[0]["turns"]["pairs"]:
        pair["answers"]["tided"] = answer(pair["answers"]["tided"]["at_s"], 3.3)
    claims = {claim.id: claim for claim in claims_of(compose(parts, None))}
    assert claims["phase1.accept"].met is False
    assert claims["phase1.ratio"].met is False
    assert claims["phase1.worst"].met is False
    assert claims["phase2.swap"].met is False
    assert claims["prompts.overlap"].met is False
    assert "identity.compared" not in claims
    assert "phase1.eq5" not in claims


def test_a_domain_that_comes_back_is_measured_on_other_prompts() -> None:
    one = list(itertools.islice(prompts_of("code", "measure", 0, 0, 64), 100))
    three = list(itertools.islice(prompts_of("code", "measure", 0, 2 * MEASURE_STRIDE, 64), 100))
    assert not {prompt.user for prompt in one} & {prompt.user for prompt in three}
    assert {prompt.max_tokens for prompt in one} == {64}


def test_another_plan_does_not_reuse_a_part(tmp_path: Path) -> None:
    plan, places = smoke(("code", "french"), 1.0), Places(tmp_path, tmp_path, tmp_path / "report.json")
    places.parts(plan).write("phase-1", {})
    assert len(places.parts(plan).first("phase-1", "phase-2")) == 1
    assert places.parts(Plan()).first("phase-1") == []


@pytest.mark.real
async def test_the_harness_runs_from_end_to_end_on_a_tiny_model(tmp_path: Path, short_dir: Path) -> None:
    plan = smoke(("code", "maths"), 3.0)
    places = Places(make_target(tmp_path / "model"), short_dir / "shift", tmp_path / "shift-report.json")
    report = json.loads((await study(plan, places)).read_text())
    assert [phase["name"] for phase in report["phases"]] == ["1", "2", "3"]
    assert all(phase["pairs"] >= 2 and phase["ratio_to_none"] > 0 for phase in report["phases"])
    assert report["prompt_overlaps"] == 0
    assert report["greedy_compared"] == plan.identity_prompts
    assert report["greedy_mismatches"] == 0
    samples = report["samples"]
    assert samples["tapped"] > 0
    assert samples["tapped"] == samples["stored"] + samples["shed"]
    assert (samples["lost"], samples["in_flight"], samples["duplicated"]) == (0, 0, 0)
    assert report["request_errors"] == 0
