"""Jobs in Redis: submitted and cancelled by the leader, claimed and finished by workers. The rules are in `tided.machine.job`."""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from tided.machine.job import Verdict
from tided.machine.placement import Capacity, Offer, queue_of
from tided.model.errors import Conflict, NotFound, Refused
from tided.model.ids import check_name, new_id
from tided.model.jobs import Job, JobKind, JobResult, JobSpec, JobState, Progress
from tided.store import job_scripts
from tided.store.client import translated
from tided.store.replies import fields
from tided.wire import keys
from tided.wire.control import MAX_MESSAGE_BYTES, decode, encode

MAX_ERROR_CHARS = 2_000
PLAIN = Capacity()
"""One processor host, of which nothing more is known."""
WEEK_S = 7 * 86_400.0


_log = structlog.get_logger()


class TooLarge(Refused):
    """A specification or a result that no reader would accept."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An attempt's right to work on a job, until its lease ends."""

    job: Job
    attempt: int


class JobStore:
    """`lease_s`: how long a claim or a renewal holds. `keep_s`: how long a job is kept after anything last touched it.

    All methods raise `Unavailable` while Redis cannot be reached. Repeating a call whose answer was lost is safe: `submit` by its
    `job_id`, `finish` by the result itself, `fail` and `release` answer `Conflict` the second time, a lost claim ends with its lease.
    """

    def __init__(self, redis: Redis, lease_s: float = 15.0, keep_s: float = WEEK_S) -> None:
        self._redis = redis
        self.lease_s = lease_s
        self._lease_ms = round(lease_s * 1000)
        self._keep_ms = round(keep_s * 1000)

    async def submit(self, spec: JobSpec, epoch: int, max_attempts: int = 3, job_id: str = "") -> Job:
        """Queue a job. With the id of an existing job that job is returned unchanged. Raises `Superseded` for an old epoch."""
        job_id = check_name(job_id or new_id("job"), "job")
        if max_attempts < 1:
            raise Refused(f"job {job_id}: max_attempts must be at least 1, got {max_attempts}")
        alike = queue_of(spec.priority, spec.kind, spec.needs)
        reply = await job_scripts.submit(
            self._redis, self._keep_ms, job_id, epoch, _packed(job_id, spec), alike, max_attempts
        )
        return _job(reply)

    async def get(self, job_id: str) -> Job | None:
        """The job as stored now; None for one that never was or has been forgotten."""
        with translated():
            found = fields(await self._redis.hgetall(keys.job(job_id)))
        return _from_fields(job_id, found) if found else None

    async def claim(self, worker: str, kinds: Sequence[JobKind], has: Capacity = PLAIN) -> Claim | None:
        """Take the most urgent job of these kinds that a worker with this can run, for `lease_s`; see `tided.machine.placement`.

        None if none is due, if the worker is cordoned, or while a much faster one may take it.
        """
        offer = Offer(tuple(kinds), has)
        reply = await job_scripts.claim(self._redis, self._keep_ms, self._lease_ms, check_name(worker, "worker"), offer)
        if reply is None:
            return None
        job = _job(reply)
        return Claim(job, job.attempt)

    async def renew(self, claim: Claim, progress: Progress | None = None) -> Verdict:
        """Hold the claim for another `lease_s` and publish how far it is."""
        packed = encode(progress) if progress is not None else b""
        return Verdict(
            await job_scripts.renew(self._redis, self._keep_ms, claim.job.id, claim.attempt, self._lease_ms, packed)
        )

    async def finish(self, claim: Claim, result: JobResult) -> None:
        """Commit the result. Raises `Conflict` when the attempt no longer holds the lease or the job was cancelled, `TooLarge`."""
        answer = await job_scripts.finish(
            self._redis, self._keep_ms, claim.job.id, claim.attempt, _packed(claim.job.id, result)
        )
        if answer == "cancelled":
            raise Conflict(f"job {claim.job.id} was cancelled: the result of attempt {claim.attempt} is discarded")
        _check_held(answer, claim)

    async def fail(self, claim: Claim, error: str, retryable: bool) -> None:
        """Report a failure: another attempt after a pause, or the end of the job. Raises `Conflict` like `finish`."""
        _check_held(
            await job_scripts.fail(
                self._redis, self._keep_ms, claim.job.id, claim.attempt, error[:MAX_ERROR_CHARS] or "unknown", retryable
            ),
            claim,
        )

    async def release(self, claim: Claim) -> None:
        """Give the job back unfinished, for any worker to claim at once. Raises `Conflict` like `finish`."""
        _check_held(await job_scripts.release(self._redis, self._keep_ms, claim.job.id, claim.attempt), claim)

    async def cancel(self, job_id: str, epoch: int) -> Job:
        """Cancel: at once if queued, else as soon as its worker hears of it. No result takes effect after this returns.

        Raises `NotFound` for an unknown job, `Conflict` if it has already ended otherwise, `Superseded` for an old epoch.
        """
        reply = await job_scripts.cancel(self._redis, self._keep_ms, check_name(job_id, "job"), epoch)
        if reply == "missing":
            raise NotFound(f"no job {job_id}: see `tidectl jobs list`")
        if isinstance(reply, str):
            raise Conflict(f"job {job_id} has already {reply}: there is nothing to cancel")
        return _job(reply)

    async def reap(self, epoch: int) -> list[Job]:
        """Take expired claims (by Redis TIME) back; the jobs as they are afterwards, and those that have failed for good since the last
        call. Each is told once. Raises `Superseded` for an old epoch."""
        return _readable(await job_scripts.reap(self._redis, self._keep_ms, epoch))

    async def list(self, limit: int = 50, states: Sequence[JobState] = ()) -> list[Job]:
        """The newest jobs first, of the given states only (none given: all). An unreadable one is logged and left out.

        Of each state the `limit` jobs that came into it last are looked at.
        """
        found = await job_scripts.find(self._redis, self._keep_ms, limit, [state.value for state in states or JobState])
        return _readable(found)


def _check_held(answer: str, claim: Claim) -> None:
    if answer != "done":
        raise Conflict(
            f"job {claim.job.id}: attempt {claim.attempt} no longer holds its lease; its report is discarded"
        )


def _packed(job_id: str, record: JobSpec | JobResult) -> bytes:
    packed = encode(record)
    if len(packed) > MAX_MESSAGE_BYTES:
        what = "specification" if isinstance(record, JobSpec) else "result"
        raise TooLarge(f"job {job_id}: a {what} of {len(packed)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return packed


def _readable(replies: list[list[object]]) -> list[Job]:
    jobs: list[Job] = []
    for reply in replies:
        try:
            jobs.append(_job(reply))
        except Refused as exc:
            _log.warning("job-unreadable", why=str(exc))
    return jobs


def _job(reply: list[object]) -> Job:
    job_id, flat = reply
    assert isinstance(job_id, bytes)
    assert isinstance(flat, list)
    return _from_fields(job_id.decode(), dict(zip(flat[::2], flat[1::2], strict=True)))


def _from_fields(job_id: str, stored: dict[bytes, bytes]) -> Job:
    def number(name: bytes) -> int:
        return int(stored[name])

    progress, result = stored.get(b"progress"), stored.get(b"result")
    try:
        return Job(
            id=job_id,
            spec=decode(JobSpec, stored[b"spec"]),
            state=JobState(stored[b"state"].decode()),
            epoch=number(b"epoch"),
            attempt=number(b"attempt"),
            max_attempts=number(b"max_attempts"),
            created_ms=number(b"created_ms"),
            not_before_ms=number(b"not_before_ms"),
            lease_until_ms=number(b"lease_until_ms"),
            worker=stored[b"worker"].decode(),
            cancelling=stored[b"cancelling"] == b"1",
            started_ms=number(b"started_ms"),
            finished_ms=number(b"finished_ms"),
            progress=decode(Progress, progress) if progress else None,
            result=decode(JobResult, result) if result else None,
            error=stored[b"error"].decode(errors="replace"),
        )
    except (KeyError, ValueError) as exc:
        raise Refused(f"job {job_id} in Redis is not readable by this tided: {type(exc).__name__}") from exc
