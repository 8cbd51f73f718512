"""What is known about each engine: its heartbeat, and windows over its reports. Nothing here decides or writes.

Counts of acceptance belong to one version and are forgotten when another serves. They fade with a half-life in request-steps, so
that they follow the traffic at any speed; a new version starts with its gate's evaluation as prior, which fades likewise. Drift and faults
are judged by temperature: requests that were sampled accept less than greedy ones, so a change of their mix is neither.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from tided.backends.base import Backend
from tided.backends.guarded import AbsentBackend
from tided.backends.registry import backend_for
from tided.config import TrainingConfig
from tided.model.deployments import ServedSums
from tided.model.drafts import Evaluation
from tided.model.engines import EngineInfo, Observation, RequestStats, StepCounts, TapTotals
from tided.model.errors import Refused
from tided.policies.faults import ServedClasses
from tided.policies.speedup import HALF_LIFE_TRIALS, Acceptance, expected_length
from tided.policies.training import AcceptanceTrend, request_alpha
from tided.store.engines import EngineStore

PRIOR_TRIALS = 64.0
SHADOW_TRIALS = 400.0
"""What a score on tapped states is worth at most: steps of one request are alike."""
RATE_WINDOW_S = 10.0
MOST_UNTOLD = 1000
"""Counts kept for the policy of an engine that it is not asked about."""
_READ_LIMIT = 500

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Slice:
    """One report's share of the rates: when it came, requests finished, tokens emitted, request-steps that drafted, and their tokens."""

    at_s: float
    requests: int
    tokens: int
    spec_steps: int
    spec_tokens: int


@dataclass(slots=True)
class Meter:
    """What the finished requests of one version accepted: all since it serves, and of late (a half-life in request-steps, as `live`).

    Each request counts at `gamma`, whatever the policy let it draft (Eq. 2 at its own alpha), so that versions compare at `gamma`.
    """

    gamma: int
    version: str = ""
    total: ServedSums = field(default_factory=ServedSums)
    recent: ServedSums = field(default_factory=ServedSums)

    def add(self, stats: RequestStats) -> None:
        alpha = request_alpha(stats)
        if alpha is not None and stats.version == self.version:
            new = ServedSums.of(stats.spec_steps, stats.spec_steps * (expected_length(alpha, self.gamma) - 1.0))
            self.total = self.total.plus(new)
            self.recent = self.recent.plus(new, 0.5 ** (new.steps / HALF_LIFE_TRIALS))


@dataclass(slots=True)
class EngineView:
    """One engine as seen now. Mutable, owned by the monitor; `live` and `prior` together are what the policy sees."""

    info: EngineInfo
    backend: Backend
    fresh_trend: AcceptanceTrend  # of a temperature that was not seen yet
    meter: Meter
    first_seen_s: float
    cursor: str = ""
    version: str = ""
    prior: Acceptance = field(default_factory=Acceptance)
    live: Acceptance = field(default_factory=Acceptance)
    running: int = 0
    waiting: int = 0
    tap: TapTotals = field(default_factory=TapTotals)
    measured: deque[StepCounts] = field(default_factory=lambda: deque(maxlen=MOST_UNTOLD))  # not yet told to the policy
    shadow: Acceptance = field(default_factory=Acceptance)  # scored offline, not yet told to the policy
    batch_s: dict[int, float] = field(default_factory=dict)  # seconds spent at each batch size, fading
    expected: bool = False  # the prior of this version was looked up
    last_report_s: float | None = None
    trends: dict[float | None, AcceptanceTrend] = field(default_factory=dict[float | None, AcceptanceTrend])
    served: ServedClasses = field(default_factory=ServedClasses)  # by this version
    before: ServedClasses = field(default_factory=ServedClasses)  # and by the one before it
    fault: str = ""  # of its adapter, which could not look at it in the newest poll
    slices: deque[_Slice] = field(default_factory=deque)

    @property
    def engine(self) -> str:
        return self.info.engine

    @property
    def acceptance(self) -> Acceptance:
        """Recent counts of the served version, its prior included."""
        return self.live.plus(self.prior)

    @property
    def trend(self) -> AcceptanceTrend:
        """That of the temperature whose acceptance has drifted; if none has, of the one with most requests."""
        trends = self.trends.values()
        return max(trends, key=lambda trend: (trend.drifting, trend.samples), default=self.fresh_trend)

    def falls(self) -> tuple[float | None, ...]:
        """The temperatures whose acceptance is below its long average."""
        return tuple(temperature for temperature, trend in self.trends.items() if trend.drifting)

    @property
    def rises(self) -> bool:
        """Whether the acceptance of a temperature is above its long average."""
        return any(trend.rising for trend in self.trends.values())

    def expect(self, conditional: tuple[float, ...]) -> None:
        """What an evaluation of the served version says about its acceptance."""
        self.prior = Acceptance.prior(conditional, PRIOR_TRIALS)
        self.expected = True

    def hear(self, evaluation: Evaluation) -> None:
        """What the served version scores on states that were just tapped counts as if so many steps had drafted."""
        steps = sum(evaluation.tokens) / evaluation.length if evaluation.tokens else 0.0
        found = Acceptance.prior(evaluation.conditional, min(steps, SHADOW_TRIALS))
        self.live, self.prior = self.live.faded(found.steps).plus(found), self.prior.faded(found.steps)
        self.shadow = self.shadow.plus(found)

    def take(self, observation: Observation, now_s: float) -> None:
        """Count one report in."""
        self.running, self.waiting, self.tap = observation.running, observation.waiting, observation.tap
        self.last_report_s = now_s
        self._rate(observation, now_s)
        if observation.version != self.version:
            # The report in which the version changed mixes both: its acceptance is nobody's.
            self.restart(observation.version)
            return
        new = Acceptance.of(observation.steps)
        self.live = self.live.faded(new.steps).plus(new)
        self.prior = self.prior.faded(new.steps)
        self.measured += observation.steps
        for stats in observation.requests:
            self.meter.add(stats)
            if stats.version == self.version:
                found = self.served.add(stats, observation.at_ms, self.info.capturing)
                self.trends[found] = self.trends.get(found, self.fresh_trend).add(stats)

    def restart(self, version: str) -> None:
        """Another version serves: forget the acceptance of the one before."""
        self.version, self.prior, self.live = version, Acceptance(), Acceptance()
        self.meter = Meter(self.info.gamma_max, version)
        self.fresh_trend, self.expected = self.fresh_trend.restart(version), False
        if self.served.classes:
            self.before = self.served
        self.trends, self.served = {}, ServedClasses()
        self.measured.clear()
        self.shadow = Acceptance()

    def told(self) -> tuple[tuple[StepCounts, ...], Acceptance]:
        """What was measured, and what was scored, since the last call: the policy is told it once."""
        told, shadow = tuple(self.measured), self.shadow
        self.measured.clear()
        self.shadow = Acceptance()
        return told, shadow

    def tokens_per_s(self, now_s: float) -> float | None:
        """Tokens emitted a second over the last RATE_WINDOW_S; None without a report in it."""
        self._forget(now_s)
        if not self.slices:
            return None
        return sum(part.tokens for part in self.slices) / min(RATE_WINDOW_S, max(1.0, now_s - self.first_seen_s))

    def finished(self, now_s: float) -> int:
        """Requests that ended in the last RATE_WINDOW_S."""
        self._forget(now_s)
        return sum(part.requests for part in self.slices)

    def accept_length(self, now_s: float) -> float | None:
        """Tokens a drafting request-step emitted over the last RATE_WINDOW_S, bonus token included; None if none drafted."""
        self._forget(now_s)
        steps = sum(part.spec_steps for part in self.slices)
        return sum(part.spec_tokens for part in self.slices) / steps if steps else None

    def _rate(self, observation: Observation, now_s: float) -> None:
        tokens = spec_steps = spec_tokens = 0
        for counts in observation.steps:
            emitted = sum((k + 1) * n for k, n in enumerate(counts.accepted))
            tokens += emitted
            if counts.gamma:
                spec_steps += sum(counts.accepted)
                spec_tokens += emitted
            self.batch_s[counts.batch] = self.batch_s.get(counts.batch, 0.0) + counts.seconds
        if observation.steps or observation.requests:
            self.slices.append(_Slice(now_s, len(observation.requests), tokens, spec_steps, spec_tokens))

    def _forget(self, now_s: float) -> None:
        while self.slices and self.slices[0].at_s < now_s - RATE_WINDOW_S:
            self.slices.popleft()


class Monitor:
    """Keeps one `EngineView` for each engine whose heartbeat is fresh."""

    def __init__(self, store: EngineStore, training: Callable[[str], TrainingConfig]) -> None:
        self._store = store
        self._training = training
        self.views: dict[str, EngineView] = {}

    async def poll(self, now_s: float) -> None:
        """Read heartbeats and the reports since the last poll. Raises `Unavailable`; what was read until then is kept."""
        infos = {info.engine: info for info in await self._store.list()}
        for engine in self.views.keys() - infos.keys():
            _log.info("engine-gone", engine=engine)
            del self.views[engine]
        for engine, info in infos.items():
            view = self.views.get(engine)
            if view is None or view.info.incarnation != info.incarnation:
                _log.info("engine-seen", engine=engine, incarnation=info.incarnation, version=info.version[:12])
                view = self.views[engine] = self._fresh(info, now_s)
            view.info = info
            try:
                observations, view.cursor = await view.backend.observe(view.cursor)
                view.fault = ""
            except Refused as exc:
                view.fault = str(exc)
                continue
            for observation in observations:
                if observation.incarnation == info.incarnation:
                    view.take(observation, now_s)
            if view.version != info.version and not observations:
                view.restart(info.version)

    def _fresh(self, info: EngineInfo, now_s: float) -> EngineView:
        settings = self._training(info.target.digest)
        trend = AcceptanceTrend.start(settings.short_window, settings.long_window, settings.epsilon)
        try:
            backend = backend_for(info, self._store)
        except Refused as exc:
            backend = AbsentBackend(info.engine, str(exc))
        view = EngineView(info, backend, trend, Meter(info.gamma_max), now_s)
        view.restart(info.version)
        return view
