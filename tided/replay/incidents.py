"""Incidents in virtual time: an engine's acceptance falls, by its traffic or by a fault, and tided's own deciders say which it is.

What decides is real: the trend, the suspicion with its comparisons, the collection machine, the self-test's machine. What is modelled is
the world around them: requests that differ (each has an alpha of its own) and finish at random times, samples that reach the store in
shards, a worker that takes seconds for a score, probes that see what a self-test sees, and an engine that stops drafting when that
does not pay. A fault is modelled by what it does: to what the engine accepts, to what it taps, and to what its greedy probes show.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tided.machine import collection, verification
from tided.machine.collection import (
    Collection,
    CollectionRules,
    Phase,
    RowsStored,
    StartTraining,
    TrainingEnded,
    TrendJudged,
)
from tided.machine.verification import Connected, Doubted, Probed, ReferenceFound, TimePassed
from tided.model.drafts import Evaluation, SamplingScore
from tided.model.engines import RequestStats
from tided.model.verification import Check, CheckOutcome, Verification, VerificationPhase, VerificationState
from tided.policies import suspicion
from tided.policies.faults import ServedClasses
from tided.policies.speedup import expected_length
from tided.policies.suspicion import Cause, Expected, Rules, Suspicion
from tided.policies.training import AcceptanceTrend

CYCLE_S = 0.5
BEGINS_S = 240.0
"""When the incident begins."""
LASTS_S = 420.0
"""How long it is looked at."""
SOON_S = 60.0
GRADUAL_S = 90.0
SHARD_AGE_S, PRESSED_AGE_S = 10.0, 1.0
SHARD_ROWS = 4096
UNKNOWABLE_S = SHARD_AGE_S
"""A training that begins so soon after a fault has the samples of before: those of the fault are not stored yet."""
PROBE_S = 4.0
WATCHED = 20
GAMMA = 4
SPREAD = 0.15
"""Deviation of requests' own alphas."""
RESTS_BELOW, RESTS_AFTER = 0.12, 8
"""Mean alpha of so many requests below which an engine stops drafting, where it does."""
SECOND = 1000
PROBES = "probes"
"""The alarm of the self-test."""


class Incident(StrEnum):
    NONE = "none"
    WRONG_LAYERS = "wrong layer ids"
    HALF_SWAP = "half-applied swap"
    STALE_VOCABULARY = "stale vocabulary map"
    TEMPERATURE = "temperature bug"
    SUDDEN_DRIFT = "sudden drift"
    GRADUAL_DRIFT = "gradual drift"
    DRIFT_AND_FAULT = "drift and a fault"

    @property
    def faulty(self) -> bool:
        return self not in (Incident.NONE, Incident.SUDDEN_DRIFT, Incident.GRADUAL_DRIFT)

    @property
    def drifts(self) -> bool:
        return self in (Incident.SUDDEN_DRIFT, Incident.GRADUAL_DRIFT)


@dataclass(frozen=True, slots=True)
class Scene:
    """`rate`: requests a second; `greedy`: their share; `alphas`: of greedy and of sampled requests, before. `moved`: the share of alpha
    that traffic leaves, `kept`: that a fault leaves. `tapped`: the fault is in the samples too. `probed`: the engine can be probed;
    `rests`: it stops drafting when little is accepted. `stopped`: collection had ended before."""

    incident: Incident
    seed: int
    rate: float
    greedy: float
    alphas: tuple[float, float]
    moved: float
    kept: float
    tapped: bool
    probed: bool
    rests: bool
    stopped: bool
    min_rows: int
    score_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in seconds after the incident began. `alarms`: (time, cause or PROBES)."""

    scene: Scene
    alarms: tuple[tuple[float, str], ...]
    trainings: tuple[float, ...]
    drifted_s: float | None
    unexplained: bool

    @property
    def alarmed_s(self) -> float | None:
        """When the first right alarm came."""
        return min((at for at, kind in self.alarms if right(self.scene, kind)), default=None)


def right(scene: Scene, alarm: str) -> bool:
    """Whether an alarm is about what is wrong: of a sampler it must not blame the draft, and the other way round."""
    if scene.incident is Incident.TEMPERATURE:
        return alarm in (Cause.SAMPLING, Cause.LIKELIEST, Cause.EITHER)
    return scene.incident.faulty and alarm in (Cause.DRAFT, Cause.EITHER, PROBES)


def scene(incident: Incident, seed: int) -> Scene:
    """A scene drawn at random."""
    draw = random.Random(f"{incident} {seed}")
    tapped = incident is Incident.WRONG_LAYERS and draw.random() < 0.5
    sampled_only = incident is Incident.TEMPERATURE
    greedy = draw.choice((0.0, 0.3, 0.5)) if sampled_only else draw.choice((0.3, 0.5, 1.0))
    high = draw.uniform(0.5, 0.75)
    drifting = incident.drifts or incident is Incident.DRIFT_AND_FAULT
    return Scene(
        incident,
        seed,
        rate=draw.uniform(2.0, 10.0),
        greedy=greedy,
        alphas=(high, high * draw.uniform(0.75, 0.95)),
        moved=draw.uniform(0.35, 0.75) if drifting else 1.0,
        kept=draw.uniform(0.15, 0.6) if incident.faulty else 1.0,
        tapped=tapped,
        probed=tapped or draw.random() < 0.5,
        rests=draw.random() < 0.5,
        stopped=draw.random() < 0.5,
        min_rows=draw.choice((5_000, 20_000)),
        score_s=draw.uniform(3.0, 8.0),
    )


@dataclass(slots=True)
class _Sample:
    at_ms: int
    temperature: float
    alpha: float  # as the samples say
    steps: int
    rows: int


@dataclass(slots=True)
class _World:
    scene: Scene
    draw: random.Random
    served: ServedClasses = field(default_factory=ServedClasses)
    trends: dict[float, AcceptanceTrend] = field(default_factory=dict[float, AcceptanceTrend])
    waiting: list[_Sample] = field(default_factory=list[_Sample])
    shards: list[list[_Sample]] = field(default_factory=list[list[_Sample]])
    state: Suspicion = field(default_factory=Suspicion)
    cycle: Collection = field(default_factory=Collection)
    verdict: Verification | None = None
    newest: deque[float] = field(default_factory=lambda: deque[float](maxlen=RESTS_AFTER))
    capturing: bool = True
    score: tuple[int, int] | None = None  # (when it is there, since when its samples are)
    watched: int = 0  # requests that the live watch still waits for
    alarms: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    trainings: list[float] = field(default_factory=list[float])
    drifted_s: float | None = None
    unexplained: bool = False


def play(scene: Scene) -> Outcome:
    """Run one scene to its end, or to the first training that the incident may have led to."""
    world = _World(scene, random.Random(scene.seed))
    rules = CollectionRules(min_rows=scene.min_rows, max_rows=3 * scene.min_rows)
    phase = Phase.STOPPED if scene.stopped else Phase.COLLECTING
    world.cycle = Collection(phase, trainings=1, deployed=1)
    if scene.probed:
        state, _ = verification.step(None, Connected(0, "e", "i", "t"))
        state, _ = verification.step(state, ReferenceFound(0))
        world.verdict, _ = verification.step(state, Probed(0, 1, _checks(None), "v"))
    _serve_version(world, "v", scene.alphas)
    end = round((BEGINS_S + LASTS_S) / CYCLE_S)
    for number in range(1, end):
        now_s = number * CYCLE_S
        if now_s == BEGINS_S and scene.incident in (Incident.HALF_SWAP, Incident.STALE_VOCABULARY):
            _swap(world)
        _serve(world, now_s)
        _store(world, now_s)
        _control(world, now_s, rules)
        if world.trainings and world.trainings[-1] > UNKNOWABLE_S:
            break
    return Outcome(scene, tuple(world.alarms), tuple(world.trainings), world.drifted_s, world.unexplained)


def _swap(world: _World) -> None:
    """A training has ended well, and its draft goes live once it has been watched; what was captured meanwhile is still there."""
    _serve_version(world, "w", world.scene.alphas)
    world.watched, world.shards = WATCHED, world.shards[-world.draw.randint(1, 10) :]
    world.cycle = replace(world.cycle, phase=Phase.TRAINING, trainings=2, job="job")


def _serve_version(world: _World, version: str, alphas: tuple[float, float]) -> None:
    """Its gate has measured it on greedy requests."""
    draw, lengths = world.draw, list[float]()
    for _ in range(60):
        lengths.append(expected_length(_own(draw, alphas[0]), GAMMA))
    evaluation = Evaluation(version, GAMMA, ("",) * 60, tuple(lengths), (60,) * 60, (alphas[0],) * GAMMA)
    world.state = Suspicion("i", version, asked_ms=-Rules().every_ms, expected=(Expected.by_gate(evaluation),))
    world.served, world.trends = ServedClasses(), {}


def _own(draw: random.Random, alpha: float) -> float:
    return min(0.98, max(0.01, draw.gauss(alpha, SPREAD * min(1.0, 2.0 * alpha))))


def _level(scene: Scene, now_s: float) -> float:
    """The share of alpha that the traffic leaves."""
    if now_s < BEGINS_S:
        return 1.0
    over_s = GRADUAL_S if scene.incident is Incident.GRADUAL_DRIFT else CYCLE_S
    return 1.0 - (1.0 - scene.moved) * min((now_s - BEGINS_S) / over_s, 1.0)


def _serve(world: _World, now_s: float) -> None:
    """The requests that finish in this cycle."""
    scene, draw = world.scene, world.draw
    count = sum(draw.random() < scene.rate * CYCLE_S / 20 for _ in range(20))
    faulty = scene.incident.faulty and now_s >= BEGINS_S
    at_ms = round(now_s * SECOND)
    for _ in range(count):
        temperature = 0.0 if draw.random() < scene.greedy else 0.7
        traffic = _own(draw, scene.alphas[temperature > 0.0] * _level(scene, now_s))
        hit = faulty and (temperature > 0.0 or scene.incident is not Incident.TEMPERATURE)
        alpha = traffic * scene.kept if hit else traffic
        resting = scene.rests and not world.state.held and _rests(world)
        gamma = 1 if resting or (world.state.held and _rests(world)) else GAMMA
        tokens = draw.randint(30, 100)
        accepted = steps = made = 0
        while made < tokens - 1:
            right = 0
            if not resting or made < 4:  # a probe touches its beginning
                steps += 1
                while right < gamma and draw.random() < alpha:
                    right += 1
            accepted, made = accepted + right, made + right + 1
        stats = RequestStats(draw.randint(20, 200), made + 1, steps, steps * gamma, accepted, "v", temperature)
        world.newest.append(alpha)
        world.served.add(stats, at_ms, world.capturing)
        trend = world.trends.get(temperature) or AcceptanceTrend.start(64, 512, 0.05).restart("v")
        world.trends[temperature] = trend.add(stats)
        world.watched = max(0, world.watched - 1)
        if world.capturing:
            rows = stats.prompt_tokens + stats.output_tokens
            world.waiting.append(_Sample(at_ms, temperature, alpha if scene.tapped else traffic, tokens, rows))


def _rests(world: _World) -> bool:
    return len(world.newest) == RESTS_AFTER and sum(world.newest) / RESTS_AFTER < RESTS_BELOW


def _store(world: _World, now_s: float) -> None:
    """The collector: shards by age and rows, soon where a question waits."""
    if not world.waiting:
        return
    age_s = PRESSED_AGE_S if world.state.wary(round(now_s * SECOND)) else SHARD_AGE_S
    old = now_s * SECOND - world.waiting[0].at_ms >= age_s * SECOND
    if old or sum(sample.rows for sample in world.waiting) >= SHARD_ROWS:
        world.shards.append(world.waiting)
        world.waiting = []


def _control(world: _World, now_s: float, rules: CollectionRules) -> None:
    """One cycle of the controller, as `tided.services` run it."""
    now_ms = round(now_s * SECOND)
    if _probing(world, now_s):
        return
    if world.verdict is not None and world.verdict.state is VerificationState.MISMATCH:
        return  # out of the pool: nothing is captured, nothing trained
    if not world.watched:
        world.cycle, _ = collection.step(world.cycle, TrainingEnded(now_ms, collection.Outcome.DEPLOYED), rules)
        _suspect(world, now_s)
    state = world.state
    low = ("e",) if state.drifted else ()
    before = world.cycle
    world.cycle, _ = collection.step(before, TrendJudged(now_ms, low, state.onset_ms), rules)
    if world.cycle.drifts > before.drifts and now_s >= BEGINS_S and world.drifted_s is None:
        world.drifted_s = now_s - BEGINS_S
    stored = [s for shard in world.shards if shard[-1].at_ms >= world.cycle.since_ms for s in shard]
    rows = sum(sample.rows for sample in stored)
    if state.suspected or state.wary(now_ms):
        rows = min(rows, rules.min_rows - 1)
    world.cycle, actions = collection.step(world.cycle, RowsStored(now_ms, rows), rules)
    if any(isinstance(action, StartTraining) for action in actions):
        if now_s < BEGINS_S:  # nothing has happened yet: as if it had ended well
            world.shards.clear()
            world.cycle = replace(world.cycle, phase=Phase.COLLECTING, rows=0)
        else:
            world.trainings.append(now_s - BEGINS_S)
    asked = bool(state.suspected) or state.wary(now_ms)
    world.capturing = asked or collection.capture_wanted(world.cycle, rules)


def _suspect(world: _World, now_s: float) -> None:
    scene, now_ms, rules = world.scene, round(now_s * SECOND), Rules()
    falls = [temperature for temperature, trend in world.trends.items() if trend.drifting]
    state, news = suspicion.look(world.state, world.served, falls, now_ms, rules, judgeable=True)
    wanted = suspicion.wish(state, world.served, now_ms, rules)
    if world.score is not None:
        if now_ms >= world.score[0]:
            scores = _scores(world, world.score[1])
            state, told = suspicion.judge(state, world.served, scores)
            news, world.score = news + told, None
    elif wanted is not None:
        samples = _since(world, wanted.since_ms)
        if wanted.ripe(len(samples), sum(sample.steps for sample in samples), world.served.mix()):
            state = suspicion.asked(state, wanted, "job", now_ms)
            world.score = (now_ms + round(scene.score_s * SECOND), wanted.since_ms)
    for item in news:
        if item.kind == "engine-fault-suspected" and item.found is not None:
            world.alarms.append((now_s - BEGINS_S, suspicion.cause(item.found, state)))
        world.unexplained = world.unexplained or item.kind == "acceptance-unexplained"
    world.state = state
    if state.questioned and world.verdict is not None and verification.may_doubt(world.verdict, state.onset_ms):
        world.verdict, _ = verification.step(world.verdict, Doubted(now_ms, state.onset_ms))


def _since(world: _World, since_ms: int) -> list[_Sample]:
    """What is stored of requests that ended since then, as shards tell it."""
    return [sample for shard in world.shards if shard[0].at_ms >= since_ms for sample in shard]


def _scores(world: _World, since_ms: int) -> tuple[SamplingScore, ...]:
    """What an evaluator says of the samples since then: some of them, by temperature."""
    samples = _since(world, since_ms)
    world.draw.shuffle(samples)
    chosen, tokens = list[_Sample](), 0
    for sample in samples:
        if tokens < suspicion.TOKENS:
            chosen.append(sample)
            tokens += sample.steps
    temperatures = sorted({sample.temperature for sample in chosen})
    return tuple(_score(at, [sample for sample in chosen if sample.temperature == at]) for at in temperatures)


def _score(temperature: float, samples: Sequence[_Sample]) -> SamplingScore:
    lengths = [expected_length(sample.alpha, GAMMA) for sample in samples]
    steps = [sample.steps / length for sample, length in zip(samples, lengths, strict=True)]
    reached, conditional = [1.0] * len(samples), list[float]()
    for _ in range(GAMMA):
        before = sum(n * reach for n, reach in zip(steps, reached, strict=True))
        reached = [reach * sample.alpha for reach, sample in zip(reached, samples, strict=True)]
        conditional.append(sum(n * reach for n, reach in zip(steps, reached, strict=True)) / before)
    accepted = tuple(n * (length - 1.0) for n, length in zip(steps, lengths, strict=True))
    likeliest = tuple(0.8 * value for value in conditional)
    return SamplingScore(temperature, tuple(steps), accepted, tuple(conditional), likeliest)


def _probing(world: _World, now_s: float) -> bool:
    """The self-test that a fall has asked for: whether the engine answers its probes now."""
    verdict, now_ms = world.verdict, round(now_s * SECOND)
    if verdict is None or verdict.phase is not VerificationPhase.PROBING:
        return False
    if now_ms - verdict.updated_ms < (PROBE_S + world.scene.score_s) * SECOND:
        world.verdict, _ = verification.step(verdict, TimePassed(now_ms))
        return now_ms - verdict.updated_ms < PROBE_S * SECOND
    checks = _checks(world.scene if now_s >= BEGINS_S else None)
    world.verdict, said = verification.step(verdict, Probed(now_ms, verdict.attempt, checks, "v"))
    world.alarms += [(now_s - BEGINS_S, PROBES) for item in said if item.kind == "engine-mismatch"]
    return False


def _checks(scene: Scene | None) -> tuple[Check, ...]:
    """What greedy probes and the reference show. None: all is well. Their own draft accepts what it should where nothing but sampling or
    traffic is wrong."""
    wrong = ""
    if scene is not None and scene.incident.faulty and scene.incident is not Incident.TEMPERATURE:
        wrong = "layer ids" if scene.tapped else "draft acceptance"
    names = ("token ids", "token alignment", "layer ids", "norms", "dtype", "accuracy", "draft acceptance")
    return tuple(Check(name, CheckOutcome.FAILED if name == wrong else CheckOutcome.OK, "") for name in names)


@dataclass(frozen=True, slots=True)
class Row:
    """All outcomes of one incident. `median_s`, `worst_s`: of the first right alarm. `trained_at_once`: within `UNKNOWABLE_S` of its
    beginning; they are not among the `trained`."""

    incident: Incident
    runs: int
    alarmed: int
    right_soon: int
    wrong: int
    trained: int
    trained_at_once: int
    drifts: int
    unexplained: int
    median_s: float | None
    worst_s: float | None


def row(incident: Incident, outcomes: Sequence[Outcome]) -> Row:
    """One line of the confusion table. An alarm before the incident, or about what is not wrong, is `wrong`."""
    times = sorted(found for outcome in outcomes if (found := outcome.alarmed_s) is not None)
    return Row(
        incident=incident,
        runs=len(outcomes),
        alarmed=sum(bool(outcome.alarms) for outcome in outcomes),
        right_soon=sum(0.0 <= at <= SOON_S for at in times),
        wrong=sum(any(at < 0 or not right(o.scene, kind) for at, kind in o.alarms) for o in outcomes),
        trained=sum(any(at > UNKNOWABLE_S for at in outcome.trainings) for outcome in outcomes),
        trained_at_once=sum(bool(o.trainings) and max(o.trainings) <= UNKNOWABLE_S for o in outcomes),
        drifts=sum(outcome.drifted_s is not None for outcome in outcomes),
        unexplained=sum(outcome.unexplained for outcome in outcomes),
        median_s=times[len(times) // 2] if times else None,
        worst_s=times[-1] if times else None,
    )


def confusion(runs: int) -> list[Row]:
    """Every incident, so many times each."""
    return [row(incident, [play(scene(incident, seed)) for seed in range(runs)]) for incident in Incident]
