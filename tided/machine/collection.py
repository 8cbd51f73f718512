"""When to collect samples and when to train: Algorithm 1 of TIDE (arXiv 2602.05145), for the engines of one target.

Collection starts on. At `min_rows` stored rows a training job begins, from the current draft. A better draft is deployed and
everything starts over; a worse one ends collection until acceptance drifts. What the paper leaves open and we add: the cool-down
between trainings, a budget of jobs and worker time an hour, the plateau (better, but by next to nothing: as good as worse), the outcomes
"undecided" (too few held-out requests to judge) and "pooled" (better, for traffic that has gone meanwhile: kept for its return), and
failures, which cost a cool-down only.

    collecting -> training -> collecting (deployed, pooled, undecided, failed)
                  training -> stopped (worse, rolled back, plateau; never from a cold start, nor in a drift)
    stopped -> collecting (drift)

The averages that judge drift are `tided.policies.training.AcceptanceTrend`; the store counts rows since `since_ms`.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from tided.model.errors import InvariantBroken
from tided.model.jobs import Recipe


class Phase(StrEnum):
    COLLECTING = "collecting"
    TRAINING = "training"  # a job is under way, or its draft is being gated, swapped or watched
    STOPPED = "stopped"  # the last training gave nothing better: wait for drift


class Outcome(StrEnum):
    DEPLOYED = "deployed"  # better, and it survived its watch
    POOLED = "pooled"  # better, for traffic that has gone meanwhile: kept until that comes back
    WORSE = "worse"  # the gate refused it
    UNDECIDED = "undecided"  # too few held-out requests to tell: wait for more
    FAILED = "failed"  # the job or the deployment failed: says nothing about the draft
    ROLLED_BACK = "rolled-back"


@dataclass(frozen=True, slots=True)
class CollectionRules:
    """`max_rows` bounds what is captured ahead while a training is under way.

    Of trainings that begin of themselves: `jobs_per_hour` and `worker_ms_per_hour` bound what begins in any hour, 0 for no bound; each
    may take `job_ms`. `plateau_gain`: after `PLATEAU` drafts in a row that gained less than this share each, wait for drift; 0: never.
    """

    min_rows: int = 20_000
    max_rows: int = 60_000
    cool_down_ms: int = 20_000
    jobs_per_hour: int = 0
    worker_ms_per_hour: int = 0
    job_ms: int = 180_000
    plateau_gain: float = 0.0


DEFAULT_RULES = CollectionRules()
HOUR_MS = 3_600_000
PLATEAU = 2
LEARNING = 0.05
"""Share by which a draft of which much is still to come is longer than the one before (docs/adr/0010-training-recipe.md)."""


@dataclass(frozen=True, slots=True)
class Collection:
    phase: Phase = Phase.COLLECTING
    rows: int = 0  # stored and not yet consumed, since `since_ms`
    since_ms: int = 0  # samples from before are of another regime: replay at most
    low: tuple[str, ...] = ()  # engines whose trend was below its threshold when last judged
    drifts: int = 0
    drifts_seen: int = 0  # of these, when the newest training began
    drifts_answered: int = (
        0  # of these, when the newest training that gave a verdict began, or a pooled draft came back
    )
    deployed: int = 0
    trainings: int = 0
    not_before_ms: int = 0  # the cool-down's end
    job: str = ""
    domain: int = 0  # the kind of traffic that the training under way is for, by its number in the pool; 0: not known
    moved: bool = False  # acceptance has drifted since that training began
    spent: tuple[tuple[int, int], ...] = ()  # (beginning, worker time) of the last hour's trainings
    gains: tuple[float, ...] = ()  # of the newest drafts that were deployed since the newest drift, as shares

    @property
    def drifting(self) -> bool:
        """Acceptance has drifted, and no training since has given a verdict."""
        return self.drifts > self.drifts_answered


# --- events ---


@dataclass(frozen=True, slots=True)
class RowsStored:
    """The store's count of unconsumed training rows since `since_ms`: a level, not a difference."""

    now_ms: int
    rows: int


@dataclass(frozen=True, slots=True)
class TrendJudged:
    """The engines whose acceptance is below what it was, by the traffic, as far as is known. `since_ms`: when that began, 0 for now."""

    now_ms: int
    low: tuple[str, ...]
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class TrainingRequested:
    """An operator wants a training now, cool-down or not."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """`domain`: that of the traffic which it trains on, 0 without a pool of drafts."""

    now_ms: int
    job: str
    domain: int = 0


@dataclass(frozen=True, slots=True)
class TrainingEnded:
    """`gain`: by which share the gate found the new draft better; `worker_ms`: what the job took."""

    now_ms: int
    outcome: Outcome
    gain: float = 1.0
    worker_ms: int = 0


@dataclass(frozen=True, slots=True)
class DriftAnswered:
    """The first `drifts` drifts are answered without a training: a draft of an earlier domain serves. A level, not a difference."""

    now_ms: int
    drifts: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    now_ms: int


CollectionEvent = (
    RowsStored | TrendJudged | TrainingRequested | JobSubmitted | TrainingEnded | DriftAnswered | TimePassed
)

# --- actions ---


@dataclass(frozen=True, slots=True)
class StartTraining:
    """Submit a job on the rows since `since_ms` (older ones as replay), then report `JobSubmitted`; `FAILED` if that is impossible."""

    recipe: Recipe
    since_ms: int


@dataclass(frozen=True, slots=True)
class AnnounceDrift:
    engines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RestartTrend:
    """A new draft serves: its acceptance has another level, so the averages begin anew."""


@dataclass(frozen=True, slots=True)
class Reject:
    """For the operator who asked."""

    why: str


CollectionAction = StartTraining | AnnounceDrift | RestartTrend | Reject
Step = tuple[Collection, tuple[CollectionAction, ...]]


def capture_wanted(state: Collection, rules: CollectionRules = DEFAULT_RULES) -> bool:
    """Whether the engines should tap: only while their samples may be trained on."""
    return state.phase is not Phase.STOPPED and state.rows < rules.max_rows


def plateaued(state: Collection, rules: CollectionRules) -> bool:
    """Whether the newest drafts were better by next to nothing."""
    return len(state.gains) >= PLATEAU and max(state.gains) < rules.plateau_gain


def over_budget(state: Collection, now_ms: int, rules: CollectionRules) -> str:
    """Why the budget of this hour allows no training now, or ""."""
    spent = _within_hour(state.spent, now_ms)
    if rules.jobs_per_hour and len(spent) >= rules.jobs_per_hour:
        return f"{len(spent)} trainings began within the hour: training.jobs_per_hour"
    if rules.worker_ms_per_hour and sum(ms for _, ms in spent) + rules.job_ms > rules.worker_ms_per_hour:
        took_s = sum(ms for _, ms in spent) / 1000
        return f"trainings took {took_s:.0f} s of workers within the hour: training.worker_s_per_hour"
    return ""


def _within_hour(spent: tuple[tuple[int, int], ...], now_ms: int) -> tuple[tuple[int, int], ...]:
    return tuple((began_ms, worker_ms) for began_ms, worker_ms in spent if now_ms - began_ms < HOUR_MS)


def recipe(state: Collection) -> Recipe:
    """Small rates are for a draft that is nearly right: while the newest one gained much, the next samples teach as much again."""
    if state.deployed == 0:
        return Recipe.COLD
    learning = state.drifting or (state.gains and state.gains[-1] >= LEARNING)
    return Recipe.DRIFT if learning else Recipe.REFRESH


def step(state: Collection, event: CollectionEvent, rules: CollectionRules = DEFAULT_RULES) -> Step:
    """Total: an event that says nothing in a phase changes nothing."""
    match event:
        case RowsStored(now_ms, rows):
            return _train_if_due(replace(state, rows=rows), now_ms, rules)
        case TimePassed(now_ms):
            return _train_if_due(state, now_ms, rules)
        case TrendJudged(now_ms, low, since_ms):
            return _trend_judged(state, max(min(since_ms or now_ms, now_ms), state.since_ms), low)
        case TrainingRequested(now_ms):
            return _requested(state, now_ms)
        case JobSubmitted(_, job, domain):
            return (replace(state, job=job, domain=domain), ()) if state.phase is Phase.TRAINING else (state, ())
        case TrainingEnded():
            return _ended(state, event, rules) if state.phase is Phase.TRAINING else (state, ())
        case DriftAnswered(_, drifts):
            return _drift_answered(state, min(drifts, state.drifts)), ()


def validate_state(state: Collection) -> None:
    """Raise `InvariantBroken` for a state that no sequence of events can reach."""
    wrong = (
        (bool(state.job) and state.phase is not Phase.TRAINING, "a job outside training"),
        (
            bool(state.domain or state.moved) and state.phase is not Phase.TRAINING,
            "a training's traffic outside training",
        ),
        (min(state.rows, state.deployed, state.drifts, state.trainings) < 0, "a negative count"),
        (state.deployed > state.trainings, "more deployed than trained"),
        (not 0 <= state.drifts_answered <= state.drifts_seen <= state.drifts, "drifts do not add up"),
        (len(state.gains) > PLATEAU, "more gains than are looked at"),
        (state.phase is Phase.STOPPED and state.drifting, "stopped in a drift"),
        (state.phase is Phase.STOPPED and state.deployed == 0, "stopped without any draft but the cold one"),
    )
    for broken, what in wrong:
        if broken:
            raise InvariantBroken(f"collection in phase {state.phase}: {what}")


def _train_if_due(state: Collection, now_ms: int, rules: CollectionRules) -> Step:
    due = state.rows >= rules.min_rows and now_ms >= state.not_before_ms
    due = due and state.phase is Phase.COLLECTING and not over_budget(state, now_ms, rules)
    return _train(state, now_ms) if due else (state, ())


def _train(state: Collection, now_ms: int) -> Step:
    training = replace(
        state,
        phase=Phase.TRAINING,
        trainings=state.trainings + 1,
        drifts_seen=state.drifts,
        spent=(*_within_hour(state.spent, now_ms), (now_ms, 0)),
    )
    return training, (StartTraining(recipe(state), state.since_ms),)


def _requested(state: Collection, now_ms: int) -> Step:
    """An operator is bound by no budget, but what is asked for counts."""
    if state.phase is Phase.TRAINING:
        return state, (Reject("a training is already under way"),)
    if state.rows == 0:
        return state, (Reject("no samples are stored to train on"),)
    return _train(state, now_ms)


def _trend_judged(state: Collection, since_ms: int, low: tuple[str, ...]) -> Step:
    """A drift is noted as one engine's acceptance falls below the threshold, and once only until a training has answered it: a trend that
    stays low, or hovers, must neither train for ever nor push the start of its samples ahead of itself."""
    fell = tuple(engine for engine in low if engine not in state.low)
    judged = replace(state, low=low)
    in_training = state.phase is Phase.TRAINING
    if not fell or state.drifts > (state.drifts_seen if in_training else state.drifts_answered):
        return judged, ()
    phase = Phase.TRAINING if in_training else Phase.COLLECTING
    drifted = replace(judged, phase=phase, moved=in_training, drifts=state.drifts + 1, since_ms=since_ms)
    return replace(drifted, rows=0, gains=()), (AnnounceDrift(fell),)


def _drift_answered(state: Collection, drifts: int) -> Collection:
    """The next fall is a drift again."""
    if drifts <= state.drifts_answered:
        return state
    return replace(state, low=(), drifts_answered=drifts, drifts_seen=max(drifts, state.drifts_seen))


def _ended(state: Collection, event: TrainingEnded, rules: CollectionRules) -> Step:
    began_ms = state.spent[-1][0] if state.spent else event.now_ms
    cooling = replace(
        state,
        phase=Phase.COLLECTING,
        job="",
        domain=0,
        moved=False,
        not_before_ms=event.now_ms + rules.cool_down_ms,
        spent=(*state.spent[:-1], (began_ms, event.worker_ms)),
    )
    if event.outcome in (Outcome.UNDECIDED, Outcome.FAILED):
        return cooling, ()
    answered = replace(cooling, drifts_answered=state.drifts_seen)
    if event.outcome is Outcome.DEPLOYED:
        gains = (*state.gains, event.gain)[-PLATEAU:]
        deployed = replace(answered, low=(), deployed=state.deployed + 1, gains=gains)
        stop = plateaued(deployed, rules) and not deployed.drifting
        return replace(deployed, phase=Phase.STOPPED if stop else Phase.COLLECTING), (RestartTrend(),)
    if event.outcome is Outcome.POOLED:
        # What serves is as it was. The next training is the first for the traffic that is served now: it waits for no more than its rows.
        return replace(answered, not_before_ms=state.not_before_ms) if answered.drifting else answered, ()
    # A cold draft accepts next to nothing, so no drift could ever start collection again: go on trying.
    stop = answered.deployed > 0 and not answered.drifting
    return replace(answered, phase=Phase.STOPPED if stop else Phase.COLLECTING), ()
