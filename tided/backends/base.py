"""What the daemon asks of an engine, whatever engine it is.

Errors mean the same everywhere: `Unavailable`: the engine or Redis did not answer in time; the state of the engine is unknown until
its next heartbeat, and asking again is right (every command is idempotent). `Refused`: the engine understood and will not (a bad
checkpoint, a capability it lacks); never ask again as it is. `Superseded`: the engine has seen a newer leader; stop leading.
`Conflict`: what the engine reads back is not what was asked for; read its heartbeat and decide again.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tided.model.engines import Capability, EngineInfo, LatencyProfile, Observation
from tided.model.errors import Refused
from tided.store.engines import EngineStore


@dataclass(frozen=True, slots=True)
class SwapDone:
    """`version` was read back from the loaded weights; `pause_s` is how long the engine's steps stood still."""

    version: str
    pause_s: float


class Backend(ABC):
    """One engine. Every command carries `epoch`, the leader's fencing number."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    @classmethod
    def of(cls, info: EngineInfo, store: EngineStore) -> Self:
        """The adapter for the engine of a heartbeat. `store` holds its reports, commands and replies; override to keep what you need."""
        return cls(info.engine)

    @abstractmethod
    async def observe(self, cursor: str) -> tuple[list[Observation], str]:
        """Reports after `cursor` ("" = from now on) and the cursor to go on from. Timing-critical: runs in every cycle, never waits."""

    @abstractmethod
    async def set_schedule(self, gammas: tuple[int, ...], epoch: int) -> None:
        """Set the drafted tokens by batch size. Timing-critical: it is in force within a few steps; waits 2 s for the reply."""

    @abstractmethod
    async def set_capture(self, on: bool, credit_bytes: int, epoch: int) -> None:
        """Tap requests that begin from now on, or stop. Not timing-critical; waits 2 s for the reply."""

    @abstractmethod
    async def send_swap(self, version: str, path: Path, epoch: int, ttl_s: float) -> str:
        """Ask the engine to replace its draft by the checkpoint in `path` (absolute) between two steps; gives the command's id.

        Atomic in the engine: on any error the old draft serves on. Not timing-critical for the caller, but the engine's own pause
        is: it resumes by itself. The outcome comes from `swap_outcome`, the proof from the next heartbeat.
        """

    async def send_draft(self, version: str, size: int, epoch: int, ttl_s: float) -> str:
        """As `send_swap`, of an engine that declares `fetch`: it fetches the draft, `size` bytes (tided.wire.fetch), and then swaps."""
        raise Refused(f"engine {self.engine}: its adapter sends no drafts, only the paths of drafts")

    @abstractmethod
    async def swap_outcome(self, version: str, command: str) -> SwapDone | None:
        """What the engine answered to a swap; None while it has not. Runs in every cycle of a swap, never waits.

        Raises `Refused` (it will not, or failed), `Conflict` (it loaded something else), `Superseded`.
        """

    @abstractmethod
    async def measure_profile(self, epoch: int, deadline_s: float) -> LatencyProfile:
        """Measure T(n) and D(b) while nothing is running. Not timing-critical; an engine that is busy answers `Refused`."""


def require(info: EngineInfo, capability: Capability) -> None:
    """Raise `Refused` unless the engine declares `capability`."""
    if capability not in info.capabilities:
        raise Refused(f"engine {info.engine} ({info.kind}) cannot do this: it does not declare {capability.value!r}")
