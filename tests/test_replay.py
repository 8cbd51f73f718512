"""Replay: traces at rest and generated, virtual time by hand, what drivers are told, and who knows the future."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tided.config import SpeculationConfig
from tided.model.engines import LatencyProfile
from tided.model.errors import Refused
from tided.policies.base import SpeculationDecision, SpeculationObservation
from tided.policies.speedup import steps_s
from tided.replay.baselines import BASELINES, Clairvoyant, always, windows
from tided.replay.compare import compare, driver_named
from tided.replay.drivers import APPLY_S, REPORT_S, Tided
from tided.replay.generate import KINDS, generate
from tided.replay.simulate import run, worst_window
from tided.replay.trace import SUFFIX, Header, Trace, load, save

PROFILE = LatencyProfile((1, 6, 8), (0.125, 0.125, 0.25), (1, 2), (0.0625, 0.0625))  # exact in binary
CONFIG = SpeculationConfig()


def small(prefixes: list[list[int]], at_s: list[float], duration_s: float = 1.0, **header: object) -> Trace:
    """A trace of steps that took exactly what the profile says; `prefixes` by step and request."""
    base = Header("small", "", PROFILE, gamma_max=2, max_batch=2, duration_s=duration_s, switch_s=0.0)
    return Trace(
        replace(base, **header),  # pyright: ignore[reportArgumentType]
        np.asarray(at_s),
        np.asarray([len(step) for step in prefixes], np.int32),
        np.ones(len(at_s), np.float32),
        np.asarray([right for step in prefixes for right in step], np.uint8),
    )


def test_a_prefix_says_what_every_smaller_gamma_accepts() -> None:
    trace = small([[0, 2], [1]], [0.0, 0.5])
    assert trace.histograms.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert trace.emitted.tolist() == [[2, 3, 4], [1, 2, 2]]


@pytest.mark.parametrize("kind", ["bursty", "slow-misprofiled"])
def test_a_trace_survives_the_disk(kind: str, tmp_path: Path) -> None:
    trace = generate(kind, 3, 20.0)
    save(trace, tmp_path / f"x{SUFFIX}")
    again = load(tmp_path / f"x{SUFFIX}")
    assert again.header == trace.header
    assert run(again, always(again, 2, "x")).tokens == run(trace, always(trace, 2, "x")).tokens


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"no trace")
    with pytest.raises(Refused, match="no trace can be read"):
        load(path)
    with pytest.raises(Refused, match="no trace can be read"):
        load(tmp_path / "none")
    with pytest.raises(Refused, match="batch sizes"):
        small([[0, 0, 0]], [0.0])
    with pytest.raises(Refused, match="at_s must ascend"):
        small([[0], [0]], [0.5, 0.1])
    with pytest.raises(Refused, match="prefix must have"):
        small([[3]], [0.0])


def test_virtual_time_by_hand() -> None:
    # At gamma 0 a step takes 1/8 s: eight steps in the second, the two of the trace in turn. At gamma 2 it takes 1/8 + 2/16.
    trace = small([[2], [0]], [0.0, 0.5])
    off, on = run(trace, always(trace, 0, "off")), run(trace, always(trace, 2, "on"))
    assert (off.tokens, off.served_s) == (8, 1.0)
    assert (on.tokens, on.served_s) == (3 + 1 + 3 + 1, 1.0)
    assert worst_window(on, off) == 1.0


def test_a_driver_meets_the_traffic_of_its_time_however_slow_it_is() -> None:
    # One second in which everything is right, an idle one, one in which nothing is.
    trace = small([[2], [2], [0]], [0.0, 0.9, 2.0], 3.0)
    on = run(trace, always(trace, 2, "on"))
    assert on.per_bin.tolist() == [12, 0, 4]
    assert on.served_s == 2.0


def test_changes_cost_what_the_trace_says() -> None:
    trace = small([[2], [0]], [0.0, 0.5], 20.0, switch_s=0.05)
    free, dear = (run(t, Clairvoyant.of(t)) for t in (replace_header(trace, switch_s=0.0), trace))
    assert free.switches >= dear.switches


def replace_header(trace: Trace, **changes: object) -> Trace:
    header = replace(trace.header, **changes)  # pyright: ignore[reportArgumentType]
    return Trace(header, trace.at_s, trace.batch, trace.residual, trace.prefix)


class Recorder:
    """Wants one token always, and keeps what it was told."""

    def __init__(self) -> None:
        self.seen: list[SpeculationObservation] = []

    def start(self) -> None:
        return None

    def decide(self, state: None, seen: SpeculationObservation) -> tuple[None, SpeculationDecision]:
        self.seen.append(seen)
        return None, SpeculationDecision((1,) * seen.max_batch, (), None, False, "")


def test_a_policy_is_told_what_the_daemon_would_tell_it_and_obeyed_a_moment_later() -> None:
    trace = small([[2], [0]], [0.0, 0.5], 2.0)
    policy = Recorder()
    made = run(trace, Tided("x", (0, 0), policy=policy, trace=trace))
    assert [seen.now_s for seen in policy.seen] == pytest.approx([i * REPORT_S for i in range(len(policy.seen))])
    measured = [counts for seen in policy.seen for counts in seen.measured]
    idle = sum(counts.steps for counts in measured if counts.gamma == 0)
    assert idle == 2  # 0.25 s of steps of 1/8 s: the first decision was made before the first step
    assert made.switches == 1
    first = policy.seen[1]
    assert first.running == 1
    assert sum(counts.seconds for counts in first.measured) == pytest.approx(0.5, abs=0.13)
    drafted = [counts for counts in measured if counts.gamma == 1]
    assert all(len(counts.accepted) == 2 and sum(counts.accepted) == counts.steps for counts in drafted)
    assert policy.seen[-1].acceptance.alpha == pytest.approx(0.5, abs=0.1)
    assert APPLY_S < REPORT_S


def test_a_wrong_profile_is_what_the_policy_is_told_and_not_what_steps_take() -> None:
    told = replace(PROFILE, target_s=(0.1, 0.1, 0.1))
    trace, policy = small([[2, 2]], [0.0], told=told), Recorder()
    run(trace, Tided("x", (0, 0), policy=policy, trace=trace))
    assert policy.seen[0].profile == told


def test_the_same_seed_gives_the_same_trace() -> None:
    first, again, other = generate("recurring", 1, 30.0), generate("recurring", 1, 30.0), generate("recurring", 2, 30.0)
    assert np.array_equal(first.prefix, again.prefix)
    assert not np.array_equal(first.prefix[:1000], other.prefix[:1000])
    with pytest.raises(Refused, match="there are stationary"):
        generate("weekly")


def test_generated_acceptance_is_what_it_says() -> None:
    [found] = windows(generate("stationary", 0, 300.0), 300.0)
    assert found.hits[0] / found.trials[0] == pytest.approx(0.6, abs=0.02)
    shares = [window.hits[0] / window.trials[0] for window in windows(generate("recurring", 0, 600.0), 20.0)]
    good, bad = [share for share in shares if share > 0.55], [share for share in shares if share < 0.25]
    assert sum(good) / len(good) == pytest.approx(0.7, abs=0.04)
    assert sum(bad) / len(bad) == pytest.approx(0.1, abs=0.04)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000))
def test_nobody_beats_the_clairvoyant(kind: str, seed: int) -> None:
    """By more than the half per cent that it may lose at the edges of its windows."""
    trace = generate(kind, seed, 40.0)
    found = compare(trace, ["always-off", "always-on", "fixed", "static", "ema-steps", "threshold"], CONFIG)
    for result in found.results:
        assert result.regret > -0.005, (result.driver, result.regret)
    assert found.of("always-off").over_none == 1.0


def test_every_driver_has_its_name_and_a_stranger_is_refused() -> None:
    trace = generate("slow-bursty", 0, 10.0)
    assert [driver_named(name, trace, CONFIG).name for name in (*BASELINES, "threshold")] == [*BASELINES, "threshold"]
    with pytest.raises(Refused, match="did you mean 'threshold'"):
        driver_named("treshold", trace, CONFIG)


def test_the_comparison_is_of_equal_time() -> None:
    found = compare(generate("slow-diurnal", 0, 90.0), ["always-off", "static"], CONFIG, slices=9)
    off = found.of("always-off")
    assert len(off.timeline) == 9
    assert sum(off.timeline) / 9 == pytest.approx(off.tokens_per_s, rel=0.02)
    assert off.timeline[4] > 2 * off.timeline[0]


def test_a_step_costs_a_draft_forward_where_the_draft_does_not_rest() -> None:
    trace = small([[0]], [0.0], profile=replace(PROFILE, idle_drafts=1.0))
    assert run(trace, always(trace, 0, "off")).tokens == 6  # steps of 3/16 s
    assert steps_s(trace.header.profile, 1, 1)[0] == (0.1875, 0.1875)
