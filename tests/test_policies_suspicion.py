"""A fall opens a question, and what answers it: by the score, by the policy that stopped drafting, or by nobody."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_policies_faults import request
from tided.model.drafts import Evaluation, SamplingScore
from tided.model.engines import RequestStats
from tided.policies.faults import MIN_PROMPTS, MIN_REQUESTS, MIN_SCORED_STEPS, WINDOW, ServedClasses
from tided.policies.speedup import expected_length
from tided.policies.suspicion import (
    FEW,
    NEWEST,
    RESPITE,
    WARY_MS,
    Answer,
    Expected,
    Rules,
    Suspicion,
    Wish,
    asked,
    judge,
    look,
    wish,
)

NOW = 10_000_000
RULES = Rules(every_ms=300_000, again_ms=5_000, wait_ms=120_000)
T = 0.7


class Story:
    """One engine that serves requests, is looked at every second, and scored when that is wished for."""

    def __init__(self, alpha: float = 0.6, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        self.now_ms = NOW
        self.state, self.served = Suspicion("i", "v", asked_ms=NOW), ServedClasses()
        self.news: list[str] = []
        self.falls: tuple[float | None, ...] = ()
        self.serve(alpha, 100)
        self.score(alpha)

    def serve(self, alpha: float, seconds: int, captured: bool = True, drafting: bool = True) -> None:
        """Four requests a second."""
        for _ in range(seconds):
            self.now_ms += 1000
            for _ in range(4):
                stats = request(self.draw, alpha)
                if not drafting:  # a probe touches four steps
                    stats = replace(stats, spec_steps=4, drafted=4, accepted=round(4 * alpha), output_tokens=60)
                self.served.add(stats, self.now_ms, captured)
            self.look()

    def look(self) -> None:
        self.state, news = look(self.state, self.served, self.falls, self.now_ms, RULES, judgeable=True)
        self.news += [item.kind for item in news]

    def wish(self) -> Wish | None:
        return wish(self.state, self.served, self.now_ms, RULES)

    def score(self, alpha: float, since_ms: int | None = None, prompts: int = 40) -> None:
        since_ms = self.state.onset_ms if since_ms is None else since_ms
        self.state = asked(self.state, Wish(T, since_ms), "job", self.now_ms)
        self.state, news = judge(self.state, self.served, (score(self.draw, alpha, prompts),))
        self.news += [item.kind for item in news]

    def fall(self, alpha: float, **how: bool) -> None:
        """The trend sees it after three seconds."""
        self.serve(alpha, 3, **how)
        self.falls = (T,)
        self.look()


def score(draw: random.Random, alpha: float, prompts: int = 40) -> SamplingScore:
    """Of prompts that differ as the requests do."""
    own = [min(0.98, max(0.02, draw.gauss(alpha, 0.15))) for _ in range(prompts)]
    accepted = tuple(50.0 * (expected_length(value, 4) - 1.0) for value in own)
    mean = sum(own) / prompts
    return SamplingScore(T, (50.0,) * prompts, accepted, (mean, mean, mean, mean), (0.0,) * 4)


def test_a_fall_waits_for_a_score_of_what_was_served_since_it_began() -> None:
    story = Story()
    assert story.state.answer is Answer.NONE
    assert story.wish() is None
    story.fall(0.3)
    assert (story.state.answer, story.state.questioned, story.state.drifted) == (Answer.OPEN, True, False)
    assert 0 <= story.now_ms - story.state.onset_ms <= 4000
    assert story.wish() is None, "too few requests since"
    story.serve(0.3, MIN_REQUESTS // 4 + 2)
    assert story.wish() == Wish(T, story.state.onset_ms, fallen=True)


@pytest.mark.parametrize(
    ("scored", "answer", "told"), [(0.3, Answer.DRIFT, []), (0.6, Answer.FAULT, ["engine-fault-suspected"])]
)
def test_the_score_says_which_it_is(scored: float, answer: Answer, told: list[str]) -> None:
    story = Story()
    story.fall(0.3)
    story.serve(0.3, 15)
    story.score(scored)
    assert story.state.answer is answer
    assert story.news == told
    assert bool(story.state.suspected) == (answer is Answer.FAULT)
    assert not story.state.questioned


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_that_has_lost_nearly_all_needs_no_long_comparison(seed: int) -> None:
    """A share of next to nothing is told from chance by hundreds of requests only: that the score has fallen as far is enough."""
    story = Story(seed=seed)
    story.fall(0.03)
    story.serve(0.03, MIN_REQUESTS // 4)
    story.score(0.04, prompts=12)
    assert (story.state.answer, story.state.answered_by, story.news) == (Answer.DRIFT, "job", [])


def test_the_score_that_said_drift_is_named_until_the_next_fall() -> None:
    """It scored the pooled drafts, too."""
    story = Story()
    story.fall(0.3)
    assert story.state.answered_by == ""
    story.serve(0.3, 15)
    story.score(0.3)
    assert (story.state.answer, story.state.answered_by) == (Answer.DRIFT, "job")
    story.falls = ()
    story.serve(0.6, 100)
    assert story.state.answer is Answer.NONE
    story.fall(0.2)
    assert (story.state.answer, story.state.answered_by) == (Answer.OPEN, "")


def test_a_hunch_is_had_before_the_fall_is_sure_and_for_a_while_only() -> None:
    story = Story()
    story.state = replace(story.state, sagged_ms=0, expected=())
    story.serve(0.2, FEW // 4 + 1)
    assert story.state.answer is Answer.NONE
    assert story.state.wary(story.now_ms)
    assert not story.state.wary(story.now_ms + WARY_MS)
    story.serve(0.2, 5)
    first_ms = story.state.sagged_ms
    story.now_ms += WARY_MS
    story.look()
    assert story.state.sagged_ms == first_ms, "training goes on in between"
    assert replace(story.state, answer=Answer.OPEN).wary(story.now_ms)
    assert not replace(story.state, sagged_ms=story.now_ms, answer=Answer.DRIFT).wary(story.now_ms)


def test_steady_traffic_gives_a_hunch_now_and_then() -> None:
    """Of forty minutes at four requests a second, in a tenth at most."""
    wary = 0
    for seed in range(4):
        story = Story(seed=seed)
        for _ in range(600):
            story.serve(0.6, 1)
            wary += story.state.wary(story.now_ms) and not story.state.questioned
    assert wary <= 240


def test_where_few_requests_come_the_fall_began_when_they_fell_and_not_when_it_was_sure() -> None:
    story = Story()
    fell_ms = story.now_ms
    for _ in range(30):  # one a second
        story.now_ms += 1000
        story.served.add(request(story.draw, 0.2), story.now_ms, captured=True)
    story.falls = (T,)
    story.look()
    assert story.state.answer is Answer.OPEN
    assert story.state.onset_ms <= fell_ms + 5000
    assert story.wish() is not None, "enough requests have come since"


def test_samples_suffice_when_enough_of_them_are_of_the_temperature() -> None:
    greedy, sampled = Wish(0.0, NOW), Wish(T, NOW)
    mix = ((0.0, 0.9), (T, 0.1))
    assert greedy.ripe(MIN_PROMPTS + 2, MIN_SCORED_STEPS, mix)
    assert not sampled.ripe(MIN_PROMPTS + 2, MIN_SCORED_STEPS, mix)
    assert sampled.ripe(4 * MIN_PROMPTS, MIN_SCORED_STEPS, mix), "more is waited for by nobody"
    assert not greedy.ripe(4 * MIN_PROMPTS, MIN_SCORED_STEPS - 1, mix)


def test_a_score_from_before_the_fall_answers_nothing() -> None:
    story = Story()
    story.state = asked(story.state, Wish(T, NOW), "job", story.now_ms)
    story.fall(0.3)
    story.state, _ = judge(story.state, story.served, (score(story.draw, 0.6),))
    assert story.state.answer is Answer.OPEN


def test_a_trend_that_hovers_leaves_the_question_open() -> None:
    story = Story()
    story.fall(0.3)
    story.falls = ()
    story.serve(0.45, 1)
    assert story.state.answer is Answer.OPEN


@pytest.mark.parametrize(
    ("scored", "passed", "answer"),
    [(0.6, True, Answer.NONE), (0.6, False, Answer.DRIFT), (0.55, True, Answer.DRIFT)],
)
def test_a_few_hard_requests_are_no_drift_where_the_draft_scores_what_it_did(
    *, scored: float, passed: bool, answer: Answer
) -> None:
    story = Story()
    story.state = replace(story.state, expected=(replace(story.state.expected[0], conditional=(0.6,) * 4, error=0.0),))
    story.falls = (T,)
    story.look()
    story.state = replace(story.state, onset_ms=story.now_ms)
    story.serve(scored, 40)
    story.falls = () if passed else (T,)
    story.look()
    assert story.state.questioned
    for alpha, said in (
        (scored + 0.08, Answer.OPEN),
        (scored, answer),
    ):  # the first is neither, and is not what was known before
        story.state = asked(story.state, Wish(T, story.state.onset_ms), "job", story.now_ms)
        found = replace(score(story.draw, alpha, prompts=400), conditional=(alpha,) * 4)
        story.state, _ = judge(story.state, story.served, (found,))
        assert story.state.answer is said
    assert bool(story.state.answered_by) == (answer is Answer.DRIFT)


def test_a_failed_score_is_asked_for_again_and_not_at_once() -> None:
    story = Story()
    story.fall(0.3)
    story.serve(0.3, 15)
    wanted = story.wish()
    assert wanted is not None
    story.state = asked(story.state, wanted, "job", story.now_ms)
    assert story.wish() is None
    story.state, _ = judge(story.state, story.served, ())
    assert (story.state.answer, story.state.job, story.wish()) == (Answer.OPEN, "", None)
    story.serve(0.3, 10)
    assert story.wish() is not None


def test_nobody_who_scores_keeps_training_waiting_for_two_minutes_and_not_again_soon() -> None:
    story = Story()
    story.state = replace(story.state, heard=False)
    story.fall(0.3)
    began_ms = story.state.fell_ms
    story.serve(0.3, 119)
    assert story.state.questioned
    story.serve(0.3, 1)
    assert (story.state.answer, story.state.drifted, story.news) == (Answer.LATE, True, ["acceptance-unexplained"])
    assert story.state.fell_ms == began_ms
    assert story.wish() is not None, "an answer is welcome at any time"
    story.falls = ()
    story.state = replace(story.state, expected=())
    story.look()
    assert story.state.answer is Answer.NONE
    story.falls = (T,)
    story.look()
    assert story.state.answer is Answer.LATE
    story.falls = ()
    story.look()
    story.now_ms += (1 + RESPITE) * RULES.wait_ms
    story.falls = (T,)
    story.look()
    assert story.state.answer is Answer.OPEN


def test_an_answer_after_the_deadline_still_counts() -> None:
    story = Story()
    story.fall(0.3)
    story.serve(0.3, 130)
    assert story.state.answer is Answer.LATE
    story.score(0.6)
    assert story.state.answer is Answer.FAULT


def test_what_cannot_be_judged_blocks_nothing() -> None:
    story = Story()
    story.falls = (None,)
    story.look()
    assert (story.state.answer, story.state.questioned) == (Answer.LATE, False)
    story.falls = (T,)
    for rules, judgeable in ((RULES, False), (replace(RULES, every_ms=0), True)):
        state, _ = look(story.state, story.served, story.falls, story.now_ms, rules, judgeable=judgeable)
        assert state.answer is Answer.LATE
    story.falls = ()
    story.look()
    assert story.state.answer is Answer.NONE


def test_newest_requests_below_the_last_score_are_a_fall_without_any_trend() -> None:
    story = Story()
    story.serve(0.15, NEWEST[1] // 4)
    assert story.state.answer is Answer.OPEN
    story.serve(0.15, 15)
    story.score(0.15)
    assert story.state.answer is Answer.DRIFT, "its score on these very samples has fallen too"


@pytest.mark.parametrize(("alone", "answer"), [(False, Answer.NONE), (True, Answer.DRIFT)])
def test_a_version_that_serves_below_its_gate_is_asked_about(*, alone: bool, answer: Answer) -> None:
    """A gate's requests are those of all engines of the target: where there is one, they say what its traffic was."""
    evaluation = Evaluation("v", 4, ("",) * 40, (2.3056,) * 20 + (2.4,) * 20, (50,) * 40, (0.6,) * 4)
    draw, served = random.Random(0), ServedClasses()
    state = Suspicion("i", "v", expected=(Expected.by_gate(evaluation, alone=alone),))
    for second in range(4):
        for _ in range(4):
            served.add(replace(request(draw, 0.15), temperature=0.0), NOW + second, captured=True)
    state, _ = look(state, served, (), NOW + 4, RULES, judgeable=True)
    assert (state.answer, state.fell) == (Answer.OPEN, (0.0,))
    for second in range(10):
        for _ in range(4):
            served.add(replace(request(draw, 0.15), temperature=0.0), NOW + 5 + second, captured=True)
    state = asked(state, Wish(0.0, state.onset_ms), "job", NOW + 20)
    found, _ = judge(state, served, (replace(score(draw, 0.15), temperature=0.0),))
    assert found.answer is answer
    found, news = judge(state, served, (replace(score(draw, 0.6), temperature=0.0),))
    assert (found.answer, [item.kind for item in news]) == (Answer.FAULT, ["engine-fault-suspected"])


@pytest.mark.parametrize(("own", "answer"), [(False, Answer.OPEN), (True, Answer.NONE)])
def test_a_version_that_was_not_scored_since_it_serves_answers_for_few_steps_too(*, own: bool, answer: Answer) -> None:
    """Where acceptance is next to nothing the policy drafts a step now and then, and nobody would ever ask."""
    expected = Expected(T, (0.6,) * 4, 0.02, own=own, alone=not own)
    state, draw, served = Suspicion("i", "v", expected=(expected,)), random.Random(0), ServedClasses()
    for second in range(10):
        stats = replace(request(draw, 0.05), spec_steps=10, drafted=10, accepted=1, output_tokens=60)
        served.add(stats, NOW + second, captured=True)
    state, _ = look(state, served, (), NOW + 20, RULES, judgeable=True)
    assert state.answer is answer


@pytest.mark.parametrize(("scored", "answer", "held"), [(0.12, Answer.DRIFT, False), (0.6, Answer.OPEN, True)])
def test_where_drafting_has_stopped_the_fall_of_the_score_must_explain_it(
    scored: float, answer: Answer, held: bool
) -> None:
    story = Story()
    story.fall(0.1)
    story.serve(0.1, 30, drafting=False)
    assert story.wish() is not None
    story.score(scored)
    assert (story.state.answer, story.state.held) == (answer, held)
    if held:  # then it is drafted for, and known
        story.serve(0.1, 15)
        story.score(0.6)
        assert (story.state.answer, story.state.held) == (Answer.FAULT, False)


def test_a_fault_is_mended_when_new_requests_agree_and_not_by_old_ones() -> None:
    story = Story()
    story.fall(0.3)
    story.serve(0.3, 15)
    story.score(0.6)
    assert story.state.answer is Answer.FAULT
    story.falls = ()
    story.serve(0.6, 2)
    assert story.wish() is None
    story.serve(0.6, 20)
    wanted = story.wish()
    assert wanted is not None
    assert wanted.since_ms == story.state.asked_ms
    story.score(0.6, wanted.since_ms)
    assert (story.state.answer, story.news) == (Answer.NONE, ["engine-fault-suspected", "engine-fault-cleared"])


def test_a_fault_of_which_nothing_is_drafted_any_more_is_looked_at_now_and_then() -> None:
    story = Story()
    story.fall(0.3)
    story.serve(0.3, 15)
    story.score(0.6)
    story.now_ms += RULES.every_ms
    story.look()
    assert story.state.held


def test_steady_traffic_asks_nothing_but_now_and_then() -> None:
    """Ten minutes at four requests a second, ten times: the last score is no trap."""
    opened = 0
    for seed in range(10):
        story = Story(seed=seed)
        for _ in range(600):
            before = story.state.answer
            story.serve(0.6, 1)
            opened += before is not story.state.answer is Answer.OPEN
            if story.state.questioned:
                story.score(0.6)
        assert story.news == []
        assert not story.state.drifted
    assert opened <= 2


@given(st.lists(st.sampled_from(["fall", "rise", "none", "wait", "score", "fail"]), max_size=40))
def test_no_history_keeps_training_waiting_for_ever(history: list[str]) -> None:
    """Whatever happens, training waits for no more than one deadline in a respite when nobody scores, and never for a suspect of old."""
    served, state, now_ms, waited_ms = ServedClasses(), Suspicion("i", "v"), NOW, 0
    for _ in range(WINDOW):
        served.add(RequestStats(20, 60, 20, 80, 39, "v", T), now_ms, captured=True)
    falls: tuple[float | None, ...] = ()
    for what in history:
        match what:
            case "fall":
                falls = (T,)
            case "none":
                falls = (None,)
            case "rise":
                falls = ()
            case "wait":
                now_ms += 30_000
            case _:
                state, _ = judge(state, served, ())
        before = state.questioned
        state, _ = look(state, served, falls, now_ms, RULES, judgeable=True)
        waited_ms += 30_000 if what == "wait" and before else 0
        assert not (state.questioned and state.drifted)
    assert waited_ms <= RULES.wait_ms * (1 + len(history) * 30_000 // (RESPITE * RULES.wait_ms))
