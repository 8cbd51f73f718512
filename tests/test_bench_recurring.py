"""The benches of recurring domains and of forgetting without a server or a training: their claims from made-up figures."""

from dataclasses import replace
from typing import Any

import pytest

from bench.engines.recurring_plan import ARMS, POOL, RETRAIN, Plan, full, smoke
from bench.engines.recurring_report import Recovery, Seen, claims_of, phases_of, recoveries
from bench.forgetting import BEFORE, WITH, WITHOUT, difference, replayed_requests
from bench.forgetting import claims_of as forgetting_claims
from bench.report import Claim
from bench.study import digest_of, prompts_of
from tided.model.drafts import Evaluation

BEGAN_MS = 1_000_000
SAMPLES = {"tapped": 100, "stored": 90, "shed": 4, "lost": 0, "in_flight": 6}


def seen(lengths: list[float], domain: str = "code") -> Seen:
    """100 request-steps a second at these acceptance lengths."""
    return Seen(domain, tuple(round(100 * length) for length in lengths), (100,) * len(lengths))


def part(arm: str, plan: Plan, back_s: dict[int, int]) -> dict[str, Any]:
    """An arm whose phase i (from 0) is at length 1.2 until `back_s[i]`, then at 2.0. Reports come every half second."""
    changed_ms: list[int] = []
    reports: list[dict[str, Any]] = []
    at_ms = BEGAN_MS
    for index, phase in enumerate(plan.arms[arm]):
        changed_ms.append(at_ms)
        for half in range(2 * round(phase.seconds)):
            back = half >= 2 * back_s[index]
            reports.append(
                {
                    "at_ms": at_ms + 500 * half,
                    "version": f"{phase.domain}" if back else "v0",
                    "steps": 50,
                    "accepted": 50 if back else 10,
                }
            )
        at_ms += 1000 * round(phase.seconds)
    return {
        "arm": arm,
        "phases": [{"domain": phase.domain, "seconds": phase.seconds} for phase in plan.arms[arm]],
        "changed_ms": changed_ms,
        "ended_ms": at_ms,
        "prompts": [[f"{index}-{n}" for n in range(3)] for index in range(len(changed_ms))],
        "reports": reports,
        "requests": 12,
        "errors": 0,
        "events": [{"kind": "pool-scored"}, {"kind": "training-started"}],
        "samples": SAMPLES,
        "drafts": [{"version": "v0", "lineage": "d", "number": 0}, {"version": "code", "lineage": "d", "number": 1}],
    }


def by_id(claims: list[Claim]) -> dict[str, Claim]:
    return {claim.id: claim for claim in claims}


def test_the_best_window_of_a_phase_and_the_second_from_which_acceptance_stays_near_it() -> None:
    phase = seen([1.2] * 30 + [2.0] * 60 + [1.8] * 30)
    assert phase.best == pytest.approx(2.0)
    # 27 parts of 2.0 and three of 1.2 are 1.92, which is enough; four of them are not.
    assert phase.recovered_s(phase.best) == 27
    assert phase.recovered_s(3.0) is None


def test_a_few_good_seconds_are_no_recovery() -> None:
    assert seen([1.2] * 10 + [2.0] * 20 + [1.2] * 40 + [2.0] * 30).recovered_s(2.0) == 67


def test_what_was_not_drafted_has_no_length_and_recovers_never() -> None:
    silent = Seen("code", (0,) * 60, (0,) * 60)
    assert silent.length(0, 10) == 0.0
    assert silent.recovered_s(1.0) is None


def test_a_domain_that_comes_again_is_held_against_its_first_phase() -> None:
    first, other = seen([2.0] * 40), seen([1.5] * 40, "french")
    again = seen([1.0] * 10 + [1.9] * 30)
    assert [recovery.seconds for recovery in recoveries([first, other, again])] == [0, 0, 10]
    assert recoveries([first, seen([1.0] * 40)])[1] == Recovery(40, back=False)


def test_reports_count_in_the_second_and_the_phase_in_which_they_were_written() -> None:
    made = part(RETRAIN, full(), {0: 100, 1: 200, 2: 50})
    first, second, third = phases_of(made)
    assert [phase.seconds for phase in (first, second, third)] == [330, 360, 210]
    assert first.steps[0] == second.steps[359] == 100
    assert first.length(99, 1) == pytest.approx(1.2)
    assert first.length(100, 1) == pytest.approx(2.0)


def test_a_study_that_shows_everything_meets_every_claim() -> None:
    plan = full()
    pool, retrain = part(POOL, plan, {0: 150, 1: 180, 2: 12, 3: 15}), part(RETRAIN, plan, {0: 150, 1: 180, 2: 120})
    claims = by_id(claims_of([pool, retrain]))
    assert {id: claim.value for id, claim in claims.items() if claim.met is False} == {}
    assert claims["faster.code"].value == pytest.approx(117 / 9)
    assert claims["faster.french"].value == pytest.approx(177 / 12)
    assert claims["pool.1.drafts"].value == "d@0 -> d@1"
    assert "1 pool-scored" in str(claims["pool.events"].value)


def test_what_was_slow_failed_or_asked_twice_is_not_met_and_what_did_not_run_is_absent() -> None:
    plan = full()
    pool = part(POOL, plan, {0: 150, 1: 180, 2: 100, 3: 150})
    pool["errors"] = 1
    pool["prompts"][2][0] = pool["prompts"][0][0]
    claims = by_id(claims_of([pool]))
    assert "faster.code" not in claims
    assert claims["faster.french"].met is False
    assert "not within the phase" in claims["faster.french"].what
    assert claims["pool.failed"].met is False
    assert claims["pool.overlap"].value == 1


@pytest.mark.parametrize("plan", [full(), smoke()])
def test_the_arms_differ_in_pool_and_replay_and_last_less_than_twenty_minutes(plan: Plan) -> None:
    assert set(plan.arms) == set(plan.changes) == set(ARMS)
    assert plan.started(POOL).changes == plan.server.changes
    training = {**plan.server.changes["training"], "replay_fraction": 0.0}
    assert plan.started(RETRAIN).changes == {**plan.server.changes, "training": training, "pool": {"enabled": False}}
    assert all(sum(phase.seconds for phase in phases) <= 1000 for phases in plan.arms.values())


def test_there_are_prompts_for_six_requests_a_second_before_one_comes_twice() -> None:
    plan = full()
    for domain in ("code", "french"):
        seconds = max(sum(p.seconds for p in phases if p.domain == domain) for phases in plan.arms.values())
        source = prompts_of(domain, "train", 0, 0, plan.server.max_tokens)
        prompts = [digest_of(next(source)) for _ in range(round(6 * seconds))]
        assert len(set(prompts)) == len(prompts)


def evaluation(lengths: list[float]) -> Evaluation:
    groups = tuple(f"{n:02x}" for n in range(len(lengths)))
    return Evaluation("v", 4, groups, tuple(lengths), (10,) * len(lengths), (0.5,))


def test_differences_are_paired_by_request_and_certain_when_every_request_agrees() -> None:
    before = [evaluation([2.0, 3.0, 4.0])]
    after = [evaluation([1.5, 2.5, 3.5]), evaluation([1.5, 2.5, 3.5])]
    found = difference(after, before)
    assert (found.median, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert difference(before).low < 3.0 < difference(before).high


def test_seeds_that_disagree_widen_the_interval() -> None:
    one = [evaluation([2.0] * 20), evaluation([2.0] * 20)]
    two = [evaluation([1.5] * 20), evaluation([2.5] * 20)]
    assert difference(one).high - difference(one).low == pytest.approx(0.0)
    assert difference(two).high - difference(two).low > 0.5


def test_other_requests_cannot_be_compared() -> None:
    others = replace(evaluation([2.0, 2.0]), groups=("aa", "bb"))
    with pytest.raises(AssertionError):
        difference([evaluation([2.0, 2.0])], [others])


def test_what_replay_saves_is_a_claim_where_something_was_known() -> None:
    lengths = {BEFORE: 2.5, WITHOUT: 1.8, WITH: 2.3}
    scores = {arm: [evaluation([length] * 9)] for arm, length in lengths.items()}
    code = by_id(forgetting_claims("code", scores))
    assert code["code.replay.low"].met is True
    assert code["code.without.change"].value == pytest.approx(-0.7)
    assert not [claim for claim in forgetting_claims("french", scores) if claim.goal]
    worse = by_id(forgetting_claims("code", {**scores, WITH: scores[WITHOUT], WITHOUT: scores[WITH]}))
    assert worse["code.replay.low"].met is False


def test_as_much_is_replayed_as_a_trainer_takes() -> None:
    assert replayed_requests() == 37
