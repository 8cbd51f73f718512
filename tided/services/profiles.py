"""Latency profiles that outlive the process that measured them.

What an engine measures is kept by its name, with what it holds for: its kind, target, most drafted tokens and largest batch. An
engine that comes back the same and tells no profile (it was restarted under load, or with TIDED_PROFILE=0) is predicted by the one
that is kept until it measures again; `tided.policies.calibration` corrects that by the steps that are served.
"""

from dataclasses import dataclass

from tided.model.engines import EngineInfo, LatencyProfile
from tided.services.context import Context

STATE = "profile"


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile and the engine that it holds for."""

    kind: str
    target: str
    gamma_max: int
    max_batch: int
    profile: LatencyProfile

    @classmethod
    def of(cls, info: EngineInfo, profile: LatencyProfile) -> "Measured":
        return cls(info.kind, info.target.digest, info.gamma_max, info.max_batch, profile)


class Profiles:
    """Keeps the newest profile of each engine in the leader's state."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: dict[str, Measured | None] = {}

    async def of(self, info: EngineInfo) -> LatencyProfile | None:
        """What the engine tells, else what it told when it last was the same. Raises `Unavailable`, `Superseded`."""
        state = self._context.state
        if info.engine not in self._kept:
            self._kept[info.engine] = await state.get(Measured, STATE, info.engine)
        kept = self._kept[info.engine]
        if info.profile is None:
            return kept.profile if kept is not None and kept == Measured.of(info, kept.profile) else None
        told = Measured.of(info, info.profile)
        if told != kept:
            await state.put(STATE, info.engine, told, self._context.leadership.require())
            self._kept[info.engine] = told
        return info.profile

    def forget(self, engines: set[str]) -> None:
        """Engines that are gone: another leader may keep another one before they come back."""
        for engine in engines:
            self._kept.pop(engine, None)
