"""A version on its way onto one engine, and the canary that goes first."""

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class ServedSums:
    """Finished requests that drafted: sums over them of their drafting request-steps and of the drafted tokens accepted in these.

    `squares`: the sums of both squared, and of their product; the spread between requests follows from them.
    """

    requests: float = 0.0
    steps: float = 0.0
    accepted: float = 0.0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, steps: float, accepted: float) -> "ServedSums":
        """One request."""
        return cls(1.0, steps, accepted, (steps * steps, accepted * accepted, steps * accepted))

    def plus(self, other: "ServedSums", keep: float = 1.0) -> "ServedSums":
        """These, each request at the weight `keep`, and the others."""
        return ServedSums(
            keep * self.requests + other.requests,
            keep * self.steps + other.steps,
            keep * self.accepted + other.accepted,
            tuple(keep * keep * a + b for a, b in zip(self.squares, other.squares, strict=True)),  # pyright: ignore[reportArgumentType]
        )

    @property
    def length(self) -> float:
        """Mean acceptance length, bonus token included; 0.0 before the first step."""
        return 1.0 + self.accepted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class WatchPeer:
    """Another engine of the target, for what the traffic does meanwhile: its acceptance length with the version that it serves before a
    watch began, that figure's standard error, and what it served of the same version since."""

    engine: str
    version: str
    length: float
    error: float
    served: ServedSums = field(default_factory=ServedSums)


class DeploymentState(StrEnum):
    PENDING = "pending"
    SWAPPING = "swapping"
    WATCHING = "watching"
    LIVE = "live"
    RESTORING = "restoring"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (DeploymentState.LIVE, DeploymentState.ROLLED_BACK, DeploymentState.FAILED)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One version on its way onto one engine."""

    id: str
    engine: str
    version: str
    previous: str
    state: DeploymentState
    epoch: int
    created_ms: int
    updated_ms: int
    reason: str  # "gate", "pool", "shared", "operator", "rollback"
    command: str = ""  # id of the swap or restore command in flight
    deadline_ms: int = 0
    watched: ServedSums = field(default_factory=ServedSums)  # since the swap
    baseline_length: float = 0.0  # acceptance length that the incumbent had, for the live watch
    baseline_error: float = 0.0  # its standard error
    peers: tuple[WatchPeer, ...] = ()
    error: str = ""
    swap_s: float = 0.0
    proven: bool = False  # it has served well before, in other traffic: to be worse here is no blame
    trial: bool = False  # other engines wait for what this watch finds: it is the longer one
    withdrawn: bool = False  # it ended for a reason that says nothing about the version: another engine may try it


class CanaryState(StrEnum):
    CHOOSING = "choosing"
    WATCHING = "watching"
    PASSED = "passed"
    FAILED = "failed"
    WITHDRAWN = "withdrawn"  # nothing was found out about the version

    @property
    def final(self) -> bool:
        return self in (CanaryState.PASSED, CanaryState.FAILED, CanaryState.WITHDRAWN)


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that passed the gate, and the one engine of its target on which it has to prove itself before the others get it.

    `target`: its name. `incumbent`: the version that it was compared with. `deployment`: that onto `engine`. `tried`: engines that it
    was on, and that gave no answer. `absent_ms`: since when `engine` is not in order, 0 while it is. `alone`: there is no other engine
    to protect.
    """

    target: str
    version: str
    incumbent: str
    job: str
    state: CanaryState
    started_ms: int
    updated_ms: int
    deadline_ms: int  # of the choice of an engine
    engine: str = ""
    deployment: str = ""
    tried: tuple[str, ...] = ()
    absent_ms: int = 0
    alone: bool = False
    reason: str = ""
