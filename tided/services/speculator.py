"""How many tokens each engine drafts: the operator's setting, or the speculation policy fed from the monitor."""

from dataclasses import replace
from typing import Any

import structlog

from tided.config import SpeculationConfig
from tided.model.engines import EngineInfo, LatencyProfile
from tided.model.errors import Refused
from tided.model.policy import PolicySetting, SpeculationMode
from tided.policies.base import SpeculationDecision, SpeculationObservation, SpeculationPolicy
from tided.policies.registry import policy_for
from tided.policies.speedup import smoothed
from tided.services.context import Context
from tided.services.monitor import EngineView
from tided.services.profiles import Profiles

_log = structlog.get_logger()


class Speculator:
    """Holds the policy's state for each engine incarnation; `decisions` are the newest, for the status."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.profiles = Profiles(context)
        self._made: tuple[SpeculationConfig, SpeculationPolicy[Any] | Refused] | None = None
        self._states: dict[str, tuple[str, Any]] = {}
        self.decisions: dict[str, SpeculationDecision] = {}
        self.problems: dict[str, str] = {}
        """By engine: why the policy cannot decide; it keeps the schedule that it has."""

    async def decide(
        self,
        view: EngineView,
        setting: PolicySetting,
        config: SpeculationConfig,
        now_s: float,
        *,
        watching: bool,
        held: bool = False,
    ) -> SpeculationDecision:
        """The schedule that the engine should have now, with the figures that led to it. `held`: a token in every step at least, for
        only requests that are drafted for throughout can tell what is wrong. Raises `Unavailable`, `Superseded`."""
        await self._expect(view)
        profile = await self.profiles.of(view.info)
        decision = self._decide(view, profile, setting, config, now_s, watching=watching)
        if held and setting.mode is SpeculationMode.AUTO and view.version:
            gammas = tuple(max(gamma, 1) for gamma in decision.gammas)
            reason = "a token is drafted in every step until it is known why acceptance fell"
            decision = replace(decision, gammas=gammas, probing=True, reason=reason)
        self.decisions[view.engine] = decision
        return decision

    def forget(self, engines: set[str]) -> None:
        """Engines that are gone."""
        self.profiles.forget(engines)
        for engine in engines:
            self._states.pop(engine, None)
            self.decisions.pop(engine, None)
            self.problems.pop(engine, None)

    def _decide(
        self,
        view: EngineView,
        profile: LatencyProfile | None,
        setting: PolicySetting,
        config: SpeculationConfig,
        now_s: float,
        *,
        watching: bool,
    ) -> SpeculationDecision:
        info, (measured, shadow) = view.info, view.told()
        before = self.problems.pop(view.engine, "")
        gamma_max = min(config.gamma_max, info.gamma_max)
        alpha = view.acceptance.alpha
        if setting.mode is SpeculationMode.OFF:
            return _constant(info, 0, alpha, "the operator set speculation off")
        if setting.mode is SpeculationMode.FIXED:
            gamma = min(setting.gamma, info.gamma_max) if info.version else 0
            return _constant(info, gamma, alpha, f"the operator set {setting.gamma} drafted tokens")
        if profile is None:
            return _constant(info, 0, alpha, "the engine has no latency profile: no speedup can be predicted")
        seen = SpeculationObservation(
            now_s=now_s,
            version=view.version,
            profile=smoothed(profile),
            acceptance=view.acceptance,
            measured=measured,
            running=view.running,
            max_batch=info.max_batch,
            gamma_max=gamma_max,
            eager=watching,
            shadow=shadow,
        )
        try:
            policy = self._policy(config)
            incarnation, state = self._states.get(view.engine, ("", None))
            if incarnation != info.incarnation:
                state = policy.start()
            state, decision = policy.decide(state, seen)
        except Refused as exc:
            if str(exc) != before:
                _log.error("policy-failed", engine=view.engine, why=str(exc))
            self.problems[view.engine] = str(exc)
            return SpeculationDecision(in_force(info), (), alpha, False, f"schedule kept: {exc}")
        self._states[view.engine] = (info.incarnation, state)
        return decision

    def _policy(self, config: SpeculationConfig) -> SpeculationPolicy[Any]:
        """The configured policy, made anew when its configuration has changed. Raises `Refused` as long as it cannot be made."""
        if self._made is None or self._made[0] != config:
            if self._made is not None and self._made[0].policy != config.policy:
                self._states.clear()
            try:
                made = policy_for(config)
            except Refused as exc:
                made = exc
            self._made = config, made
        if isinstance(self._made[1], Refused):
            raise Refused(str(self._made[1]))
        return self._made[1]

    async def _expect(self, view: EngineView) -> None:
        """A version that was just deployed is judged by its gate's evaluation until it has been served for a while."""
        if view.expected or not view.version:
            return
        draft = await self._context.find_draft(view.version)
        view.expect(draft.evaluation.conditional if draft is not None and draft.evaluation is not None else ())


def in_force(info: EngineInfo) -> tuple[int, ...]:
    """The engine's schedule with one entry for each batch size; its last entry holds beyond."""
    gammas = info.gammas or (0,)
    return tuple(gammas[min(batch, len(gammas)) - 1] for batch in range(1, info.max_batch + 1))


def _constant(info: EngineInfo, gamma: int, alpha: float | None, reason: str) -> SpeculationDecision:
    return SpeculationDecision((gamma,) * info.max_batch, (), alpha, False, reason)
