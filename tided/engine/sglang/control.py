"""What tided may do to a running SGLang: read it, set its schedule, swap its draft, measure its profile."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tided.engine.agent import Counters
from tided.engine.boundary import Boundary
from tided.engine.plugin import build_of
from tided.engine.sglang.profile import StepTimer, measure
from tided.engine.sglang.steps import Schedule, StepBook
from tided.engine.sglang.weights import DraftWeights, Staged
from tided.engine.tap import TapSettings
from tided.model.codec import to_plain
from tided.model.engines import Capability, EngineInfo, LatencyProfile, TargetInfo
from tided.model.errors import Refused, Unavailable
from tided.wire.control import Body, MeasureProfile, SetSchedule, Swap

KIND = "sglang"


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the server answers, and how many requests it runs at once."""

    url: str
    max_batch: int


class SglangControl:
    """Implements tided.engine.agent.EngineControl. The agent's threads call; the draft is touched only between two iterations."""

    def __init__(
        self,
        *,
        settings: TapSettings,
        target: TargetInfo,
        limits: Limits,
        schedule: Schedule,
        weights: DraftWeights,
        boundary: Boundary,
        timer: StepTimer,
        book: StepBook,
        load: Callable[[], tuple[int, int]],
    ) -> None:
        """`load` gives how many requests run and how many wait."""
        self._settings, self._target, self._limits = settings, target, limits
        self._schedule, self._weights, self._boundary = schedule, weights, boundary
        self._timer, self._book, self._load = timer, book, load
        self._profile: LatencyProfile | None = None
        capabilities = [Capability.TAP, Capability.SWAP, Capability.SWAP_VOCABULARY]
        if settings.has_last:
            capabilities.append(Capability.LAST_HIDDEN)
        if schedule.reachable:
            capabilities += [Capability.SCHEDULE, Capability.PROFILE]
        self._capabilities = tuple(capabilities)

    def info(self) -> EngineInfo:
        gammas = self._schedule.gammas or (0,)
        return EngineInfo(
            engine=self._settings.engine,
            incarnation=self._settings.incarnation,
            kind=KIND,
            url=self._limits.url,
            target=self._target,
            version=self._weights.version,
            vocab_id=self._weights.vocab_id,
            gamma_max=max(self._schedule.reachable, default=0),
            max_batch=self._limits.max_batch,
            capabilities=self._capabilities,
            gammas=gammas,
            capturing=False,  # the agent, which holds the tap, fills it in
            epoch=0,
            profile=self._profile,
            pid=os.getpid(),
            build=build_of("sglang"),
        )

    def apply(self, body: Body) -> dict[str, Any]:
        """Do what `body` says; returns once it is in force. Raises `TideError`, with nothing changed."""
        if isinstance(body, SetSchedule):
            self._boundary.call(lambda: self._schedule.set(body.gammas))
            return {"gammas": list(self._schedule.gammas)}
        if isinstance(body, Swap):
            return self.swap(Path(body.path), body.version)
        if isinstance(body, MeasureProfile):
            return {"profile": to_plain(self.measure_profile())}
        raise Refused(f"this engine does not apply {type(body).__name__}")

    def observe(self) -> Counters:
        steps, requests = self._book.take()
        running, waiting = self._load()
        return Counters(steps, requests, running, waiting, self._weights.version)

    def swap(self, path: Path, version: str) -> dict[str, Any]:
        """Check and convert the draft beside the one that serves, then exchange them between two iterations.

        Gives the version that was read back and the seconds that the scheduler paused.
        """
        staged = self._weights.stage(path, version)
        seconds = self._boundary.call(lambda: self._exchange(staged))
        return {"version": self._weights.version, "seconds": seconds}

    def _exchange(self, staged: Staged) -> float:
        started = time.perf_counter()
        self._weights.exchange(staged)
        return time.perf_counter() - started

    def measure_profile(self) -> LatencyProfile:
        """Measure T(n) and D(b) by requests of its own. Raises `Unavailable` while others are served."""
        if not self._schedule.reachable:
            raise Refused("SGLang was started without --speculative-adaptive: its steps cannot be set")
        if any(self._load()):
            raise Unavailable("the engine is serving; a profile is measured only while nothing runs")
        limits = self._limits
        busy = lambda: self._load()[0] > 0  # noqa: E731
        self._profile = measure(limits.url, self._schedule, self._timer, limits.max_batch, self._target.vocab, busy)
        return self._profile
