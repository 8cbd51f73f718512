"""The rules of a job: the whole state x event table, random histories, and the Lua scripts against the same histories."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.conftest import Valkey
from tided.machine.job import (
    AttemptFailed,
    CancelRequested,
    Claimed,
    Dequeue,
    Enqueue,
    Finished,
    JobEvent,
    JobLife,
    Reaped,
    Reject,
    Released,
    Renewed,
    Tell,
    Verdict,
    backoff_ms,
    step,
    validate_state,
)
from tided.machine.placement import queue_of
from tided.model.errors import Conflict, InvariantBroken
from tided.model.jobs import Job, JobKind, JobResult, JobSpec, JobState
from tided.store.client import connect
from tided.store.jobs import Claim, JobStore
from tided.wire import keys

NOW, LEASE = 1_000_000, 10_000
S = JobState

QUEUED = JobLife(S.QUEUED)
WAITING = JobLife(S.QUEUED, attempt=1, not_before_ms=NOW + 1, error="x")
RUNNING = JobLife(S.RUNNING, attempt=1, lease_until_ms=NOW + 1, worker="w1")
EXPIRED = replace(RUNNING, lease_until_ms=NOW)
LAST = replace(RUNNING, attempt=3)
LAST_EXPIRED = replace(EXPIRED, attempt=3)
CANCELLING = replace(RUNNING, cancelling=True)
CANCELLING_EXPIRED = replace(EXPIRED, cancelling=True)
SUCCEEDED = JobLife(S.SUCCEEDED, attempt=1, worker="w1", result="r")
FAILED = JobLife(S.FAILED, attempt=1, worker="w1", error="x")
CANCELLED = JobLife(S.CANCELLED, attempt=1, worker="w1")
STATES = {
    "queued": QUEUED,
    "waiting": WAITING,
    "running": RUNNING,
    "expired": EXPIRED,
    "last": LAST,
    "last-expired": LAST_EXPIRED,
    "cancelling": CANCELLING,
    "cancelling-expired": CANCELLING_EXPIRED,
    "succeeded": SUCCEEDED,
    "failed": FAILED,
    "cancelled": CANCELLED,
}


def events(life: JobLife) -> dict[str, JobEvent]:
    """Every event, from the newest attempt and from an older one."""
    attempt = life.attempt
    return {
        "claimed": Claimed(NOW, "w2", LEASE),
        "renewed": Renewed(NOW, attempt, LEASE),
        "renewed-old": Renewed(NOW, attempt - 1, LEASE),
        "finished": Finished(NOW, attempt, "r"),
        "finished-other": Finished(NOW, attempt, "other"),
        "finished-old": Finished(NOW, attempt - 1, "r"),
        "failed": AttemptFailed(NOW, attempt, "e", retryable=True),
        "failed-for-good": AttemptFailed(NOW, attempt, "e", retryable=False),
        "failed-old": AttemptFailed(NOW, attempt - 1, "e", retryable=True),
        "released": Released(NOW, attempt),
        "released-old": Released(NOW, attempt - 1),
        "cancel": CancelRequested(NOW),
        "reaped": Reaped(NOW),
    }


# What changes something or is answered by more than a rejection; every other pair must be rejected and change nothing.
CLAIMED = replace(QUEUED, state=S.RUNNING, attempt=1, lease_until_ms=NOW + LEASE, worker="w2")
RETRIED = JobLife(S.QUEUED, attempt=1, not_before_ms=NOW + 2_000, error="e")
DEAD = "worker w1 stopped renewing its lease (died, hung or cut off)"
END = JobLife(S.CANCELLED, attempt=1, worker="w1")
BACK = JobLife(S.QUEUED, attempt=1, max_attempts=4, not_before_ms=NOW)
TABLE: dict[tuple[str, str], tuple[JobLife, tuple[Any, ...]]] = {
    ("queued", "claimed"): (CLAIMED, (Dequeue(),)),
    ("queued", "cancel"): (JobLife(S.CANCELLED), (Dequeue(),)),
    ("waiting", "cancel"): (replace(WAITING, state=S.CANCELLED), (Dequeue(),)),
    ("running", "renewed"): (replace(RUNNING, lease_until_ms=NOW + LEASE), (Tell(Verdict.GO_ON),)),
    ("running", "finished"): (SUCCEEDED, ()),
    ("running", "finished-other"): (replace(SUCCEEDED, result="other"), ()),
    ("running", "failed"): (RETRIED, (Enqueue(NOW + 2_000),)),
    ("running", "failed-for-good"): (replace(FAILED, error="e"), ()),
    ("running", "released"): (BACK, (Enqueue(NOW),)),
    ("running", "cancel"): (CANCELLING, ()),
    ("expired", "cancel"): (CANCELLING_EXPIRED, ()),
    ("expired", "reaped"): (replace(RETRIED, error=DEAD), (Enqueue(NOW + 2_000),)),
    ("last", "renewed"): (replace(LAST, lease_until_ms=NOW + LEASE), (Tell(Verdict.GO_ON),)),
    ("last", "finished"): (replace(SUCCEEDED, attempt=3), ()),
    ("last", "finished-other"): (replace(SUCCEEDED, attempt=3, result="other"), ()),
    ("last", "failed"): (replace(FAILED, attempt=3, error="e"), ()),
    ("last", "failed-for-good"): (replace(FAILED, attempt=3, error="e"), ()),
    ("last", "released"): (replace(BACK, attempt=3), (Enqueue(NOW),)),
    ("last", "cancel"): (replace(LAST, cancelling=True), ()),
    ("last-expired", "cancel"): (replace(LAST_EXPIRED, cancelling=True), ()),
    ("last-expired", "reaped"): (replace(FAILED, attempt=3, error=DEAD), ()),
    ("cancelling", "renewed"): (CANCELLING, (Tell(Verdict.CANCEL),)),
    ("cancelling", "finished"): (END, (Reject("the job was cancelled"),)),
    ("cancelling", "finished-other"): (END, (Reject("the job was cancelled"),)),
    ("cancelling", "failed"): (END, ()),
    ("cancelling", "failed-for-good"): (END, ()),
    ("cancelling", "released"): (END, ()),
    ("cancelling", "cancel"): (CANCELLING, ()),
    ("cancelling-expired", "cancel"): (CANCELLING_EXPIRED, ()),
    ("cancelling-expired", "reaped"): (END, ()),
    ("succeeded", "finished"): (SUCCEEDED, ()),
    ("cancelled", "cancel"): (CANCELLED, ()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", events(QUEUED))
def test_the_whole_table(state: str, event: str) -> None:
    life = STATES[state]
    validate_state(life)
    after, actions = step(life, events(life)[event])
    validate_state(after)
    if (state, event) in TABLE:
        assert (after, actions) == TABLE[state, event]
    else:
        assert after == life
        expected = Tell(Verdict.LOST) if event.startswith("renewed") else Reject
        assert len(actions) == 1
        assert actions[0] == expected or isinstance(actions[0], Reject)


def test_pauses_double_up_to_five_minutes() -> None:
    assert [backoff_ms(n) for n in (1, 2, 3, 8, 9, 1000)] == [2_000, 4_000, 8_000, 256_000, 300_000, 300_000]


@pytest.mark.parametrize(
    "life",
    [
        replace(RUNNING, worker=""),
        replace(QUEUED, attempt=3),
        replace(QUEUED, lease_until_ms=1),
        replace(SUCCEEDED, result=""),
        replace(FAILED, error=""),
        replace(QUEUED, result="r"),
        replace(LAST, attempt=4),
    ],
)
def test_impossible_states_are_recognised(life: JobLife) -> None:
    with pytest.raises(InvariantBroken):
        validate_state(life)


# --- the scripts follow the machine ---

SPEC = JobSpec(JobKind.TRAIN, "engine-a", "0" * 64, "/target")
QUEUE = keys.queue(queue_of(0, JobKind.TRAIN, SPEC.needs))
RESULTS = {"a": JobResult(staged="/a"), "b": JobResult(staged="/b")}


def life_of(job: Job) -> JobLife:
    result = next((name for name, value in RESULTS.items() if value == job.result), "")
    return JobLife(
        job.state,
        job.attempt,
        job.max_attempts,
        job.not_before_ms,
        job.lease_until_ms,
        job.worker,
        job.cancelling,
        result,
        job.error,
    )


class ScriptsFollowTheMachine(RuleBasedStateMachine):
    """One job in Valkey and one in the machine, under the same events. The server's times may be later by as much as a call took."""

    valkey: Valkey
    lease_ms = 600_000

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.valkey.client.flushall()
        self.redis = connect(self.valkey.url)
        self.store = JobStore(self.redis, self.lease_ms / 1000, keep_s=3600)
        self.job = self.runner.run(self.store.submit(SPEC, epoch=1, max_attempts=3))
        self.life = life_of(self.job)
        self.took_ms = 0
        self.told = False  # that it has failed for good

    def teardown(self) -> None:
        self.runner.run(self.redis.aclose())
        self.runner.close()

    @property
    def now_ms(self) -> int:
        seconds, micros = self.valkey.client.time()  # type: ignore[misc]
        return seconds * 1000 + micros // 1000

    def call(self, call: Any, event: JobEvent) -> Any:
        """Do it in both; a Conflict from the store must be a rejection by the machine, and the other way round."""
        self.life, actions = step(self.life, event)
        rejected = any(isinstance(action, Reject) for action in actions)
        try:
            answer = self.runner.run(call)
        except Conflict:
            assert rejected
            return None
        finally:
            self.took_ms = self.now_ms - event.now_ms
        if not isinstance(event, Claimed | Reaped):
            assert not rejected
        told = [action.verdict for action in actions if isinstance(action, Tell)]
        assert not told or told == [answer]
        return answer

    def held(self, attempt: int) -> Claim:
        return Claim(self.job, attempt)

    def attempt(self, old: bool) -> int:
        return self.life.attempt - int(old)

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def claim(self, worker: str) -> None:
        due = self.life.state is S.QUEUED and self.life.not_before_ms <= self.now_ms
        claim = self.call(self.store.claim(worker, [JobKind.TRAIN]), Claimed(self.now_ms, worker, self.lease_ms))
        assert (claim is not None) == due

    @rule(old=st.booleans())
    def renew(self, old: bool) -> None:
        attempt = self.attempt(old)
        self.call(self.store.renew(self.held(attempt)), Renewed(self.now_ms, attempt, self.lease_ms))

    @rule(old=st.booleans(), result=st.sampled_from(["a", "b"]))
    def finish(self, old: bool, result: str) -> None:
        attempt = self.attempt(old)
        self.call(self.store.finish(self.held(attempt), RESULTS[result]), Finished(self.now_ms, attempt, result))

    @rule(old=st.booleans(), retryable=st.booleans())
    def fail(self, old: bool, retryable: bool) -> None:
        attempt = self.attempt(old)
        self.call(
            self.store.fail(self.held(attempt), "e", retryable), AttemptFailed(self.now_ms, attempt, "e", retryable)
        )

    @rule(old=st.booleans())
    def release(self, old: bool) -> None:
        attempt = self.attempt(old)
        self.call(self.store.release(self.held(attempt)), Released(self.now_ms, attempt))

    @rule()
    def cancel(self) -> None:
        self.call(self.store.cancel(self.job.id, epoch=1), CancelRequested(self.now_ms))

    @rule()
    def reap(self) -> None:
        expired = self.life.state is S.RUNNING and self.life.lease_until_ms <= self.now_ms
        reaped = self.call(self.store.reap(epoch=1), Reaped(self.now_ms))
        told = self.life.state is S.FAILED and not self.told
        self.told = self.life.state is S.FAILED
        assert [job.id for job in reaped] == ([self.job.id] if expired or told else [])

    @precondition(lambda self: self.life.state is S.RUNNING)
    @rule()
    def lease_runs_out(self) -> None:
        self.life = replace(self.life, lease_until_ms=1)
        self.valkey.client.hset(keys.job(self.job.id), "lease_until_ms", 1)
        self.valkey.client.zadd(keys.running(), {self.job.id: 1})

    @precondition(lambda self: self.life.state is S.QUEUED)
    @rule()
    def pause_passes(self) -> None:
        self.life = replace(self.life, not_before_ms=1)
        self.valkey.client.hset(keys.job(self.job.id), "not_before_ms", 1)
        self.valkey.client.zadd(QUEUE, {self.job.id: 1})

    @invariant()
    def both_agree(self) -> None:
        stored = self.runner.run(self.store.get(self.job.id))
        assert stored is not None
        found = life_of(stored)
        for time_ms, expected_ms in (
            (found.not_before_ms, self.life.not_before_ms),
            (found.lease_until_ms, self.life.lease_until_ms),
        ):
            assert 0 <= time_ms - expected_ms <= self.took_ms
        self.life = replace(self.life, not_before_ms=found.not_before_ms, lease_until_ms=found.lease_until_ms)
        assert found == self.life
        validate_state(found)
        queued = self.valkey.client.zscore(QUEUE, self.job.id)
        running = self.valkey.client.zscore(keys.running(), self.job.id)
        assert queued == (found.not_before_ms if found.state is S.QUEUED else None)
        assert running == (found.lease_until_ms if found.state is S.RUNNING else None)


@pytest.mark.real
def test_the_scripts_follow_the_machine(valkey: Valkey) -> None:
    ScriptsFollowTheMachine.valkey = valkey
    run_state_machine_as_test(
        ScriptsFollowTheMachine,
        settings=settings(
            max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
