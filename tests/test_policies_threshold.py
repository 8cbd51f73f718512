"""The threshold policy: pays or not, hysteresis, dwell, probes; properties over random profiles and noise."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.model.records import LatencyProfile
from tided.policies.base import SpeculationDecision, SpeculationObservation, SpeculationPolicy
from tided.policies.speedup import Acceptance, monotone
from tided.policies.threshold import ThresholdPolicy, ThresholdState

# T(4)/T(1) about 1, T(40)/T(8) about 2.4; the small copy of the paper's regime (engines.md).
PROFILE = LatencyProfile(
    (1, 2, 4, 8, 16, 24, 40), (0.05, 0.05, 0.052, 0.06, 0.09, 0.12, 0.19), (1, 4, 8), (0.005, 0.006, 0.01)
)
POLICY = ThresholdPolicy()


def seen(alpha: float | None, **changes: object) -> SpeculationObservation:
    acceptance = Acceptance() if alpha is None else Acceptance.prior((alpha,) * 4, 1000.0)
    base = SpeculationObservation(
        now_s=0.0,
        version="v1",
        profile=PROFILE,
        acceptance=acceptance,
        trials=10,
        steps=100,
        running=1,
        max_batch=8,
        gamma_max=4,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def decide(*observations: SpeculationObservation, policy: ThresholdPolicy = POLICY) -> list[SpeculationDecision]:
    state, decisions = policy.start(), list[SpeculationDecision]()
    for observation in observations:
        state, decision = policy.decide(state, observation)
        decisions.append(decision)
    return decisions


def test_it_is_a_speculation_policy() -> None:
    policy: SpeculationPolicy[ThresholdState] = POLICY
    assert policy.start() == ThresholdState()


def test_a_good_draft_pays_at_batch_1_and_not_at_8() -> None:
    [decision] = decide(seen(0.6))
    assert decision.gammas[0] >= 2
    assert decision.gammas[7] == 0
    assert decision.choices[0].predicted > 1.5
    assert "predicted" in decision.reason


def test_a_useless_draft_is_off_everywhere() -> None:
    [decision] = decide(seen(0.05))
    assert decision.gammas == (0,) * 8
    assert "below" in decision.reason


def test_unknown_acceptance_or_no_draft_is_off() -> None:
    assert decide(seen(None))[0].gammas == (0,) * 8
    assert decide(seen(0.9, version=""))[0].gammas == (0,) * 8


def test_drift_turns_it_off_after_the_dwell_only() -> None:
    on, early, late = decide(seen(0.7), seen(0.05, steps=5), seen(0.05, steps=POLICY.dwell_steps))
    assert on.gammas[0] > 0
    assert early.gammas == on.gammas
    assert late.gammas == (0,) * 8


def test_a_new_version_is_judged_at_once() -> None:
    _, decision = decide(seen(0.05), seen(0.7, version="v2", steps=0))
    assert decision.gammas[0] > 0


def test_off_is_no_trap_it_probes_and_comes_back() -> None:
    quiet = {"trials": 0, "steps": 20}
    off, waiting, probing, still, over = decide(
        seen(0.05),
        seen(0.05, now_s=10.0, **quiet),
        seen(0.05, now_s=POLICY.probe_every_s + 0.1, **quiet),
        seen(0.05, now_s=21.0, trials=0, steps=1),  # nothing drafted yet: the probe is not over
        seen(0.05, now_s=22.0, trials=30, steps=POLICY.probe_steps),
    )
    assert [d.probing for d in (off, waiting, probing, still, over)] == [False, False, True, True, False]
    assert probing.gammas == (2, 2, 1, 1, 1, 1, 1, 1)
    assert over.gammas == (0,) * 8
    back = decide(seen(0.05), seen(0.8, now_s=30.0, trials=30, steps=100))[1]
    assert back.gammas[0] > 0


def test_probes_that_change_nothing_get_rarer_up_to_a_bound() -> None:
    state, gaps, last_s, probing = POLICY.start(), list[float](), 0.0, False
    for tenths in range(6000):
        now_s = tenths / 10
        drafted = {"trials": 30, "steps": POLICY.probe_steps} if probing else {"trials": 0, "steps": 10}
        state, decision = POLICY.decide(state, seen(0.05, now_s=now_s, **drafted))
        if decision.probing and not probing:
            gaps.append(now_s - last_s)
            last_s = now_s
        probing = decision.probing
    assert gaps[0] == pytest.approx(POLICY.probe_every_s, abs=0.3)
    assert gaps[1] == pytest.approx(2 * POLICY.probe_every_s, abs=0.3)
    assert all(gap == pytest.approx(4 * POLICY.probe_every_s, abs=0.3) for gap in gaps[2:])
    assert len(gaps) > 5


def test_an_idle_engine_is_not_probed_and_a_watched_one_sooner() -> None:
    idle = seen(0.05, now_s=100.0, trials=0, running=0)
    assert not decide(seen(0.05), idle)[1].probing
    soon = seen(0.05, now_s=POLICY.probe_every_s / 4 + 0.1, trials=0, eager=True)
    assert decide(seen(0.05), soon)[1].probing


def test_a_probe_never_lowers_what_was_chosen() -> None:
    on = seen(0.7, running=8)
    probing = decide(on, seen(0.7, running=8, trials=0, now_s=50.0))[1]
    assert probing.probing
    assert all(gamma >= choice.gamma for gamma, choice in zip(probing.gammas, probing.choices, strict=True))


profiles = st.builds(
    lambda base, slope, draft: monotone(
        LatencyProfile((1, 8, 40), (base, base + 7 * slope, base + 39 * slope), (1, 8), (draft, 2 * draft))
    ),
    st.floats(0.01, 0.1),
    st.floats(0.0, 0.01),
    st.floats(0.0005, 0.02),
)


@given(profiles, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_better_draft_never_drafts_less(profile: LatencyProfile, a: float, b: float) -> None:
    low, high = (decide(seen(alpha, profile=profile))[0].gammas for alpha in sorted((a, b)))
    assert all(x <= y for x, y in zip(low, high, strict=True))


@given(profiles, st.floats(0.0, 1.0), st.integers(0, 8), st.integers(1, 16), st.integers(0, 3))
def test_never_above_what_is_allowed(
    profile: LatencyProfile, alpha: float, gamma_max: int, max_batch: int, quiet: int
) -> None:
    observations = [
        seen(alpha, profile=profile, gamma_max=gamma_max, max_batch=max_batch, now_s=25.0 * i, trials=0)
        for i in range(1 + quiet)
    ]
    for decision in decide(*observations):
        assert len(decision.gammas) == max_batch
        assert all(0 <= gamma <= gamma_max for gamma in decision.gammas)


@given(profiles, st.floats(0.0, 1.0))
def test_what_is_on_is_predicted_to_pay(profile: LatencyProfile, alpha: float) -> None:
    [decision] = decide(seen(alpha, profile=profile))
    assert all(c.predicted > 1.0 + POLICY.margin for c in decision.choices if c.gamma)


@given(profiles, st.floats(0.0, 1.0), st.integers(0, 2**32))
def test_noise_within_the_hysteresis_does_not_flap(profile: LatencyProfile, alpha: float, seed: int) -> None:
    draw = random.Random(seed)
    noise = 0.002  # in alpha, at most 4 drafted tokens: below 2% of E[l], and so of the speedup
    state, changes, before = POLICY.start(), [0] * 8, None
    for _ in range(60):
        noisy = min(1.0, max(0.0, alpha + draw.uniform(-noise, noise)))
        state, decision = POLICY.decide(state, seen(noisy, profile=profile, steps=POLICY.dwell_steps))
        if before is not None:
            changes = [n + (x != y) for n, x, y in zip(changes, before, decision.gammas, strict=True)]
        before = decision.gammas
    assert max(changes) <= 1


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 200)), min_size=2, max_size=40))
def test_it_changes_at_most_once_in_a_dwell(series: list[tuple[float, int]]) -> None:
    state, since, before = POLICY.start(), 0, None
    for alpha, steps in series:
        state, decision = POLICY.decide(state, seen(alpha, steps=steps))
        since += steps
        if before is not None and decision.gammas != before:
            assert since >= POLICY.dwell_steps
            since = 0
        if before is None:
            since = 0
        before = decision.gammas
