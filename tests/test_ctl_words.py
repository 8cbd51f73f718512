from dataclasses import replace

import pytest

from tests.fake_plane import ENGINE, EVALUATION, JOB, WORKER, FakePlane
from tided.ctl import words
from tided.model.jobs import JobResult, JobState, Needs, Progress
from tided.model.launch import LaunchState
from tided.model.policy import PolicySetting, SpeculationMode
from tided.model.status import LaunchStatus


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (80, "1 min 20 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h"),
        (7384, "2 h 3 min"),
        (86400, "1 d"),
        (93600, "1 d 2 h"),
        (900_000, "10 d 10 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("gammas", "text"),
    [
        ((), "off"),
        ((0,), "off"),
        ((0, 0, 0), "off"),
        ((3,), "3 tokens at every batch size"),
        ((1, 1), "1 token at every batch size"),
        ((3, 3, 0), "3 tokens at batch 1-2, off above"),
        ((4, 3, 3, 1, 0, 0), "4 tokens at batch 1, 3 tokens at batch 2-3, 1 token at batch 4, off above"),
        ((0, 2), "off at batch 1, 2 tokens above"),
    ],
)
def test_gammas(gammas: tuple[int, ...], text: str) -> None:
    assert words.gammas(gammas) == text


def test_size() -> None:
    assert [words.size(n) for n in (0, 1023, 1024, 19_600_000, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "18.7 MiB",
        "5.0 TiB",
    ]


def test_speculation_says_what_and_how_much() -> None:
    text = "speculating with 3 tokens at batch 1-2, off above: predicted 1.31x at batch 1"
    assert words.speculation(ENGINE) == text
    off = replace(ENGINE, info=replace(ENGINE.info, gammas=(0, 0)))
    assert words.speculation(off) == "not speculating"


def test_a_schedule_that_promises_nothing_is_not_praised() -> None:
    fixed = replace(ENGINE, speculation=replace(ENGINE.speculation, predicted=(1.0,) * 8))
    assert words.speculation(fixed) == "speculating with 3 tokens at batch 1-2, off above"


def test_training_says_why_once() -> None:
    assert words.training(ENGINE.training) == "collecting, 12,000 of 20,000 rows; 1 drift, 2 trainings so far"
    assert words.training_reason(ENGINE.training) == "acceptance fell from 0.61 to 0.40"
    waiting = replace(ENGINE.training, reason="12000 of 20000 rows, waiting for more held-out requests")
    assert words.training_reason(waiting) == "waiting for more held-out requests"
    assert words.training_reason(replace(waiting, reason="12000 of 20000 rows")) == ""


def test_samples_show_the_sum_that_must_hold() -> None:
    text = "1,000 tapped = 900 stored + 50 shed + 0 lost + 50 in flight (12 opted out)"
    assert words.samples(ENGINE.samples) == text
    killed = replace(ENGINE.samples, stored=890, unknown=10, skipped=0, duplicated=3)
    text = "1,000 tapped = 890 stored + 50 shed + 0 lost + 10 unknown + 50 in flight (3 duplicated)"
    assert words.samples(killed) == text


def test_policy() -> None:
    assert words.policy(PolicySetting()) == "auto"
    assert words.policy(PolicySetting(SpeculationMode.OFF)) == "off (set by an operator)"
    assert words.policy(PolicySetting(SpeculationMode.FIXED, 2)) == "gamma=2 (set by an operator)"


def test_job_progress_in_every_state() -> None:
    done = JobResult(incumbent=replace(EVALUATION, lengths=(1.5, 1.5)), candidate=EVALUATION)
    cases = {
        "waiting for a worker": replace(JOB, state=JobState.QUEUED, attempt=0),
        "waiting for attempt 2": replace(JOB, state=JobState.QUEUED, attempt=1),
        "43%, 1 min 20 s left: step 120 of 280 (loss 2.31, length 1.92, 1,240 tokens/s)": JOB,
        "43%: evaluating": replace(JOB, progress=Progress(0.43, "evaluating")),
        "started": replace(JOB, progress=None),
        "being cancelled": replace(JOB, cancelling=True),
        "the trainer ended with status 1": replace(JOB, state=JobState.FAILED, error="the trainer ended with status 1"),
        "acceptance length 1.50 -> 2.25": replace(JOB, state=JobState.SUCCEEDED, result=done),
        "": replace(JOB, state=JobState.CANCELLED),
    }
    assert {words.job_progress(job) for job in cases.values()} == set(cases)


async def test_headline_of_a_leader_a_standby_and_a_degraded_one() -> None:
    status = await FakePlane().status()
    assert words.headline(status) == "tided 0.1.0 leads (epoch 1700000000000), up 2 h 3 min, Redis connected"
    standby = replace(status, leader=False)
    assert words.headline(standby) == "tided 0.1.0 stands by, another one leads, up 2 h 3 min, Redis connected"
    degraded = replace(standby, redis="Redis cannot be reached")
    assert words.headline(degraded) == "tided 0.1.0 is degraded, up 2 h 3 min: Redis cannot be reached"


def test_what_a_worker_does_and_what_a_job_needs() -> None:
    assert words.doing(replace(WORKER, job="")) == "idle"
    assert words.doing(replace(WORKER, cordoned=True)) == f"{WORKER.job}, cordoned"
    assert words.doing(replace(WORKER, job="", cordoned=True, draining=True)) == "draining"
    assert words.needs(Needs()) == ""
    assert words.needs(Needs("cuda")) == "cuda"
    assert words.needs(Needs("", 2, 1 << 30)) == "2 x any device, 1.0 GiB each"


def test_a_launch_with_and_without_a_reason() -> None:
    assert words.launch(LaunchStatus("launched-1.4", LaunchState.RUNNING, "")) == "launched-1.4: running"
    assert words.launch(LaunchStatus("launched-1.4", LaunchState.PENDING, "no GPU")) == "launched-1.4: pending: no GPU"
