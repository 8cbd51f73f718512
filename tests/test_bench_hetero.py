"""The bench of heterogeneous allocation: its arithmetic from made-up parts, processor time, and the whole harness once on a tiny model."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.hetero import asked, bench, cores_of
from bench.hetero_plan import AFTER, BEFORE, CALIBRATE, PARTS, QUARTER, TIDED, WHOLE, Places, Plan, part_name, smoke
from bench.hetero_report import Served, claims_of, compose, inputs_of, ratio, request_speedup
from bench.report import Claim
from bench.study import Parts, prompts_of
from bench.turns import Measured
from bench.usage import Moment, share_within, shares, trees_cpu_s
from tests.tiny import make_target
from tided.model.engines import LatencyProfile

PROFILE = {"tokens": [1, 5], "target_s": [0.04, 0.05], "batches": [1], "draft_s": [0.004]}
PLAN = Plan(
    run_s=600.0,
    min_rows=1,
    gate_requests=15,
    gate_tokens=1,
    held_out=0.25,
    lengths=(2.17, 2.44, 2.72),
    trained_per_s=805.0,
)


def engine(request_s: float, seconds: float, steps: int = 0) -> dict[str, Any]:
    """One that answered requests of 60 tokens and a prompt of 40 one after another, the first tenth of each prefill."""
    count = int(seconds / request_s)
    return {
        "tokens": 60 * count,
        "seconds": count * request_s,
        "errors": 0,
        "prompt_tokens": 40 * count,
        "answers": [answer((i + 1) * request_s, request_s, steps) for i in range(count)],
    }


def answer(at_s: float, seconds: float, steps: int = 0) -> dict[str, float]:
    return vars(Measured(at_s, seconds, seconds / 10, 60, steps, 4 * steps, 60 - steps if steps else 0))


def parts(pair: str, *, adapted_s: float, first_draft_s: float = 300.0) -> dict[str, dict[str, Any]]:
    """3 s a request without speculation on a whole core, four times that on a quarter; `adapted_s` once a draft serves."""
    second = 3.0 if pair == WHOLE else 12.0
    cpu = {"client": 0.02, "first": 0.96, "second": 0.96 if pair == WHOLE else 0.24}
    names = itertools.count()
    made: dict[str, dict[str, Any]] = {
        name: {
            "engines": [engine(3.0, 120.0), engine(second, 120.0)],
            "cpu": cpu,
            "profile": PROFILE if name == CALIBRATE else None,
            "prompts": [str(next(names)) for _ in range(50)],
        }
        for name in (CALIBRATE, BEFORE, AFTER)
    }
    early = [answer(3.0 * (i + 1), 3.0) for i in range(int(first_draft_s / 3.0))]
    late = [
        answer(first_draft_s + adapted_s * (i + 1), adapted_s, 24)
        for i in range(int((600 - first_draft_s) / adapted_s))
    ]
    answers = early + late
    tided = {
        "tokens": 60 * len(answers),
        "seconds": 600.0,
        "errors": 0,
        "prompt_tokens": 40 * len(answers),
        "answers": answers,
    }
    job = {
        "spec": {"kind": "train"},
        "started_ms": 201_000,
        "finished_ms": 251_000,
        "result": {"trained_tokens": 10_000, "candidate": {"length": 2.5}},
    }
    made[TIDED] = {
        "engines": [tided],
        "began_ms": 1000,
        "cpu": {"client": 0.03, "tided": 0.05, "engine": 0.95, "worker": 0.2},
        "worker_share": 0.95 if pair == WHOLE else 0.24,
        "timeline": [],
        "events": [{"kind": "draft-swapped", "at_ms": 1000 + round(1000 * first_draft_s)}],
        "jobs": [job],
        "samples": {"lost": 0},
        "prompts": [str(next(names)) for _ in range(50)],
    }
    return {name: made[name] for name in PARTS}


def by_id(claims: Sequence[Claim]) -> dict[str, Claim]:
    return {claim.id: claim for claim in claims}


def test_inputs_are_rates_the_way_to_the_first_draft_and_eq_5() -> None:
    given = inputs_of(PLAN, parts(QUARTER, adapted_s=2.0)[CALIBRATE])
    assert given.rates == (pytest.approx(20.0), pytest.approx(5.0))
    assert given.training == (805.0, pytest.approx(805.0 / 4))
    # 15 held-out requests are 60 in all, of 3 s; 45 of them are trained on, 6% aside for validation, eight times.
    assert given.warm_up.collect_s == pytest.approx(180.0)
    assert given.warm_up.work == pytest.approx(45 * 60 * 0.94 * 8 + 11 * 805)
    # Where the rows of what is trained on are what lasts longest, they decide: 100 a request, three of four requests.
    rows = inputs_of(Plan(run_s=600.0, min_rows=7500, held_out=0.25), parts(WHOLE, adapted_s=2.0)[CALIBRATE])
    assert rows.warm_up.collect_s == pytest.approx(7500 / 75 * 3.0)


def test_prefill_is_no_faster_with_a_draft() -> None:
    profile = LatencyProfile((1, 5), (0.04, 0.05), (1,), (0.004,))
    # Every drafted token accepted: five tokens for four draft steps and one target step over five.
    decoding = 5.0 / ((4 * 0.004 + 0.05) / 0.04)
    assert request_speedup(PLAN, profile, 0.0, 5.0) == pytest.approx(decoding)
    assert request_speedup(PLAN, profile, 0.5, 5.0) == pytest.approx(1 / (0.5 + 0.5 / decoding))
    assert request_speedup(PLAN, profile, 0.0, 1.0) == pytest.approx(1.0)


def test_the_ratio_is_of_all_tokens_and_its_interval_of_the_requests() -> None:
    def served(*request_s: float) -> Served:
        answers = tuple(Measured(0.0, seconds, 0.1, 60, 0, 0, 0) for seconds in request_s)
        return Served(answers, 60 * len(answers), sum(request_s), 0, 0)

    ours, slow, fast = served(2.0, 2.0), served(3.0, 3.0), served(1.5, 1.5)
    same = ratio(ours, [[slow, slow], [slow, slow]])
    assert (same.median, same.low, same.high) == pytest.approx((0.75, 0.75, 0.75))
    assert ratio(ours, [[slow, slow], [fast, fast]]).median == pytest.approx(30 / 60)
    mixed = ratio(served(1.0, 3.0), [[slow, slow]])
    assert mixed.low < mixed.median < mixed.high


def test_two_whole_cores_a_loss_that_was_foretold_meets_its_claims() -> None:
    body = compose(PLAN, WHOLE, parts(WHOLE, adapted_s=2.0))
    claims = by_id(claims_of(WHOLE, body))
    # 300 s at 20 tokens/s, then 300 s at 30, over 40.
    assert body["ratio"]["median"] == pytest.approx((300 * 20 + 300 * 30) / 600 / 40)
    assert body["ratio_adapted"]["median"] == pytest.approx(0.75)
    assert body["speedup"] == pytest.approx(1.5)
    assert body["accept_length"] == pytest.approx(1 + 36 / 24)
    assert body["with_measured"]["best"]["gain"][1] == pytest.approx(body["ratio"]["median"])
    assert claims["whole.break-even"].value == pytest.approx(2.0)
    assert str(claims["whole.said"].value).startswith("do not train: ")
    assert claims["whole.warned"].met
    assert claims["whole.error"].met
    assert "whole.share.worker" not in claims
    assert {claim.id for claim in claims.values() if claim.met is False} == set()


def test_a_quarter_of_a_core_is_shown_to_be_one() -> None:
    made = parts(QUARTER, adapted_s=1.5, first_draft_s=240.0)
    claims = by_id(claims_of(QUARTER, compose(PLAN, QUARTER, made)))
    assert claims["quarter.ratio"].value == pytest.approx((240 * 20 + 360 * 40) / 600 / 25)
    assert claims["quarter.break-even"].value == pytest.approx(1.25)
    assert all(claims[f"quarter.share.{of}"].met for of in ("worker", "engine.before", "engine.after"))
    made[TIDED]["worker_share"] = 0.5
    assert by_id(claims_of(QUARTER, compose(PLAN, QUARTER, made)))["quarter.share.worker"].met is False


def test_a_prediction_that_was_wrong_and_a_prompt_asked_twice_are_not_met_and_what_did_not_run_is_absent() -> None:
    made = parts(QUARTER, adapted_s=3.6)
    made[TIDED]["prompts"][0] = made[CALIBRATE]["prompts"][0]
    made[TIDED]["samples"] = {"lost": 1}
    hopeful = replace(PLAN, gate_requests=3)  # a first draft is expected early, and none of this comes true
    missed = {claim.id for claim in claims_of(QUARTER, compose(hopeful, QUARTER, made)) if claim.met is False}
    assert missed == {"quarter.error", "quarter.warned", "quarter.prompts_repeated", "quarter.lost"}
    first = by_id(claims_of(QUARTER, compose(PLAN, QUARTER, {CALIBRATE: made[CALIBRATE]})))
    assert "quarter.predicted" in first
    assert not {"quarter.ratio", "quarter.error", "quarter.warned", "quarter.tided"} & set(first)
    assert claims_of(QUARTER, compose(PLAN, QUARTER, {})) == []


def test_a_run_in_which_no_draft_was_deployed_has_a_ratio_and_no_adapted_part() -> None:
    made = parts(WHOLE, adapted_s=3.0)
    made[TIDED] |= {"events": [], "jobs": []}
    claims = by_id(claims_of(WHOLE, compose(PLAN, WHOLE, made)))
    assert claims["whole.ratio"].value == pytest.approx(0.5)
    assert claims["whole.first-draft"].value == "not in this run"
    assert "whole.ratio.adapted" not in claims


def test_no_prompt_is_asked_twice() -> None:
    plan = Plan()
    most = {stream: list(itertools.islice(asked(plan, stream), 120)) for stream in range(6)}
    texts = [prompt.user for prompts in most.values() for prompt in prompts]
    texts += [prompt.user for prompt in itertools.islice(prompts_of(plan.domain, "train", 0, 0, 64), 3000)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("plan", [Plan(), smoke()])
def test_a_pair_takes_less_than_twenty_minutes(plan: Plan) -> None:
    assert plan.calibrate_s + 2 * plan.all_s + plan.run_s <= 1080


def test_a_pair_that_is_complete_begins_anew_and_another_goes_on(tmp_path: Path) -> None:
    stored = Parts(tmp_path, "plan")
    names = [part_name(WHOLE, part) for part in PARTS]
    stored.write(names[0], {})
    stored.begin_anew(*names)
    assert stored.read(names[0]) is not None
    for name in names:
        stored.write(name, {})
    stored.begin_anew(*names)
    assert stored.first(*names) == []


def test_shares_of_a_core_over_all_and_while_something_ran() -> None:
    moments = [Moment(1000 * at, {"worker": cpu}) for at, cpu in ((0, 0.0), (2, 0.1), (4, 0.6), (6, 1.1), (8, 1.1))]
    assert shares(moments) == {"worker": pytest.approx(1.1 / 8)}
    assert share_within(moments, "worker", [(1500, 6500)]) == pytest.approx(0.25)
    assert share_within(moments, "worker", [(2500, 3500)]) is None


def test_what_a_process_started_counts_with_it_even_when_it_has_ended() -> None:
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    parent = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])\nprint('done', flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        [spent, mine] = trees_cpu_s([process.pid, os.getpid()])
        process.communicate(b"\n")
    assert spent >= 0.3
    assert mine > spent


def test_cores_are_the_first_and_the_last_or_those_that_are_named() -> None:
    ours = sorted(os.sched_getaffinity(0))
    assert cores_of(None) == (ours[0], ours[-1])
    assert cores_of("3,5") == (3, 5)


@pytest.mark.real
async def test_the_harness_runs_from_end_to_end_on_a_tiny_model(tmp_path: Path, short_dir: Path) -> None:
    plan = smoke()
    places = Places(make_target(tmp_path / "model"), short_dir / "hetero", tmp_path / "hetero.json", cores_of(None))
    report = json.loads((await bench(plan, places, [QUARTER])).read_text())
    claims = {claim["id"]: claim for claim in report["claims"]}
    assert claims["quarter.ratio"]["value"] > 0
    assert claims["quarter.predicted"]["value"] > 0
    assert set(report["quarter"]["cpu"][TIDED]) >= {"client", "tided", "engine", "worker", "spin-2"}
    assert all(claims[f"quarter.{name}"]["value"] == 0 for name in ("prompts_repeated", "request_errors", "lost"))
    assert not [id for id in claims if id.startswith("whole.")]
