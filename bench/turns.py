"""Turns: one block of prompts, asked of every arm in turn, one request at a time, in ABC-CBA order.

The arms are engines on the same core, so the others are idle while one has its turn; pairs are answers to the same prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.load import NO_CAPTURE, Answer, ask, client
from bench.report import Interval, paired_ratio
from bench.traffic import Prompt

WINDOW_S = 30.0
WINDOW_TOKENS = 300


@dataclass(frozen=True)
class Measured:
    """One answer of one arm, without its text. `at_s`: when it ended, in seconds since the phase began."""

    at_s: float
    seconds: float
    ttft_s: float
    tokens: int
    spec_steps: int
    drafted: int
    accepted: int

    @classmethod
    def of(cls, answer: Answer, phase_began_s: float) -> "Measured":
        """From an answer of the load generator."""
        return cls(
            at_s=answer.started_s + answer.seconds - phase_began_s,
            seconds=answer.seconds,
            ttft_s=answer.ttft_s,
            tokens=answer.tokens,
            spec_steps=answer.spec_steps,
            drafted=answer.drafted,
            accepted=answer.accepted,
        )

    @property
    def tokens_per_s(self) -> float:
        """Over the whole request, prefill included."""
        return self.tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        """After the first token: what Eq. 5 speaks of."""
        return (self.tokens - 1) / (self.seconds - self.ttft_s) if self.tokens > 1 else self.tokens_per_s


@dataclass(frozen=True)
class Pair:
    """What each arm gave for the same prompt."""

    block: int
    answers: Mapping[str, Measured]

    @property
    def at_s(self) -> float:
        return max(answer.at_s for answer in self.answers.values())

    def ratio(self, ours: str, theirs: str) -> float:
        return self.answers[ours].tokens_per_s / self.answers[theirs].tokens_per_s


@dataclass
class TurnLog:
    """The pairs of a phase, and the errors of requests that have no place in a pair."""

    pairs: list[Pair] = field(default_factory=list[Pair])
    errors: list[str] = field(default_factory=list[str])

    def to_plain(self) -> dict[str, Any]:
        pairs = [
            {"block": pair.block, "answers": {arm: vars(m) for arm, m in pair.answers.items()}} for pair in self.pairs
        ]
        return {"pairs": pairs, "errors": self.errors}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "TurnLog":
        pairs = [
            Pair(item["block"], {arm: Measured(**measured) for arm, measured in item["answers"].items()})
            for item in plain["pairs"]
        ]
        return cls(pairs, list(plain["errors"]))


async def take_turns(
    log: TurnLog, urls: Mapping[str, str], prompts: Sequence[Prompt], block: int, phase_began_s: float
) -> None:
    """One block: every arm answers all of `prompts`; the order of the arms is reversed in every other block."""
    order = list(urls) if block % 2 == 0 else list(urls)[::-1]
    answers: dict[str, list[Answer]] = {}
    for arm in order:
        async with client(urls[arm]) as http:
            answers[arm] = [await ask(http, prompt, headers=NO_CAPTURE) for prompt in prompts]
    for index in range(len(prompts)):
        of_prompt = {arm: answers[arm][index] for arm in urls}
        errors = [f"{arm}: {answer.error}" for arm, answer in of_prompt.items() if answer.error]
        if errors:
            log.errors += errors
            continue
        log.pairs.append(Pair(block, {arm: Measured.of(answer, phase_began_s) for arm, answer in of_prompt.items()}))


def last_third(pairs: Sequence[Pair], phase_s: float) -> list[Pair]:
    """Those that ended in the last third of the phase."""
    return [pair for pair in pairs if pair.at_s >= phase_s * 2 / 3]


def ratio(pairs: Sequence[Pair], ours: str, theirs: str) -> Interval | None:
    """Median ratio of tokens/s over paired prompts, with its interval; None without pairs."""
    if not pairs:
        return None
    return paired_ratio(
        [pair.answers[ours].tokens_per_s for pair in pairs], [pair.answers[theirs].tokens_per_s for pair in pairs]
    )


def decode_ratio(pairs: Sequence[Pair], ours: str, theirs: str) -> float | None:
    """Median ratio of tokens/s after the first token; None without pairs."""
    values = [pair.answers[ours].decode_tokens_per_s / pair.answers[theirs].decode_tokens_per_s for pair in pairs]
    return float(np.median(values)) if values else None


def acceptance(pairs: Sequence[Pair], arm: str) -> float | None:
    """Acceptance length of an arm over the steps that drafted; None when none did."""
    steps = sum(pair.answers[arm].spec_steps for pair in pairs)
    accepted = sum(pair.answers[arm].accepted for pair in pairs)
    return 1 + accepted / steps if steps else None


@dataclass(frozen=True)
class Window:
    """Consecutive pairs that hold at least WINDOW_S seconds and WINDOW_TOKENS tokens of each arm."""

    start_s: float
    end_s: float
    ratio_to_none: Interval


def windows(pairs: Sequence[Pair], ours: str = "tided", theirs: str = "none") -> list[Window]:
    """Every shortest window that begins at a pair; windows overlap, so that none hides between two others."""
    found: list[Window] = []
    for first in range(len(pairs)):
        seconds, tokens = dict.fromkeys((ours, theirs), 0.0), dict.fromkeys((ours, theirs), 0)
        for last in range(first, len(pairs)):
            for arm in (ours, theirs):
                seconds[arm] += pairs[last].answers[arm].seconds
                tokens[arm] += pairs[last].answers[arm].tokens
            if min(seconds.values()) >= WINDOW_S and min(tokens.values()) >= WINDOW_TOKENS:
                inside = pairs[first : last + 1]
                interval = ratio(inside, ours, theirs)
                assert interval is not None
                start_s = min(answer.at_s - answer.seconds for answer in pairs[first].answers.values())
                found.append(Window(start_s, pairs[last].at_s, interval))
                break
    return found


def worst(found: Sequence[Window]) -> float | None:
    """The lowest upper end of the windows' intervals: below 1 only where we are sure that it was slower."""
    return min((window.ratio_to_none.high for window in found), default=None)
