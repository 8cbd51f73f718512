"""Jobs in a real Valkey: each promise of `JobStore`, one test."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Valkey
from tests.support import eventually
from tided.machine.job import Verdict
from tided.machine.placement import IDLE_MS, PATIENCE_MS, Capacity, Idle, Offer, Waiting, choose, queue_of
from tided.model.drafts import Evaluation
from tided.model.errors import Conflict, Refused, Superseded
from tided.model.jobs import JobKind, JobResult, JobSpec, JobState, Needs, Progress
from tided.store.client import connect, redis_time_ms
from tided.store.jobs import Claim, JobStore, TooLarge
from tided.wire import keys

pytestmark = pytest.mark.real

TRAIN = JobSpec(JobKind.TRAIN, "engine-a", "0" * 64, "/models/target", shards=("/shards/a",), options={"lr": 1e-3})
SCORE = JobSpec(JobKind.SCORE, "engine-a", "0" * 64, "/models/target")
TRAIN_QUEUE = keys.queue(queue_of(0, JobKind.TRAIN, Needs()))
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
    alike = valkey.client.hget(job, "alike")
    assert isinstance(alike, bytes)
    if valkey.client.hget(job, "state") == b"queued":
        valkey.client.hset(job, "not_before_ms", 1)
        valkey.client.zadd(keys.queue(alike.decode()), {job_id: 1})
    elif valkey.client.hget(job, "state") == b"running":
        valkey.client.hset(job, "lease_until_ms", 1)
        valkey.client.zadd(keys.running(), {job_id: 1})


def hold_back(valkey: Valkey, job_id: str) -> None:
    """Make what a queued job waits for an hour longer, so that a slow machine cannot wait it out."""
    later_ms = int(valkey.client.hget(keys.job(job_id), "not_before_ms") or 0) + 3_600_000  # pyright: ignore
    valkey.client.hset(keys.job(job_id), "not_before_ms", later_ms)
    assert valkey.client.zadd(TRAIN_QUEUE, {job_id: later_ms}, xx=True, ch=True) == 1


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


async def test_listing_looks_at_no_more_of_a_state_than_it_may_give(jobs: JobStore, valkey: Valkey) -> None:
    for i in range(30):
        await jobs.submit(TRAIN, epoch=1, job_id=f"job-{i:02}")
    reads = _reads(valkey)
    assert len(await jobs.list(limit=5)) == 5
    assert _reads(valkey) - reads <= 10


def _reads(valkey: Valkey) -> int:
    """How many fields and hashes were read by anybody."""
    stats: dict[str, dict[str, int]] = valkey.client.info("commandstats")  # type: ignore[assignment]
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("hget", "hmget", "hgetall"))


async def test_a_claim_looks_at_no_more_jobs_when_more_wait(jobs: JobStore, valkey: Valkey) -> None:
    async def cost() -> int:
        reads = _reads(valkey)
        assert await jobs.claim("w1", [JobKind.TRAIN], Capacity(rate=10.0)) is not None
        return _reads(valkey) - reads

    await jobs.submit(TRAIN, epoch=1)
    few = await cost()
    for _ in range(100):
        await jobs.submit(TRAIN, epoch=1)
    assert await cost() == few


async def test_a_failure_for_good_is_told_to_the_leader_once_and_kept(jobs: JobStore) -> None:
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    await jobs.fail(await claimed(jobs), "bad shard", retryable=False)
    assert [(job.id, job.error) for job in await jobs.reap(epoch=1)] == [(job_id, "bad shard")]
    assert await jobs.reap(epoch=1) == []
    assert [job.id for job in await jobs.list(states=[JobState.FAILED])] == [job_id]


async def test_the_index_forgets_what_redis_forgot(valkey: Valkey) -> None:
    async with connect(valkey.url) as client:
        jobs = JobStore(client, lease_s=300, keep_s=0.05)
        await jobs.submit(TRAIN, epoch=1)
        await jobs.submit(SCORE, epoch=1)
        await jobs.cancel((await jobs.submit(SCORE, epoch=1)).id, epoch=1)

        async def nothing_is_left() -> bool:
            await jobs.reap(epoch=1)
            return not list(valkey.client.scan_iter())

        await eventually(nothing_is_left)


# --- placement: what tided.machine.placement says, as the script does it ---


async def test_the_most_urgent_job_that_fits_is_claimed(jobs: JobStore) -> None:
    large = replace(TRAIN, needs=Needs("cuda", 2, 80 << 30), priority=9)
    ids = [(await jobs.submit(spec, epoch=1)).id for spec in (TRAIN, replace(TRAIN, priority=2), large)]
    small, gpus = Capacity(), Capacity("cuda", 4, 80 << 30)
    assert [(await _got(jobs, small)), await _got(jobs, small), await _got(jobs, small)] == [ids[1], ids[0], ""]
    assert await _got(jobs, gpus) == ids[2]


async def test_a_cordoned_worker_gets_nothing(jobs: JobStore, valkey: Valkey) -> None:
    await jobs.submit(TRAIN, epoch=1)
    valkey.client.set(keys.cordon("w1"), "cordon")
    assert await jobs.claim("w1", [JobKind.TRAIN]) is None
    assert await jobs.claim("w2", [JobKind.TRAIN]) is not None
    valkey.client.delete(keys.cordon("w1"))


async def test_a_slow_worker_leaves_a_job_to_an_idle_faster_one_for_a_moment(jobs: JobStore, valkey: Valkey) -> None:
    slow, fast = Capacity(rate=10.0), Capacity(rate=100.0)
    assert await _got(jobs, fast, "fast") == ""
    ids = [(await jobs.submit(TRAIN, epoch=1)).id for _ in range(2)]
    valkey.client.hset(keys.offers(), "fast", _asked(valkey, "fast", later_ms=3_600_000))
    for number, job_id in enumerate(ids):
        hold_until(valkey, job_id, due_ms=now_ms(valkey) - 2 + number)
    assert await _got(jobs, slow, "slow") == ""
    assert await _got(jobs, fast, "fast") == ids[0]
    assert await _got(jobs, slow, "slow") == ids[1], "the faster one is busy"


async def test_no_job_waits_for_a_faster_worker_longer_than_a_moment(jobs: JobStore, valkey: Valkey) -> None:
    assert await _got(jobs, Capacity(rate=100.0), "fast") == ""
    job_id = (await jobs.submit(TRAIN, epoch=1)).id
    valkey.client.hset(keys.offers(), "fast", _asked(valkey, "fast", later_ms=3_600_000))
    age(valkey, job_id)
    assert await _got(jobs, Capacity(rate=10.0), "slow") == job_id


CAPACITIES = st.builds(
    Capacity,
    st.sampled_from(["cpu", "cuda"]),
    st.integers(1, 2),
    st.sampled_from([0, 8]),
    st.sampled_from([0.0, 10.0, 25.0, 60.0]),
)
KINDS = st.sampled_from([(JobKind.TRAIN,), (JobKind.SCORE, JobKind.REFERENCE), tuple(JobKind)])
OFFERS = st.builds(Offer, KINDS, CAPACITIES)
NEEDS = st.builds(Needs, st.sampled_from(["", "cpu", "cuda"]), st.integers(1, 2), st.sampled_from([0, 8]))
AGES = st.sampled_from([-3_600_000, 0, PATIENCE_MS + 1, 3_600_000])
"""In ms; none that a slow machine could carry over a limit while the test runs."""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    waiting=st.lists(st.tuples(st.sampled_from(JobKind), NEEDS, st.integers(0, 2), AGES), max_size=8),
    idle=st.lists(st.tuples(OFFERS, st.booleans()), max_size=4),
    offer=OFFERS,
)
def test_the_claim_script_follows_the_rules_of_placement(
    valkey: Valkey,
    waiting: list[tuple[JobKind, Needs, int, int]],
    idle: list[tuple[Offer, bool]],
    offer: Offer,
) -> None:
    valkey.client.flushall()

    async def compare() -> None:
        async with connect(valkey.url) as client:
            jobs = JobStore(client, lease_s=300, keep_s=7200)
            began_ms = await redis_time_ms(client)
            expected: list[Waiting] = []
            for number, (kind, needs, priority, age_ms) in enumerate(waiting):
                spec = replace(TRAIN, kind=kind, needs=needs, priority=priority)
                await jobs.submit(spec, epoch=1, job_id=f"job-{number}")
                due_ms = began_ms - age_ms
                hold_until(valkey, f"job-{number}", due_ms=due_ms)
                expected.append(Waiting(f"job-{number}", kind, needs, priority, due_ms))
            others: list[Idle] = []
            for number, (other, fresh) in enumerate(idle):
                if other.has.rate > 0:
                    asked_ms = began_ms + 3_600_000 if fresh else began_ms - IDLE_MS
                    others.append(Idle(f"other-{number}", other, asked_ms))
                    has = other.has
                    kinds = f",{','.join(kind.value for kind in other.kinds)},"
                    told = f"{asked_ms}|{kinds}|{has.device}|{has.devices}|{has.memory_bytes}"
                    valkey.client.hset(keys.offers(), f"other-{number}", told)
                    valkey.client.zadd(keys.idle(), {f"other-{number}": has.rate})
            claim = await jobs.claim("w1", offer.kinds, offer.has)
            if await redis_time_ms(client) - began_ms >= PATIENCE_MS:
                return  # the machine was too slow to say
            chosen = choose(expected, offer, others, began_ms)
            assert (claim.job.id if claim else None) == (chosen.id if chosen else None)

    asyncio.run(compare())
    valkey.client.flushall()


async def _got(jobs: JobStore, has: Capacity, worker: str = "w1") -> str:
    claim = await jobs.claim(worker, [JobKind.TRAIN], has)
    return claim.job.id if claim is not None else ""


def _asked(valkey: Valkey, worker: str, later_ms: int) -> bytes:
    """A worker's offer as if it had been made later, so that a slow machine cannot make it old."""
    offer = valkey.client.hget(keys.offers(), worker)
    assert isinstance(offer, bytes)
    asked, _, rest = offer.partition(b"|")
    return b"%d|%s" % (int(asked) + later_ms, rest)


def now_ms(valkey: Valkey) -> int:
    seconds, micros = valkey.client.time()  # type: ignore[misc]
    return seconds * 1000 + micros // 1000


def hold_until(valkey: Valkey, job_id: str, due_ms: int) -> None:
    """Move the time from which a queued job is due."""
    job = keys.job(job_id)
    alike = valkey.client.hget(job, "alike")
    assert isinstance(alike, bytes)
    valkey.client.hset(job, "not_before_ms", due_ms)
    valkey.client.zadd(keys.queue(alike.decode()), {job_id: due_ms})


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
    assert valkey.client.exists(keys.running(), TRAIN_QUEUE) == 0


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
