"""What tided may do to a running embedded engine: read it, set its schedule, swap its draft, measure its profile."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

import tided
from tided.draft import checkpoint
from tided.draft.checkpoint import Checkpoint
from tided.draft.eagle3 import Eagle3
from tided.draft.target import TargetShape
from tided.engine.agent import Counters
from tided.engine.boundary import outcome
from tided.engine.embedded.profile import measure
from tided.engine.embedded.scheduler import Scheduler
from tided.engine.embedded.target import Target
from tided.model.codec import to_plain
from tided.model.engines import Capability, EngineInfo, LatencyProfile
from tided.model.errors import Refused, Unavailable
from tided.wire.control import Body, MeasureProfile, SetSchedule, Swap


def load_draft(path: Path, target: Target, version: str = "") -> Eagle3:
    """A draft in memory of its own, checked on disk and again after loading.

    Raises `Refused` when it is damaged, is not `version` (if given), or is for another target.
    """
    checked = checkpoint.load(path, TargetShape(target.hidden, target.vocab))
    if version and checked.version != version:
        raise Refused(f"{path} holds version {checked.version[:12]}, not {version[:12]}; nothing was changed")
    draft = Eagle3.of(checked, target.dtype, target.device)
    _read_back(draft, checked, path)
    return draft


def _read_back(draft: Eagle3, checked: Checkpoint, path: Path) -> None:
    """Compare what was loaded with what was checked, bit by bit (bf16 to fp32 and back is exact)."""
    loaded = draft.state_tensors()
    for name, tensor in checked.tensors.items():
        if not np.array_equal(loaded[name], tensor):
            raise Refused(f"{path}: tensor {name!r} differs after loading; the draft that served before still serves")


class EmbeddedControl:
    """Implements tided.engine.agent.EngineControl. Any thread may call; steps are touched only between two of them."""

    def __init__(
        self, scheduler: Scheduler, *, engine: str, incarnation: str, url: str, taps: bool, last_hidden: bool
    ) -> None:
        self._scheduler = scheduler
        self._engine, self._incarnation, self._url = engine, incarnation, url
        self._capabilities = [Capability.SCHEDULE, Capability.SWAP, Capability.SWAP_VOCABULARY, Capability.PROFILE]
        if taps:
            self._capabilities.append(Capability.TAP)
        if taps and last_hidden:
            self._capabilities.append(Capability.LAST_HIDDEN)
        self.profile: LatencyProfile | None = None

    def info(self) -> EngineInfo:
        scheduler, target = self._scheduler, self._scheduler.target
        draft = scheduler.drafter.draft if scheduler.drafter is not None else None
        return EngineInfo(
            engine=self._engine,
            incarnation=self._incarnation,
            kind="transformers",
            url=self._url,
            target=target.info,
            version=draft.version if draft is not None else "",
            vocab_id=draft.vocab_id if draft is not None else "",
            gamma_max=target.gamma_max,
            max_batch=target.max_batch,
            capabilities=tuple(self._capabilities),
            gammas=scheduler.gammas,
            capturing=False,  # the agent, which holds the tap, fills it in
            epoch=0,
            profile=self.profile,
            pid=os.getpid(),
            build=f"tided {tided.__version__}",
        )

    def apply(self, body: Body) -> dict[str, Any]:
        """Do what `body` says; returns once it is in force. Raises `TideError`, with nothing changed."""
        if isinstance(body, SetSchedule):
            self._scheduler.set_gammas(body.gammas)
            return {"gammas": list(self._scheduler.gammas)}
        if isinstance(body, Swap):
            return self.swap(Path(body.path), body.version)
        if isinstance(body, MeasureProfile):
            return {"profile": to_plain(self.measure_profile())}
        raise Refused(f"this engine does not apply {type(body).__name__}")

    def observe(self) -> Counters:
        scheduler = self._scheduler
        steps, requests = scheduler.take_counts()
        return Counters(steps, requests, scheduler.running, scheduler.waiting, scheduler.version)

    def swap(self, path: Path, version: str = "") -> dict[str, Any]:
        """Check and load the draft beside the one that serves, then exchange them between two steps.

        Gives the version that serves now and the seconds that the steps paused.
        """
        scheduler = self._scheduler
        drafter = scheduler.drafter
        if drafter is None:
            raise Refused("this engine was started without speculation; there is no draft to replace")
        draft = load_draft(path, scheduler.target, version)
        if draft.config != drafter.draft.config:
            raise Refused(f"{path}: its sizes differ from those of the draft being served; restart the engine on it")

        def exchange() -> float:
            started = time.perf_counter()
            drafter.exchange(draft)
            return time.perf_counter() - started

        seconds = outcome(scheduler.between_steps(exchange))
        return {"version": scheduler.version, "seconds": seconds}

    def measure_profile(self) -> LatencyProfile:
        """Measure T(n) and D(b) between steps. Raises `Unavailable` while requests run or wait."""
        scheduler = self._scheduler

        def action() -> LatencyProfile:
            if scheduler.running or scheduler.waiting:
                raise Unavailable("the engine is serving; a profile is measured only while nothing runs")
            return measure(scheduler.target, scheduler.drafter)

        profile: LatencyProfile = outcome(scheduler.between_steps(action))
        self.profile = profile
        return profile
