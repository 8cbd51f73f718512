"""Jobs in a real Valkey: each promise of `JobStore`, one test."""

from collections.abc import AsyncIterator

import pytest

from tests.conftest import Valkey
from tests.support import eventually
from tided.machine.job import Verdict
from tided.model.errors import Conflict, Refused, Superseded
from tided.model.records import Evaluation, JobKind, JobResult, JobSpec, JobState, Progress
from tided.store.client import connect
from tided.store.jobs import Claim, JobStore, TooLarge
from tided.wire import keys

pytestmark = pytest.mark.real

TRAIN = JobSpec(JobKind.TRAIN, "engine-a", "0" * 64, "/models/target", shards=("/shards/a",), options={"lr": 1e-3})
SCORE = JobSpec(JobKind.SCORE, "engine-a", "0" * 64, "/models/target")
RESULT = JobResult(
    staged="/staged/x",
    version="1" * 64,
    candidate=Evaluation("1" * 64, 3, ("ab",), (2.5,), (100,), (0.8, 0.7, 0.6)),
    trained_tokens=1000,
    metrics={"loss": 1.5},
)


@pytest.fixture
async def jobs(valkey: Valkey) -> AsyncIterator[JobStore]:
    client = connect(valkey.url)
    yield JobStore(client, lease_s=300, keep_s=600)
    await client.aclose()


def age(valkey: Valkey, job_id: str) -> None:
    """Let time pass for one job: what it waited for is over, and so is its lease."""
    job = keys.job(job_id)
    kind = valkey.client.hget(job, "kind")
    assert isinstance(kind, bytes)
    if valkey.client.hget(job, "state") == b"queued":
        valkey.client.hset(job, "not_before_ms", 1)
        valkey.client.zadd(keys.queue(kind.decode()), {job_id: 1})
    elif valkey.client.hget(job, "state") == b"running":
        valkey.client.hset(job, "lease_until_ms", 1)
        valkey.client.zadd(keys.running(), {job_id: 1})


def hold_back(valkey: Valkey, job_id: str) -> None:
    """Make what a queued job waits for an hour longer, so that a slow machine cannot wait it out."""
    later_ms = int(valkey.client.hget(keys.job(job_id), "not_before_ms") or 0) + 3_600_000  # pyright: ignore
    valkey.client.hset(keys.job(job_id), "not_before_ms", later_ms)
    assert valkey.client.zadd(keys.queue("train"), {job_id: later_ms}, xx=True, ch=True) == 1


async def claimed(jobs: JobStore, worker: str = "w1") -> Claim:
    claim = await jobs.claim(worker, [JobKind.TRAIN])
    assert claim is not None
    return claim


async def test_a_job_goes_from_submission_to_its_result(jobs: JobStore) -> None:
    submitted = await jobs.submit(TRAIN, epoch=7)
    assert (submitted.state, submitted.spec, submitted.epoch) == (JobState.QUEUED, TRAIN, 7)
    claim = await claimed(jobs)
    assert claim.job.worker == "w1"
    assert claim.attempt == 1
    assert await jobs.renew(claim, Progress(0.5, "half", loss=1.0)) is Verdict.GO_ON
    await jobs.finish(claim, RESULT)
    job = await jobs.get(submitted.id)
    assert job is not None
    assert (job.state, job.result, job.progress) == (JobState.SUCCEEDED, RESULT, Progress(0.5, "half", loss=1.0))
    assert job.finished_ms >= job.started_ms >= job.created_ms > 0


async def test_a_job_is_claimed_once_and_only_for_its_kind(jobs: JobStore) -> None:
    await jobs.submit(TRAIN, epoch=1)
    assert await jobs.claim("w1", [JobKind.SCORE]) is None
    assert await jobs.claim("w1", [JobKind.SCORE, JobKind.TRAIN]) is not None
    assert await jobs.claim("w2", [JobKind.TRAIN]) is None


async def test_jobs_of_a_kind_are_claimed_in_the_order_of_submission(jobs: JobStore) -> None:
    ids = [(await jobs.submit(TRAIN, epoch=1, job_id=f"job-{i}")).id for i in range(5)]
    assert [(await claimed(jobs)).job.id for _ in ids] == ids


async def test_submitting_the_same_id_again_changes_nothing(jobs: JobStore) -> None:
    first = await jobs.submit(TRAIN, epoch=1, job_id="job-1")
    claim = await claimed(jobs)
    again = await jobs.submit(SCORE, epoch=2, job_id="job-1")
    assert (again.id, again.spec, again.epoch, again.state) == (first.id, TRAIN, 1, JobState.RUNNING)
    assert again.attempt == claim.attempt


async def test_a_retryable_failure_waits_then_runs_again_until_the_attempts_are_used_up(
    jobs: JobStore, valkey: Valkey
) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1, max_attempts=2)).id
    claim = await claimed(jobs)
    await jobs.fail(claim, "out of memory", retryable=True)
    job = await jobs.get(job_id)
    assert job is not None
    assert (job.state, job.error, job.worker) == (JobState.QUEUED, "out of memory", "")
    assert job.not_before_ms > job.created_ms + 1000
    hold_back(valkey, job_id)
    assert await jobs.claim("w1", [JobKind.TRAIN]) is None
    age(valkey, job_id)
    await jobs.fail(await claimed(jobs), "again", retryable=True)
    job = await jobs.get(job_id)
    assert job is not None
    assert (job.state, job.attempt, job.error) == (JobState.FAILED, 2, "again")


async def test_a_failure_that_is_not_retryable_ends_the_job(jobs: JobStore) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    await jobs.fail(await claimed(jobs), "bad shard", retryable=False)
    job = await jobs.get(job_id)
    assert job is not None
    assert (job.state, job.attempt) == (JobState.FAILED, 1)


async def test_a_late_finisher_is_refused_and_the_newer_attempt_counts(jobs: JobStore, valkey: Valkey) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    late = await claimed(jobs, "slow")
    age(valkey, job_id)
    (reaped,) = await jobs.reap(epoch=1)
    assert reaped.state is JobState.QUEUED
    assert "slow" in reaped.error
    age(valkey, job_id)
    newer = await claimed(jobs, "fast")
    assert await jobs.renew(late) is Verdict.LOST
    with pytest.raises(Conflict, match="no longer holds"):
        await jobs.finish(late, JobResult(staged="/late"))
    with pytest.raises(Conflict):
        await jobs.fail(late, "x", retryable=True)
    await jobs.finish(newer, RESULT)
    with pytest.raises(Conflict):
        await jobs.finish(late, JobResult(staged="/late"))
    job = await jobs.get(job_id)
    assert job is not None
    assert job.result == RESULT


async def test_an_expired_lease_is_lost_even_before_anybody_reaps_it(jobs: JobStore, valkey: Valkey) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    claim = await claimed(jobs)
    age(valkey, job_id)
    assert await jobs.renew(claim) is Verdict.LOST
    with pytest.raises(Conflict):
        await jobs.finish(claim, RESULT)


async def test_a_lease_ends_by_itself_in_real_time(valkey: Valkey) -> None:
    async with connect(valkey.url) as client:
        await _outlive_a_lease(JobStore(client, lease_s=0.2, keep_s=600))


async def _outlive_a_lease(jobs: JobStore) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    claim = await claimed(jobs)

    async def reaped() -> list[str]:
        return [job.id for job in await jobs.reap(epoch=1)]

    assert await eventually(reaped) == [job_id]
    assert await jobs.renew(claim) is Verdict.LOST


async def test_a_lost_acknowledgement_is_made_good_by_saying_it_again(jobs: JobStore) -> None:
    await jobs.submit(TRAIN, epoch=1)
    claim = await claimed(jobs)
    await jobs.finish(claim, RESULT)
    await jobs.finish(claim, RESULT)
    with pytest.raises(Conflict):
        await jobs.finish(claim, JobResult(staged="/another"))


async def test_cancelling_a_queued_job_takes_it_from_the_queue(jobs: JobStore) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    assert (await jobs.cancel(job_id, epoch=1)).state is JobState.CANCELLED
    assert await jobs.claim("w1", [JobKind.TRAIN]) is None
    assert (await jobs.cancel(job_id, epoch=1)).state is JobState.CANCELLED


async def test_no_result_is_taken_after_a_cancellation(jobs: JobStore) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    claim = await claimed(jobs)
    job = await jobs.cancel(job_id, epoch=1)
    assert (job.state, job.cancelling) == (JobState.RUNNING, True)
    assert await jobs.renew(claim) is Verdict.CANCEL
    with pytest.raises(Conflict, match="cancelled"):
        await jobs.finish(claim, RESULT)
    job = await jobs.get(job_id)
    assert job is not None
    assert (job.state, job.result, job.cancelling) == (JobState.CANCELLED, None, False)


async def test_a_cancelled_attempt_that_dies_is_not_run_again(jobs: JobStore, valkey: Valkey) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    await claimed(jobs)
    await jobs.cancel(job_id, epoch=1)
    age(valkey, job_id)
    assert [job.state for job in await jobs.reap(epoch=1)] == [JobState.CANCELLED]


async def test_cancelling_what_has_ended_or_never_was_says_so(jobs: JobStore) -> None:
    await jobs.submit(TRAIN, epoch=1)
    claim = await claimed(jobs)
    await jobs.finish(claim, RESULT)
    with pytest.raises(Conflict, match="already succeeded"):
        await jobs.cancel(claim.job.id, epoch=1)
    with pytest.raises(Refused, match="no job"):
        await jobs.cancel("job-none", epoch=1)


async def test_a_released_attempt_is_not_held_against_the_job(jobs: JobStore) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1, max_attempts=1)).id
    first = await claimed(jobs)
    await jobs.release(first)
    second = await claimed(jobs, "w2")
    assert second.job.id == job_id
    assert second.attempt == 2
    with pytest.raises(Conflict):
        await jobs.release(first)
    await jobs.finish(second, RESULT)


async def test_a_superseded_leader_submits_cancels_and_reaps_nothing(jobs: JobStore, valkey: Valkey) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=5)).id
    await claimed(jobs)
    age(valkey, job_id)
    valkey.client.set(keys.epoch(), 6)
    for call in (jobs.submit(TRAIN, epoch=5), jobs.cancel(job_id, epoch=5), jobs.reap(epoch=5)):
        with pytest.raises(Superseded, match="newer leader"):
            await call
    assert [job.id for job in await jobs.list()] == [job_id]
    job = await jobs.get(job_id)
    assert job is not None
    assert (job.state, job.cancelling) == (JobState.RUNNING, False)
    assert [job.id for job in await jobs.reap(epoch=6)] == [job_id]


async def test_listing_is_newest_first_by_state_and_limited(jobs: JobStore) -> None:
    ids = [(await jobs.submit(TRAIN, epoch=1, job_id=f"job-{i}")).id for i in range(4)]
    await jobs.cancel(ids[1], epoch=1)
    assert {job.id for job in await jobs.list()} == set(ids)
    assert [job.id for job in await jobs.list(states=[JobState.CANCELLED])] == [ids[1]]
    assert len(await jobs.list(limit=2)) == 2


async def test_forgotten_jobs_leave_the_index_the_queue_and_the_running_set(jobs: JobStore, valkey: Valkey) -> None:
    queued = (await jobs.submit(TRAIN, epoch=1, job_id="job-a")).id
    running = (await claimed(jobs)).job.id
    queued = (await jobs.submit(TRAIN, epoch=1, job_id="job-b")).id
    age(valkey, running)
    valkey.client.delete(keys.job(queued), keys.job(running))
    assert await jobs.reap(epoch=1) == []
    assert await jobs.claim("w1", [JobKind.TRAIN]) is None
    assert list(valkey.client.scan_iter()) == []


async def test_every_key_of_a_job_has_a_ttl_in_every_state(jobs: JobStore, valkey: Valkey) -> None:
    def bounded() -> bool:
        return all(0 < valkey.client.pttl(key) <= 600_000 for key in valkey.client.scan_iter())  # type: ignore[operator]

    await jobs.submit(TRAIN, epoch=1)
    assert bounded()
    claim = await claimed(jobs)
    assert bounded()
    await jobs.renew(claim, Progress(0.1, ""))
    assert bounded()
    await jobs.release(claim)
    assert bounded()
    await jobs.finish(await claimed(jobs), RESULT)
    assert bounded()
    assert valkey.client.exists(keys.running(), keys.queue("train")) == 0


async def test_a_job_that_this_version_cannot_read_is_refused_by_name(jobs: JobStore, valkey: Valkey) -> None:
    await jobs.submit(TRAIN, epoch=1, job_id="job-x")
    valkey.client.hset(keys.job("job-x"), "state", "paused")
    with pytest.raises(Refused, match="job-x"):
        await jobs.get("job-x")
    other = await jobs.submit(SCORE, epoch=1)
    assert [job.id for job in await jobs.list()] == [other.id]


async def test_a_result_that_nobody_could_read_is_refused_before_it_is_stored(jobs: JobStore) -> None:
    await jobs.submit(TRAIN, epoch=1)
    claim = await claimed(jobs)
    with pytest.raises(TooLarge, match="a result of"):
        await jobs.finish(claim, JobResult(metrics={str(n): 1.0 for n in range(200_000)}))
    assert await jobs.renew(claim) is Verdict.GO_ON
    with pytest.raises(TooLarge, match="a specification of"):
        await jobs.submit(JobSpec(JobKind.TRAIN, "e", "t", "d", shards=("x" * 1_100_000,)), epoch=1)
