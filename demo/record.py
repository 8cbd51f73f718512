"""What the demo has seen: the data behind its view, its summary and its chart. No IO."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DRIFT, TRAINING, SWAPPED = "drift-detected", "training-started", "draft-swapped"
POOLED = "pool-switched"
RECENT = 6
"""Measurement pairs that a current figure is the median of."""


@dataclass(frozen=True)
class Turn:
    """One prompt, asked alone with speculation as tided has set it, and with drafting off, on the same engine."""

    at_s: float
    phase: int
    draft: str
    with_tokens_per_s: float
    without_tokens_per_s: float
    accept_length: float | None

    @property
    def ratio(self) -> float:
        return self.with_tokens_per_s / self.without_tokens_per_s


@dataclass(frozen=True)
class Happening:
    """An event of tided's. `at_s`: since the demo's traffic began."""

    at_s: float
    phase: int
    kind: str
    message: str


@dataclass
class Record:
    """Everything, in order. `phases`: (name, when it began)."""

    phases: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    turns: list[Turn] = field(default_factory=list[Turn])
    happenings: list[Happening] = field(default_factory=list[Happening])
    timeline: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    errors: int = 0

    @property
    def phase(self) -> int:
        """1 or 2; 0 before the first."""
        return len(self.phases)

    def recent(self, phase: int | None = None) -> list[Turn]:
        """The newest turns, of one phase or of any, as far back as the draft of the very newest served."""
        turns = [turn for turn in self.turns if phase in (None, turn.phase)][-RECENT:]
        return [turn for turn in turns if turn.draft == turns[-1].draft]

    def first(self, kind: str, phase: int) -> Happening | None:
        """The first event of a kind in a phase."""
        return next((seen for seen in self.happenings if seen.kind == kind and seen.phase == phase), None)

    def adapted(self, phase: int) -> Happening | None:
        """The first draft that was swapped in and trained on a phase's traffic: from phase 2 on, its training began after the drift."""
        awaited = [TRAINING, SWAPPED] if phase == 1 else [DRIFT, TRAINING, SWAPPED]
        pooled = False
        for seen in self.happenings:
            pooled = pooled or seen.kind == POOLED
            if seen.kind == SWAPPED and pooled:
                pooled = False  # a draft of the pool: it was trained on earlier traffic
            elif seen.phase == phase and seen.kind == awaited[0]:
                awaited.pop(0)
                if not awaited:
                    return seen
        return None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def ratio(turns: Sequence[Turn]) -> float | None:
    """Median of tokens/s with speculation over without; None without turns."""
    return statistics.median(turn.ratio for turn in turns) if turns else None


def rates(turns: Sequence[Turn]) -> tuple[float, float] | None:
    """Median tokens/s with and without speculation; None without turns."""
    if not turns:
        return None
    return (
        statistics.median(turn.with_tokens_per_s for turn in turns),
        statistics.median(turn.without_tokens_per_s for turn in turns),
    )


def accept_length(turns: Sequence[Turn]) -> float | None:
    """Mean acceptance length of the turns that drafted."""
    lengths = [turn.accept_length for turn in turns if turn.accept_length is not None]
    return statistics.fmean(lengths) if lengths else None
