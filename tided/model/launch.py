"""A worker that a scheduler was asked to start: what the scheduler says of it."""

from dataclasses import dataclass
from enum import StrEnum


class LaunchState(StrEnum):
    PENDING = "pending"  # it waits for devices
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def live(self) -> bool:
        return self in (LaunchState.PENDING, LaunchState.RUNNING)


@dataclass(frozen=True, slots=True)
class Launch:
    """`message`: why it waits or failed, in the scheduler's words. `ended_ms`: by the scheduler's clock, 0 if it has not or that is not
    known; launches are only compared with each other by it."""

    state: LaunchState
    message: str = ""
    ended_ms: int = 0
