"""The rules of a job's life. The scripts of `tided.store.jobs` follow them; a contract test drives both and compares.

A job is claimed under a lease; `attempt` counts claims and fences everything that an attempt says later. After a cancellation was
accepted no result of the job ever takes effect. Every pair of state and event is defined: what does not apply changes nothing and
answers `Reject`.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from tided.model.errors import InvariantBroken
from tided.model.jobs import JobState

BACKOFF_BASE_MS = 2_000
BACKOFF_CAP_MS = 300_000


class Verdict(StrEnum):
    """What a renewal tells the attempt."""

    GO_ON = "go-on"
    CANCEL = "cancel"  # stop, then report; no result will be taken
    LOST = "lost"  # the lease is gone: stop and say nothing more


@dataclass(frozen=True, slots=True)
class JobLife:
    """The part of a stored job that the rules are about."""

    state: JobState
    attempt: int = 0
    max_attempts: int = 3
    not_before_ms: int = 0
    lease_until_ms: int = 0
    worker: str = ""
    cancelling: bool = False
    result: str = ""
    error: str = ""


# --- events: past tense, with the Redis TIME at which they are judged ---


@dataclass(frozen=True, slots=True)
class Claimed:
    now_ms: int
    worker: str
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Renewed:
    now_ms: int
    attempt: int
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Finished:
    """`result` stands for the result's bytes: a repeated report of the same bytes is the same report (a lost acknowledgement)."""

    now_ms: int
    attempt: int
    result: str


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    now_ms: int
    attempt: int
    error: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Released:
    """The worker gives the attempt back unfinished (it drains). It is not held against the job."""

    now_ms: int
    attempt: int


@dataclass(frozen=True, slots=True)
class CancelRequested:
    now_ms: int


@dataclass(frozen=True, slots=True)
class Reaped:
    """The leader looked for expired leases."""

    now_ms: int


JobEvent = Claimed | Renewed | Finished | AttemptFailed | Released | CancelRequested | Reaped


# --- actions ---


@dataclass(frozen=True, slots=True)
class Enqueue:
    not_before_ms: int


@dataclass(frozen=True, slots=True)
class Dequeue:
    pass


@dataclass(frozen=True, slots=True)
class Tell:
    """The answer to a renewal."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Reject:
    """The event did not apply: a Conflict for whoever sent it (except Reaped, for whom there was nothing to do)."""

    why: str


JobAction = Enqueue | Dequeue | Tell | Reject


def backoff_ms(attempt: int) -> int:
    """Pause before the attempt after attempt number `attempt` (from 1): 2 s, 4 s, 8 s, ... at most 5 min."""
    return min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** min(attempt - 1, 32))


def step(life: JobLife, event: JobEvent) -> tuple[JobLife, tuple[JobAction, ...]]:
    match event:
        case Claimed():
            return _claimed(life, event)
        case Renewed():
            return _renewed(life, event)
        case Finished():
            return _finished(life, event)
        case AttemptFailed():
            return _failed(life, event)
        case Released():
            return _released(life, event)
        case CancelRequested():
            return _cancel_requested(life)
        case Reaped():
            return _reaped(life, event)


def validate_state(life: JobLife) -> None:
    """Raise `InvariantBroken` for a state that no sequence of events can reach."""
    running = life.state is JobState.RUNNING
    wrong = (
        (life.attempt < 0 or life.attempt > life.max_attempts, "attempt out of range"),
        (
            running and (life.attempt < 1 or not life.worker or life.lease_until_ms <= 0),
            "running without an attempt or a lease",
        ),
        (not running and (life.lease_until_ms != 0 or life.cancelling), "a lease or a cancellation outside running"),
        (bool(life.result) != (life.state is JobState.SUCCEEDED), "result and success disagree"),
        (life.state is JobState.QUEUED and life.attempt >= life.max_attempts, "queued with no attempt left"),
        (life.state is JobState.FAILED and not life.error, "failed without an error"),
    )
    for broken, what in wrong:
        if broken:
            raise InvariantBroken(f"job in state {life.state}: {what}")


def _claimed(life: JobLife, event: Claimed) -> tuple[JobLife, tuple[JobAction, ...]]:
    if life.state is not JobState.QUEUED or event.now_ms < life.not_before_ms:
        return life, (Reject("it is not due in the queue"),)
    claimed = replace(
        life,
        state=JobState.RUNNING,
        attempt=life.attempt + 1,
        worker=event.worker,
        lease_until_ms=event.now_ms + event.lease_ms,
        error="",
    )
    return claimed, (Dequeue(),)


def _renewed(life: JobLife, event: Renewed) -> tuple[JobLife, tuple[JobAction, ...]]:
    if not _holds(life, event.attempt, event.now_ms):
        return life, (Tell(Verdict.LOST),)
    if life.cancelling:
        return life, (Tell(Verdict.CANCEL),)
    return replace(life, lease_until_ms=event.now_ms + event.lease_ms), (Tell(Verdict.GO_ON),)


def _finished(life: JobLife, event: Finished) -> tuple[JobLife, tuple[JobAction, ...]]:
    if life.state is JobState.SUCCEEDED and (life.attempt, life.result) == (event.attempt, event.result):
        return life, ()
    if not _holds(life, event.attempt, event.now_ms):
        return life, (Reject("the attempt does not hold the job's lease"),)
    if life.cancelling:
        return _cancelled(life), (Reject("the job was cancelled"),)
    return replace(life, state=JobState.SUCCEEDED, lease_until_ms=0, result=event.result), ()


def _failed(life: JobLife, event: AttemptFailed) -> tuple[JobLife, tuple[JobAction, ...]]:
    if not _holds(life, event.attempt, event.now_ms):
        return life, (Reject("the attempt does not hold the job's lease"),)
    if life.cancelling:
        return _cancelled(life), ()
    if not event.retryable:
        return replace(life, state=JobState.FAILED, lease_until_ms=0, error=event.error), ()
    return _retried(life, event.now_ms, event.error)


def _released(life: JobLife, event: Released) -> tuple[JobLife, tuple[JobAction, ...]]:
    if not _holds(life, event.attempt, event.now_ms):
        return life, (Reject("the attempt does not hold the job's lease"),)
    if life.cancelling:
        return _cancelled(life), ()
    queued = replace(
        life,
        state=JobState.QUEUED,
        max_attempts=life.max_attempts + 1,
        not_before_ms=event.now_ms,
        lease_until_ms=0,
        worker="",
    )
    return queued, (Enqueue(event.now_ms),)


def _cancel_requested(life: JobLife) -> tuple[JobLife, tuple[JobAction, ...]]:
    match life.state:
        case JobState.QUEUED:
            return _cancelled(life), (Dequeue(),)
        case JobState.RUNNING:
            return replace(life, cancelling=True), ()
        case JobState.CANCELLED:
            return life, ()
        case JobState.SUCCEEDED | JobState.FAILED:
            return life, (Reject(f"the job has already {life.state}"),)


def _reaped(life: JobLife, event: Reaped) -> tuple[JobLife, tuple[JobAction, ...]]:
    if life.state is not JobState.RUNNING or event.now_ms < life.lease_until_ms:
        return life, (Reject("no expired lease"),)
    if life.cancelling:
        return _cancelled(life), ()
    return _retried(life, event.now_ms, f"worker {life.worker} stopped renewing its lease (died, hung or cut off)")


def _holds(life: JobLife, attempt: int, now_ms: int) -> bool:
    return life.state is JobState.RUNNING and life.attempt == attempt and now_ms < life.lease_until_ms


def _cancelled(life: JobLife) -> JobLife:
    return replace(life, state=JobState.CANCELLED, cancelling=False, lease_until_ms=0)


def _retried(life: JobLife, now_ms: int, error: str) -> tuple[JobLife, tuple[JobAction, ...]]:
    if life.attempt >= life.max_attempts:
        return replace(life, state=JobState.FAILED, lease_until_ms=0, error=error), ()
    not_before_ms = now_ms + backoff_ms(life.attempt)
    queued = replace(life, state=JobState.QUEUED, not_before_ms=not_before_ms, lease_until_ms=0, worker="", error=error)
    return queued, (Enqueue(not_before_ms),)
