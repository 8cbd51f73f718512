"""Which idle worker takes which waiting job. The claim script of `tided.store.job_scripts` follows these rules; a contract test
drives both and compares.

The most urgent job that the worker can run: the highest priority, and of one priority the one due for longest. A job is left for a
moment to an idle worker that trains at least `FASTER` times as fast; after `PATIENCE_MS` whoever asks gets it, so that no worker idles
while a job waits. What differs in nothing that the rules look at is in one queue, so that the script looks at the heads of few queues
and never at all jobs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tided.model.jobs import JobKind, Needs

FASTER = 2.0
PATIENCE_MS = 2_000
IDLE_MS = 1_500
"""A worker that has asked in vain within this is idle: it asks twice a second."""
LOOKED_AT = 8
"""Of the idle workers that are fast enough, so many of the fastest are looked at."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker has. `device` is a kind, `memory_bytes` that of each device, 0 if not known; `rate` trained tokens/s, 0 if not known.

    Rates are compared as they are: of workers that trained for different targets the comparison is rough, and costs `PATIENCE_MS` at most.
    """

    device: str = "cpu"
    devices: int = 1
    memory_bytes: int = 0
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Offer:
    """What asks for a job."""

    kinds: tuple[JobKind, ...]
    has: Capacity = Capacity()


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job, as far as the rules look at it."""

    id: str
    kind: JobKind
    needs: Needs
    priority: int
    due_ms: int

    @property
    def urgency(self) -> tuple[int, int, str]:
        """The smallest is the most urgent."""
        return -self.priority, self.due_ms, self.id


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker that asked at `asked_ms`, and got nothing."""

    worker: str
    offer: Offer
    asked_ms: int


def queue_of(priority: int, kind: JobKind, needs: Needs) -> str:
    """The name of the queue for jobs alike: everything about them that `choose` looks at, but for their age."""
    return f"{priority}.{kind.value}.{needs.device or 'any'}.{needs.devices}.{needs.memory_bytes}"


def fits(kind: JobKind, needs: Needs, offer: Offer) -> bool:
    """Whether the worker can run the job. Memory that is not known is none."""
    return (
        kind in offer.kinds
        and needs.device in ("", offer.has.device)
        and needs.devices <= offer.has.devices
        and needs.memory_bytes <= offer.has.memory_bytes
    )


def is_left(job: Waiting, offer: Offer, idle: Iterable[Idle], now_ms: int) -> bool:
    """Whether the worker leaves the job to a much faster one. One that does not know its rate leaves none."""
    if offer.has.rate <= 0.0 or now_ms >= job.due_ms + PATIENCE_MS:
        return False
    faster = sorted(
        (other for other in idle if other.offer.has.rate >= FASTER * offer.has.rate), key=lambda it: -it.offer.has.rate
    )
    return any(
        now_ms < other.asked_ms + IDLE_MS and fits(job.kind, job.needs, other.offer) for other in faster[:LOOKED_AT]
    )


def choose(waiting: Iterable[Waiting], offer: Offer, idle: Iterable[Idle], now_ms: int) -> Waiting | None:
    """What the worker gets."""
    others = tuple(idle)
    possible = [
        job
        for job in waiting
        if job.due_ms <= now_ms and fits(job.kind, job.needs, offer) and not is_left(job, offer, others, now_ms)
    ]
    return min(possible, key=lambda job: job.urgency, default=None)
