"""Whether a worker lives, from the age of its heartbeats as the daemon sees them. The lease, not this, decides who owns a job."""

from dataclasses import dataclass, replace
from enum import StrEnum

from tided.model.errors import InvariantBroken


class Liveness(StrEnum):
    JOINING = "joining"  # known by name (a draining wish, a job's record), not heard of yet
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WorkerLife:
    state: Liveness = Liveness.JOINING
    incarnation: str = ""
    job: str = ""
    seen_ms: int = 0  # when a heartbeat was last seen, or when it was first looked for
    restarts: int = 0


# --- events ---


@dataclass(frozen=True, slots=True)
class HeartbeatSeen:
    now_ms: int
    incarnation: str
    job: str = ""
    draining: bool = False


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The daemon looked and saw no heartbeat."""

    now_ms: int


WorkerEvent = HeartbeatSeen | TimePassed

# --- actions ---


@dataclass(frozen=True, slots=True)
class Announce:
    """An event for people: `worker-joined`, `worker-restarted`, `worker-draining`, `worker-lost`."""

    kind: str


Step = tuple[WorkerLife, tuple[Announce, ...]]


def step(life: WorkerLife, event: WorkerEvent, lost_after_ms: int = 15_000) -> Step:
    """Total. A clock that goes backwards never makes a worker lost."""
    match event:
        case HeartbeatSeen():
            return _seen(life, event)
        case TimePassed(now_ms):
            if life.seen_ms == 0:
                return replace(life, seen_ms=now_ms), ()
            if life.state is Liveness.LOST or now_ms - life.seen_ms <= lost_after_ms:
                return life, ()
            return replace(life, state=Liveness.LOST, job=""), (Announce("worker-lost"),)


def validate_state(life: WorkerLife) -> None:
    """Raise `InvariantBroken` for a state that no sequence of events can reach."""
    heard = life.state in (Liveness.READY, Liveness.BUSY, Liveness.DRAINING)
    wrong = (
        (heard and not life.incarnation, "heard of without an incarnation"),
        (life.state is Liveness.BUSY and not life.job, "busy without a job"),
        (life.state in (Liveness.READY, Liveness.JOINING, Liveness.LOST) and bool(life.job), "a job where none can be"),
    )
    for broken, what in wrong:
        if broken:
            raise InvariantBroken(f"worker in state {life.state}: {what}")


def _seen(life: WorkerLife, event: HeartbeatSeen) -> Step:
    state = Liveness.DRAINING if event.draining else Liveness.BUSY if event.job else Liveness.READY
    restarted = bool(life.incarnation) and life.incarnation != event.incarnation
    announcements: list[Announce] = []
    if life.state in (Liveness.JOINING, Liveness.LOST):
        announcements.append(Announce("worker-joined"))
    elif restarted:
        announcements.append(Announce("worker-restarted"))
    if state is Liveness.DRAINING and life.state is not Liveness.DRAINING:
        announcements.append(Announce("worker-draining"))
    seen = WorkerLife(state, event.incarnation, event.job, event.now_ms, life.restarts + int(restarted))
    return seen, tuple(announcements)
