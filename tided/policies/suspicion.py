"""Has the traffic moved, or is the engine at fault? One engine's newest fall of acceptance, and what has been found out about it.

A fall alone says neither. So it opens a question, and while that is open nothing is trained: the draft that serves is scored on what was
captured since the fall began. The answer is DRIFT when it scores as low as it serves, or when the score has surely fallen by most of what
the newest requests have; FAULT when it scores surely more; NONE when the fall has passed and it scores what it did before. A fall is the
trend's (`tided.policies.training`) or newest requests that are surely below what the draft is expected to give: what its gate's evaluation
said of greedy requests, or what its own newest score said. Before it is sure, newest requests that sag are reason enough to tap, and to
wait with a training (`wary`): then samples are there when the question is asked. Where the speculation policy has stopped drafting
meanwhile, too little is served to compare; then it is DRIFT if the score has fallen by most of what the newest requests have, and if it has
not, some requests must be drafted for (`held`). A question that nobody could answer in time is answered LATE, and taken for drift: a
missing worker must not keep a target from training for ever.

Without a fall the draft is scored now and then all the same, one temperature after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import sqrt

from tided.model.drafts import Evaluation, SamplingScore
from tided.model.engines import RequestStats
from tided.policies.faults import (
    MARGIN,
    MIN_PROMPTS,
    MIN_SCORED_STEPS,
    SURE,
    Comparison,
    ServedClass,
    ServedClasses,
    Verdict,
    accepted_at,
    compare,
    ratio,
)
from tided.policies.speedup import alpha_from_length

NEWEST = (8, 16, 32)
"""So many newest requests of one temperature are held against what is expected."""
LEAST_STEPS = 60
"""Drafting steps of the newest requests, where few steps of a request draft."""
GATE_MARGIN = 0.5
"""By such a share of its accepted tokens a draft must fall short of its gate to have met other traffic."""
EXPLAINED = 0.7
"""Share of the trend's fall that the score's must reach to be its cause."""
FEW, HUNCH = 6, 2.5
"""So many newest requests that are so many standard errors below those before are reason to be wary. About one in 160 is so by chance."""
WARY_MS = 30_000
"""For so long, and not again for as long: then it is sure, or it was nothing."""
LATEST = 4
"""Requests on each side, at least, of the moment at which acceptance fell,"""
LOOKBACK_MS = 60_000
"""and how long ago it is looked for: where few requests come it takes half a minute until a fall is sure."""
RESPITE = 10
"""Once training has waited in vain and no score came, it waits for none, for so many times as long."""
TOKENS = 4_000
"""Generated tokens that are scored at most: seconds of one core, for sampled requests need the target's whole head."""
COMMON = 0.25
"""Prompts enough for a temperature of this share of the requests are enough for a rarer one: nobody would wait for more."""
RARE = 0.01
"""Share of the requests below which a temperature is hardly served any more."""


class Answer(StrEnum):
    NONE = ""  # nothing has fallen
    OPEN = "open"
    DRIFT = "drift"
    FAULT = "fault"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the draft is expected to give at a temperature. `error`: its standard error, as a share; `own`: by a score on this engine's
    samples, and not by its gate's evaluation, which is of all engines of the target; `alone`: but there was no other."""

    temperature: float
    conditional: tuple[float, ...]
    error: float
    own: bool = False
    alone: bool = False

    @classmethod
    def by_gate(cls, evaluation: Evaluation, *, alone: bool = False) -> "Expected":
        """Of greedy requests: the evaluation is greedy."""
        accepted = [(length - 1.0) * n for length, n in zip(evaluation.lengths, evaluation.tokens, strict=True)]
        mean, error = ratio(accepted, [float(n) for n in evaluation.tokens])
        return cls(0.0, evaluation.conditional, error / mean if mean > 0.0 else 0.0, alone=alone)

    @classmethod
    def by_score(cls, score: SamplingScore) -> "Expected":
        mean, error = ratio(score.accepted, score.steps)
        return cls(score.temperature, score.conditional, error / mean if mean > 0.0 else 0.0, own=True)

    @property
    def of_this_engine(self) -> bool:
        """Whether it is of this engine's traffic alone."""
        return self.own or self.alone

    @property
    def accepted(self) -> float:
        """Drafted tokens accepted a step, of as many as it was scored with."""
        return accepted_at(self.conditional, len(self.conditional))

    @property
    def alpha(self) -> float:
        return alpha_from_length(1.0 + self.accepted, len(self.conditional))

    def missed_by(self, served: ServedClass) -> bool:
        """Whether newest requests, few or more of them, surely accept less. A version that nobody has scored here yet must answer for those
        that a probe only touched, too: it may accept so little that it is not drafted with any more."""
        requests = [stats for _, stats in (served.whole if self.own else served.drafted)]
        return any(len(requests) >= count and self._missed(requests[-count:]) for count in NEWEST)

    def _missed(self, newest: Sequence[RequestStats]) -> bool:
        steps = [float(stats.spec_steps) for stats in newest]
        got, error = ratio([float(stats.accepted) for stats in newest], steps)
        could = [accepted_at(self.conditional, stats.drafted / stats.spec_steps) for stats in newest]
        mean = sum(n * value for n, value in zip(steps, could, strict=True)) / sum(steps)
        # Student's t at the same chance, to first order: the error of few requests is itself not sure.
        sure = SURE + (SURE**3 + SURE) / (4.0 * (len(newest) - 1))
        return mean - got > max(MARGIN * mean, sure * sqrt(error**2 + (mean * self.error) ** 2))


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is known of one version in one life of an engine.

    `job`: the score under way; `temperature`: of the newest that was asked for; `since_ms`: of the requests and samples that it is
    about. `low`: temperatures that are below their trend or their expectation. `fell_ms`: when the fall in question was noticed (where
    nobody scores, the oldest), `onset_ms`: when it began, by the requests; `fell`: its temperatures; `heard`: a score came since.
    `suspected`: by temperature, as last judged. `held`: no score can explain the fall unless a token is drafted in every step for a while.
    `answered_by`: the score that said it is drift; it scored the pooled drafts, too. `sagged_ms`: when newest requests last sagged.
    `known`: what was expected, without what was scored of requests since the fall in question.
    """

    incarnation: str = ""
    version: str = ""
    deployment: str = (
        ""  # the newest onto the engine, when this began: after one that was rolled back the version serves anew
    )
    job: str = ""
    temperature: float = -1.0
    since_ms: int = 0
    asked_ms: int = 0
    suspected: tuple[Comparison, ...] = ()
    sound: tuple[float, ...] = ()  # the temperatures that agreed with the newest score
    expected: tuple[Expected, ...] = ()
    low: tuple[float, ...] = ()
    trending: bool = False  # whether the trend is among what fell
    fell: tuple[float, ...] = ()
    fell_ms: int = 0
    onset_ms: int = 0
    held: bool = False
    heard: bool = False
    answer: Answer = Answer.NONE
    answered_by: str = ""
    sagged_ms: int = 0
    known: tuple[Expected, ...] = ()

    @property
    def questioned(self) -> bool:
        """Whether a fall waits for its explanation."""
        return self.answer is Answer.OPEN

    @property
    def drifted(self) -> bool:
        """Whether the traffic has moved, as far as anybody can say."""
        return self.answer in (Answer.DRIFT, Answer.LATE)

    @property
    def unheard(self) -> bool:
        """Whether nobody scores: the question found no answer because none came."""
        return self.answer is Answer.LATE and not self.heard

    def wary(self, now_ms: int) -> bool:
        """Whether samples of the newest requests are asked for, or may be soon, and no training should begin yet."""
        sagged = self.sagged_ms > 0 and now_ms - self.sagged_ms < WARY_MS
        return self.questioned or (self.answer is Answer.NONE and sagged)


@dataclass(frozen=True, slots=True)
class Rules:
    """`every_ms`: between two scores without a fall, 0 for none at all; `again_ms`: between two while a question is open; `wait_ms`: how
    long training waits for the answer."""

    every_ms: int = 300_000
    again_ms: int = 5_000
    wait_ms: int = 120_000


@dataclass(frozen=True, slots=True)
class Wish:
    """A score that could say something: of requests and samples since then. `fallen`: it is asked for because acceptance fell."""

    temperature: float
    since_ms: int
    fallen: bool = False

    def ripe(self, prompts: int, steps: int, mix: Sequence[tuple[float, float]]) -> bool:
        """Whether that many samples suffice: enough of them should be of its temperature, going by the `mix` of what is served."""
        share = max(dict(mix).get(self.temperature, 0.0), COMMON)
        return prompts * share >= MIN_PROMPTS and steps >= MIN_SCORED_STEPS


@dataclass(frozen=True, slots=True)
class News:
    """What is to be told: of a comparison, or (None) that a question found no answer in time."""

    kind: str
    found: Comparison | None = None


class Cause(StrEnum):
    """Where a fault is, as far as the temperatures tell: what is wrong with the draft or its features shows in greedy requests too."""

    DRAFT = "draft"
    SAMPLING = "sampling"
    LIKELIEST = "likeliest"  # sampled requests accept what greedy drafting would give: it is that, or sampling
    EITHER = "either"


def cause(found: Comparison, state: Suspicion) -> Cause:
    """Of what `state` has found, by the newest score."""
    if 0.0 in {found.temperature, *(item.temperature for item in state.suspected)}:
        return Cause.DRAFT
    if 0.0 not in state.sound:
        return Cause.EITHER
    near = abs(found.served - found.likeliest) < min((found.scored - found.served) / 2.0, 2.0 * found.error)
    return Cause.LIKELIEST if near else Cause.SAMPLING


def look(
    state: Suspicion,
    served: ServedClasses,
    falls: Sequence[float | None],
    now_ms: int,
    rules: Rules,
    *,
    judgeable: bool,
) -> tuple[Suspicion, tuple[News, ...]]:
    """Take in what is low now. `falls`: temperatures (None: not told) whose trend has fallen; `judgeable`: the engine can be scored."""
    falls = [fall for fall in falls if fall is None or not _rare(served, fall)]
    if not judgeable or not rules.every_ms:
        return replace(state, low=(), suspected=(), answer=Answer.LATE if falls else Answer.NONE), ()
    trending = {fall for fall in falls if fall is not None}
    missed = {e.temperature for e in state.expected if (s := served.classes.get(e.temperature)) and e.missed_by(s)}
    low = tuple(sorted(trending | missed))
    suspected = tuple(found for found in state.suspected if not _rare(served, found.temperature))
    after, news = replace(state, low=low, suspected=suspected), list[News]()
    if now_ms - state.sagged_ms >= 2 * WARY_MS and any(_sags(found) for found in served.classes.values()):
        after = replace(after, sagged_ms=now_ms)
    if after.answer is Answer.FAULT and not suspected:
        after = replace(after, answer=Answer.NONE)
    if set(low) - set(state.low) and after.answer not in (Answer.OPEN, Answer.FAULT):
        onset_ms = max(_onset_ms(served.classes[at], now_ms) for at in low)
        silent = after.fell_ms > 0 and not after.heard and now_ms - after.fell_ms < (1 + RESPITE) * rules.wait_ms
        fell_ms = after.fell_ms if silent else now_ms
        after = replace(after, fell=low, fell_ms=fell_ms, onset_ms=onset_ms, trending=False, answer=Answer.OPEN)
        after = replace(after, heard=False, held=False, answered_by="", known=after.expected)
    elif not low and after.drifted:
        after = replace(after, answer=Answer.NONE)
    if after.answer is Answer.OPEN:
        # A trend hovers about its threshold: what was sure once is to be explained, whatever it does next.
        after = replace(after, trending=after.trending or bool(trending & set(after.fell)))
        if now_ms - after.fell_ms >= rules.wait_ms:
            after = replace(after, held=False, answer=Answer.LATE if after.trending else Answer.NONE)
            news += [News("acceptance-unexplained")] if after.trending else []
    elif after.answer is Answer.FAULT:
        # Whether it is mended only requests can tell that are drafted for: now and then they are.
        after = replace(after, held=after.held or now_ms - after.asked_ms >= rules.every_ms)
    elif after.answer is Answer.NONE and None in falls:
        after = replace(after, answer=Answer.LATE)
    return after, tuple(news)


def wish(state: Suspicion, served: ServedClasses, now_ms: int, rules: Rules) -> Wish | None:
    """The score to ask for now, if one could say something."""
    if state.job or not rules.every_ms:
        return None
    waited_ms = now_ms - state.asked_ms
    if state.answer in (Answer.OPEN, Answer.LATE) and state.fell:
        every_ms = rules.again_ms if state.answer is Answer.OPEN else max(rules.again_ms, rules.every_ms // 10)
        if waited_ms < min(every_ms, rules.every_ms):
            return None
        ripe = [at for at in state.fell if (s := served.classes.get(at)) and s.since(state.onset_ms).enough]
        idle = state.fell if now_ms - state.fell_ms >= rules.again_ms else ()
        return Wish((*ripe, *idle)[0], state.onset_ms, fallen=True) if ripe or idle else None
    if state.answer is Answer.FAULT:
        since_ms = max(state.asked_ms, state.onset_ms)
        mended = [i.temperature for i in state.suspected if served.classes[i.temperature].since(since_ms).enough]
        return (
            Wish(mended[0], since_ms, fallen=True)
            if mended and waited_ms >= min(rules.again_ms, rules.every_ms)
            else None
        )
    if waited_ms < rules.every_ms:
        return None
    temperature = served.next_ripe(state.temperature, state.asked_ms)
    return None if temperature is None else Wish(temperature, served.classes[temperature].since_ms)


def asked(state: Suspicion, wanted: Wish, job: str, now_ms: int) -> Suspicion:
    return replace(state, job=job, temperature=wanted.temperature, since_ms=wanted.since_ms, asked_ms=now_ms)


def judge(
    state: Suspicion, served: ServedClasses, scores: Sequence[SamplingScore]
) -> tuple[Suspicion, tuple[News, ...]]:
    """Take in the score that was under way; `scores` is empty when it failed."""
    found = {
        score.temperature: compare(served.classes[score.temperature].since(state.since_ms), score)
        for score in scores
        if score.temperature in served.classes
    }
    suspected, news = {item.temperature: item for item in state.suspected}, list[News]()
    for temperature, item in found.items():
        if item.verdict is Verdict.FAULT:
            if temperature not in suspected:
                news.append(News("engine-fault-suspected", item))
            suspected[temperature] = item
        elif item.verdict is Verdict.SOUND and suspected.pop(temperature, None):
            news.append(News("engine-fault-cleared", item))
    new = {score.temperature: Expected.by_score(score) for score in scores if _enough(score)}
    before = {expected.temperature: expected for expected in state.expected}
    after = replace(
        state,
        job="",
        heard=state.heard or bool(new),
        suspected=tuple(suspected[temperature] for temperature in sorted(suspected)),
        sound=tuple(sorted(at for at, item in found.items() if item.verdict is Verdict.SOUND))
        if found
        else state.sound,
        expected=tuple((before | new)[temperature] for temperature in sorted(before | new)),
    )
    # A score that was asked for before the fall is about other requests.
    about = state.answer in (Answer.OPEN, Answer.LATE) and state.since_ms >= state.onset_ms
    after = replace(after, known=state.known if about else after.expected)
    if suspected:
        return replace(after, held=False, answer=Answer.FAULT), tuple(news)
    compared = [found[at] for at in state.fell if at in found and found[at].enough]
    known = {expected.temperature: expected for expected in state.known}
    fell = [_fell(known.get(at), new.get(at)) for at in state.fell]
    explained = _explained(state, served, known, new) and (all(fell) or not compared)
    if about and (explained or (compared and all(item.surely_sound for item in compared))):
        moved = any(fell) or (state.trending and not _passed(state, known, new))
        after = replace(after, held=False, answer=Answer.DRIFT if moved else Answer.NONE)
        after = replace(after, answered_by=state.job if moved else "")
    elif state.answer is Answer.OPEN:
        after = replace(after, held=state.held or (about and bool(new) and not compared))
    elif state.answer is Answer.FAULT:
        after = replace(after, answer=Answer.DRIFT if state.low else Answer.NONE)
        after = replace(after, answered_by=state.job if state.low else "")
    return after, tuple(news)


def _explained(
    state: Suspicion, served: ServedClasses, before: dict[float, Expected], new: dict[float, Expected]
) -> bool:
    """Whether the draft's score has fallen by most of what the newest requests have, from what was expected before. Those that a probe
    only touched may accept less than others: then this is not seen, and never seen wrongly."""
    known = [at for at in state.fell if at in before and at in new]
    alphas = {at: _newest_alpha(served.classes[at], state.onset_ms) for at in known}
    return bool(known) and all(
        alpha is not None and new[at].alpha <= alpha + (1.0 - EXPLAINED) * (before[at].alpha - alpha)
        for at, alpha in alphas.items()
    )


def _newest_alpha(served: ServedClass, since_ms: int) -> float | None:
    newest = [stats for at_ms, stats in served.drafted if at_ms >= since_ms][-NEWEST[-1] :]
    steps = sum(stats.spec_steps for stats in newest)
    if len(newest) < NEWEST[0] or steps < LEAST_STEPS:
        return None
    accepted, drafted = sum(stats.accepted for stats in newest), sum(stats.drafted for stats in newest)
    return alpha_from_length(1.0 + accepted / steps, drafted / steps)


def _fell(before: Expected | None, new: Expected | None) -> bool:
    """Whether the score itself is surely less than the one before, on this engine's samples; of a gate's, by much: it was of older ones."""
    if before is None or new is None or not before.of_this_engine:
        return False
    old, now = before.accepted, new.accepted
    margin = MARGIN if before.own else GATE_MARGIN
    return old - now > max(margin * old, SURE * sqrt((old * before.error) ** 2 + (now * new.error) ** 2))


def _passed(state: Suspicion, known: dict[float, Expected], new: dict[float, Expected]) -> bool:
    """Whether a few hard requests were all that there was: nothing is low any more, and the draft scores what it did before the fall."""
    return not set(state.fell) & set(state.low) and all(_level(known.get(at), new.get(at)) for at in state.fell)


def _level(before: Expected | None, new: Expected | None) -> bool:
    """Whether the score is about what it was, on this engine's samples."""
    if before is None or new is None or not before.of_this_engine:
        return False
    return new.accepted >= (1.0 - MARGIN / 2.0) * before.accepted


def _enough(score: SamplingScore) -> bool:
    return len(score.steps) >= MIN_PROMPTS and sum(score.steps) >= MIN_SCORED_STEPS


def _rare(served: ServedClasses, temperature: float) -> bool:
    """What is suspected of a temperature that is hardly served any more cannot be judged again, and keeps nothing from training."""
    return dict(served.mix()).get(temperature, 0.0) < RARE


def _sags(served: ServedClass) -> bool:
    """Whether the newest few accept less than those before, as far as so few can tell."""
    values = [stats.accepted / stats.spec_steps for _, stats in served.drafted]
    newest, before = values[-FEW:], values[:-FEW]
    if len(before) < NEWEST[-1]:
        return False
    mean = sum(before) / len(before)
    scatter = sqrt(sum((value - mean) ** 2 for value in before) / (len(before) - 1))
    return mean - sum(newest) / FEW > max(MARGIN * mean, HUNCH * scatter / sqrt(FEW))


def _onset_ms(served: ServedClass, now_ms: int) -> int:
    """When acceptance fell: of the last moments, the one before and after which requests differ most (the likeliest change of a mean), if
    that is sure; else now: older requests would hide what the newest show."""
    requests = list(served.whole)
    values = [stats.accepted / stats.spec_steps for _, stats in requests]
    total, n = sum(values), len(values)
    best, at, left = 0.0, 0, 0.0
    for i, value in enumerate(values[:-LATEST], 1):
        left += value
        fall = left / i - (total - left) / (n - i)
        if i >= LATEST and requests[i][0] >= now_ms - LOOKBACK_MS and fall * sqrt(i * (n - i) / n) > best:
            best, at = fall * sqrt(i * (n - i) / n), i
    if not at:
        return now_ms
    before, after = sum(values[:at]) / at, sum(values[at:]) / (n - at)
    scatter = sum((value - (before if i < at else after)) ** 2 for i, value in enumerate(values)) / (n - 1)
    return requests[at][0] if best > SURE * sqrt(scatter) else now_ms
