"""The benches on real servers without a server: command lines, counters, schedules, and the study's claims from made-up parts."""

from dataclasses import asdict
from typing import Any

import httpx
import pytest

from bench.engines.counters import Drafted, drafted
from bench.engines.servers import replaced
from bench.engines.shift import frozen, ranges
from bench.engines.shift_plan import ARMS, NONE, TIDED, Plan, sglang
from bench.engines.shift_report import claims_of, throughput_ratio
from bench.engines.speedup import FULL, order
from bench.engines.speedup_report import cells_of, pairs_of
from bench.engines.speedup_report import claims_of as speedup_claims
from bench.engines.traces import RECORDED
from bench.load import Answer, longest_gap
from bench.traffic import DOMAINS
from bench.turns import Measured, Pair
from tided.model.codec import to_plain
from tided.model.engines import LatencyProfile, StepCounts
from tided.policies.speedup import step_s

PLAN = Plan()
SAMPLES = {"tapped": 100, "stored": 90, "shed": 4, "lost": 0, "in_flight": 6}
SECONDS = {"none": 6.0, "static": 8.0, "own": 6.1, "tided": 4.0}


def test_options_of_a_command_line_are_replaced_added_and_taken_away() -> None:
    words = ["python", "-m", "server", "--a", "1", "--flag", "--b", "2", "3", "--c", "4"]
    assert replaced(words, {"--a": "9", "--b": None, "--flag": None, "--new": "", "--d": "5"}) == [
        *["python", "-m", "server", "--c", "4", "--a", "9", "--new", "--d", "5"]
    ]


def test_a_schedule_in_vllms_own_words() -> None:
    assert ranges([4, 4, 2, 0, 0]) == [[1, 2, 4], [3, 3, 2], [4, 5, 0]]
    own = frozen("vllm", "draft", [4, 2, 0], own=True)["--speculative-config"]
    assert own is not None
    assert '"num_speculative_tokens": 4' in own
    assert frozen("sglang", "draft", [3], own=False)["--speculative-num-draft-tokens"] == "4"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (
            'vllm:spec_decode_num_drafts_total{engine="0"} 10.0\nvllm:spec_decode_num_draft_tokens_total{engine="0"} 30.0\n'
            'vllm:spec_decode_num_accepted_tokens_total{engine="0"} 15.0\nvllm:spec_decode_num_accepted_tokens_per_pos{x="0"} 9.0\n',
            Drafted(10, 30, 15),
        ),
        (
            'sglang:spec_verify_calls_total{a="b"} 10\nsglang:generation_tokens_total{s="true"} 27\n'
            'sglang:num_requests_total{s="true"} 2\n',
            Drafted(10, 0, 15),
        ),
        ("up 1\n", Drafted()),
    ],
)
async def test_what_servers_count_themselves(page: str, expected: Drafted) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=page))
    async with httpx.AsyncClient(base_url="http://engine", transport=transport) as http:
        assert await drafted(http) == expected


def test_the_longest_silence_around_a_swap() -> None:
    prompt = DOMAINS["code"].prompts("measure")[0]
    answer = Answer(prompt, 0.0, 9.0, 1.0, 5, "", arrived_s=(1.0, 1.5, 3.5, 3.6))
    assert longest_gap([answer], 2.0, 2.1) == 2.0
    assert longest_gap([answer], 1.0, 1.2) == 0.5
    assert longest_gap([answer], 5.0, 6.0) == 0.0


def measured(at_s: float, arm: str, tokens: int) -> dict[str, Any]:
    seconds = SECONDS[arm]
    steps = 0 if arm == NONE else tokens // 2
    return asdict(Measured(at_s, seconds, 0.1, tokens, steps, 4 * steps, steps))


def part(index: int, *, slower: bool = False) -> dict[str, Any]:
    """A part whose blocks are all alike; `slower`: tided takes longer than none at concurrency 16."""
    planned = PLAN.parts[index]
    logs: dict[str, Any] = {}
    for concurrency in PLAN.turns:
        pairs: list[dict[str, Any]] = []
        for number in range(12):
            at_s = (number + 1) * planned.seconds / 12
            answers = {arm: measured(at_s, arm, 64 * concurrency) for arm in planned.arms}
            if slower and concurrency == 16:
                answers[TIDED]["seconds"] = 1.1 * SECONDS[NONE]
            pairs.append({"block": number, "answers": answers})
        logs[str(concurrency)] = {"pairs": pairs, "errors": []}
    return {
        "part": asdict(planned),
        "seconds": planned.seconds,
        "turns": logs,
        "adaptation": {"tokens": 1, "seconds": 1.0, "errors": 0},
        "trained_prompts": ["t"],
        "measured_prompts": ["m"],
        "events": [{"kind": "draft-swapped"}],
        "samples": SAMPLES,
    }


def test_a_study_that_shows_everything_meets_every_claim() -> None:
    claims = {claim.id: claim for claim in claims_of(PLAN, [part(0), part(1), part(2)])}
    assert {id: claim.value for id, claim in claims.items() if claim.met is False} == {}
    assert claims["drift.tided.1"].value == pytest.approx(1.5)
    assert claims["drift.static.16"].value == pytest.approx(0.75)
    assert claims["run.static.1"].value == pytest.approx(2.0)
    assert claims["drift.length.tided.8"].value == pytest.approx(2.0)
    assert claims["run.sum"].value == 0


def test_a_surely_slower_stretch_is_a_claim_that_is_not_met_and_a_part_that_did_not_run_is_absent() -> None:
    claims = {claim.id: claim for claim in claims_of(PLAN, [part(0, slower=True)])}
    assert claims["learn.worst.16"].met is False
    assert claims["learn.worst.8"].met is True
    assert not [id for id in claims if id.startswith(("settled", "drift", "run.static"))]


def test_all_tokens_over_all_seconds() -> None:
    pairs = [
        Pair(0, {arm: Measured(**measured(1.0, arm, 10 * (i + 1))) for arm in ARMS if arm in ("tided", "static")})
        for i in range(5)
    ]
    found = throughput_ratio(pairs, "tided", "static")
    assert found.median == pytest.approx(2.0)
    assert found.low <= found.median <= found.high


def test_on_sglang_nothing_is_said_about_speed() -> None:
    plan = sglang()
    raw = part(2)
    raw["part"] = asdict(plan.parts[1])
    for log in raw["turns"].values():
        for pair in log["pairs"]:
            pair["answers"] = {arm: pair["answers"][arm] for arm in plan.parts[1].arms}
    ids = [claim.id for claim in claims_of(plan, [raw])]
    assert "drift.length.tided.1" in ids
    assert not [id for id in ids if id.startswith(("drift.tided", "drift.static", "drift.worst", "run.static"))]


PROFILE = LatencyProfile((1, 2, 4, 8, 20), (0.04, 0.042, 0.05, 0.06, 0.1), (1, 2, 4), (0.002, 0.0025, 0.003))


def played(batch: int, gamma: int, at_ms: int, slower: float = 1.0) -> dict[str, Any]:
    """A turn whose steps take what PROFILE says, or `slower` times as long; half of what is drafted is right, at every depth."""
    left, accepted = 64 * batch, list[int]()
    for _ in range(gamma):
        accepted.append(left // 2)
        left -= left // 2
    full = StepCounts(batch, gamma, 64, 64 * slower * step_s(PROFILE, batch, gamma), (*accepted, left))
    other_s = 30 * slower * step_s(PROFILE, batch - 1 or 3, gamma)
    others = StepCounts(batch - 1 or 3, gamma, 30, other_s, (90,) + (0,) * gamma)  # not at this turn's batch size
    steps = [to_plain(full), to_plain(others)]
    return {"batch": batch, "gamma": gamma, "tokens_per_s": 1.0, "reports": [{"at_ms": at_ms, "steps": steps}]}


def speedup_part(slower: float = 1.0) -> dict[str, Any]:
    """Three rounds. Steps that draft take `slower` times what the profile says."""
    rounds = [
        {
            "batch": batch,
            "turns": [
                played(batch, gamma, 1000 * (100 * number + 10 * batch + index), slower if gamma else 1.0)
                for index, gamma in enumerate(order(FULL.gammas, number))
            ],
        }
        for number in range(3)
        for batch in (1, 2, 4)
    ]
    return {"profile": to_plain(PROFILE), "rounds": rounds}


def test_every_turn_that_drafts_stands_between_two_that_do_not() -> None:
    assert order((1, 2), 0) == [0, 1, 0, 2, 0]
    assert order((1, 2), 1) == [0, 2, 0, 1, 0]


def test_an_engine_that_does_what_its_profile_says_is_predicted() -> None:
    cells = cells_of(pairs_of([speedup_part()]))
    assert [(cell.batch, cell.gamma) for cell in cells] == [(b, g) for b in (1, 2, 4) for g in (1, 2, 3, 4)]
    for cell in cells:
        length = sum(0.5**k for k in range(cell.gamma + 1))
        step = step_s(PROFILE, cell.batch, 0) / step_s(PROFILE, cell.batch, cell.gamma)
        assert cell.measured == pytest.approx(length * step, rel=0.01)
        assert abs(cell.error) < 0.01
        assert abs(cell.step) < 1e-9
        assert cell.low <= cell.measured <= cell.high
        assert cell.pairs == 3
    claims = {claim.id: claim for claim in speedup_claims(cells)}
    assert claims["speedup.median"].met is True
    assert claims["speedup.worst"].met is True


def test_steps_that_take_longer_than_the_profile_says_are_an_error_that_use_puts_right() -> None:
    cells = cells_of(pairs_of([speedup_part(1.15)]))
    assert all(cell.error == pytest.approx(0.15, abs=0.02) for cell in cells)
    assert all(cell.step == pytest.approx(1 / 1.15 - 1, abs=1e-6) for cell in cells)
    claims = {claim.id: claim for claim in speedup_claims(cells)}
    before, after = (float(str(claims[f"speedup{which}.median"].value)) for which in (".start", ""))
    assert after < 0.8 * before


def test_a_turn_that_never_filled_its_batch_is_no_figure() -> None:
    part = speedup_part()
    part["rounds"][0]["turns"][0]["reports"][0]["steps"] = []
    with pytest.raises(ValueError, match="batch 1 was never full while 0 tokens"):
        pairs_of([part])


def test_recorded_traffic_is_bounded_and_keeps_its_shape_when_shortened() -> None:
    for traffics in RECORDED.values():
        assert sum(stage.seconds for stage in traffics.stages) < 500
        assert max(stage.concurrency for stage in traffics.stages) <= 16
        short = traffics.shortened(10.0)
        assert sum(stage.seconds for stage in short.stages) == pytest.approx(10.0)
        assert [stage.concurrency for stage in short.stages] == [stage.concurrency for stage in traffics.stages]
