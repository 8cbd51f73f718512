"""A third party's adapter, so that its bugs are one engine's problem: errors name it, a call that hangs ends, answers are checked."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from tided.backends.base import Backend, SwapDone
from tided.model.engines import LatencyProfile, Observation
from tided.model.errors import InvariantBroken, Refused, TideError, Unavailable
from tided.model.plugins import Plugin

LOOK_S = 2.0
"""For what is asked in every cycle and must not wait."""
ASK_S = 10.0
GRACE_S = 5.0


class GuardedBackend(Backend):
    """See the module; otherwise as the `Backend` inside."""

    def __init__(self, inner: Backend, plugin: Plugin) -> None:
        super().__init__(inner.engine)
        self._inner, self._plugin = inner, plugin

    async def observe(self, cursor: str) -> tuple[list[Observation], str]:
        try:
            answer = await self._ask("observe", lambda: self._inner.observe(cursor), LOOK_S)
        except Unavailable as exc:  # from ours it would mean that Redis is away, for all engines
            raise Refused(str(exc)) from exc
        match answer:
            case (list() as found, str() as after) if all(isinstance(item, Observation) for item in found):
                return found, after
            case _:
                raise self._wrong("observe", answer)

    async def set_schedule(self, gammas: tuple[int, ...], epoch: int) -> None:
        await self._ask("set_schedule", lambda: self._inner.set_schedule(gammas, epoch), ASK_S)

    async def set_capture(self, on: bool, credit_bytes: int, epoch: int) -> None:
        await self._ask("set_capture", lambda: self._inner.set_capture(on, credit_bytes, epoch), ASK_S)

    async def send_swap(self, version: str, path: Path, epoch: int, ttl_s: float) -> str:
        match await self._ask("send_swap", lambda: self._inner.send_swap(version, path, epoch, ttl_s), ASK_S):
            case str() as command:
                return command
            case answer:
                raise self._wrong("send_swap", answer)

    async def send_draft(self, version: str, size: int, epoch: int, ttl_s: float) -> str:
        match await self._ask("send_draft", lambda: self._inner.send_draft(version, size, epoch, ttl_s), ASK_S):
            case str() as command:
                return command
            case answer:
                raise self._wrong("send_draft", answer)

    async def swap_outcome(self, version: str, command: str) -> SwapDone | None:
        match await self._ask("swap_outcome", lambda: self._inner.swap_outcome(version, command), LOOK_S):
            case (SwapDone() | None) as outcome:
                return outcome
            case answer:
                raise self._wrong("swap_outcome", answer)

    async def measure_profile(self, epoch: int, deadline_s: float) -> LatencyProfile:
        call = self._inner.measure_profile
        match await self._ask("measure_profile", lambda: call(epoch, deadline_s), deadline_s + GRACE_S):
            case LatencyProfile() as profile:
                return profile
            case answer:
                raise self._wrong("measure_profile", answer)

    async def _ask(self, what: str, call: Callable[[], Awaitable[Any]], deadline_s: float) -> Any:
        try:
            with anyio.move_on_after(deadline_s):
                return await call()
        except InvariantBroken as exc:  # ours ends the process; a plugin's must not
            raise self._plugin.failed(what, exc) from exc
        except TideError:
            raise
        except Exception as exc:
            raise self._plugin.failed(what, exc) from exc
        raise Unavailable(f"{self._plugin}: {what} of engine {self.engine} took longer than {deadline_s:g} s")

    def _wrong(self, what: str, answer: object) -> Refused:
        return self._plugin.failed(what, TypeError(f"it answered {type(answer).__name__}"))


class AbsentBackend(Backend):
    """Stands in for an adapter that could not be made: refuses everything, saying why."""

    def __init__(self, engine: str, why: str) -> None:
        super().__init__(engine)
        self.why = why

    async def observe(self, cursor: str) -> tuple[list[Observation], str]:
        raise Refused(self.why)

    async def set_schedule(self, gammas: tuple[int, ...], epoch: int) -> None:
        raise Refused(self.why)

    async def set_capture(self, on: bool, credit_bytes: int, epoch: int) -> None:
        raise Refused(self.why)

    async def send_swap(self, version: str, path: Path, epoch: int, ttl_s: float) -> str:
        raise Refused(self.why)

    async def send_draft(self, version: str, size: int, epoch: int, ttl_s: float) -> str:
        raise Refused(self.why)

    async def swap_outcome(self, version: str, command: str) -> SwapDone | None:
        raise Refused(self.why)

    async def measure_profile(self, epoch: int, deadline_s: float) -> LatencyProfile:
        raise Refused(self.why)
