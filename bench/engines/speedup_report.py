"""What the turns of `bench.engines.speedup` say: predicted and measured speedup of each batch size and number of drafted tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench import report
from bench.report import BOOTSTRAP_DRAWS, Claim, at_most
from tided.model.codec import from_plain
from tided.model.engines import LatencyProfile, StepCounts
from tided.policies.calibration import Calibration
from tided.policies.speedup import Acceptance, smoothed, speedup_of_length, step_s

MEDIAN_PERCENT, WORST_PERCENT = 5.0, 9.0


@dataclass(frozen=True)
class Stretch:
    """Steps of one turn at its full batch. `accepted[k]`: request-steps with k accepted tokens."""

    steps: int
    seconds: float
    accepted: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum((k + 1) * count for k, count in enumerate(self.accepted))


@dataclass(frozen=True)
class Pair:
    """A turn that drafted, its neighbours that did not, and what was known before it: the profile as the engine measured it at its start,
    and as tided had put it right by then."""

    batch: int
    gamma: int
    drafted: Stretch
    none: tuple[Stretch, ...]
    profile: LatencyProfile
    calibrated: LatencyProfile


@dataclass(frozen=True)
class Cell:
    """Errors are predicted over measured, less one. `step_0` and `step` are those of the step times without drafting and with,
    `length` that of the acceptance length."""

    batch: int
    gamma: int
    pairs: int
    measured: float
    low: float
    high: float
    predicted: float
    error: float
    error_low: float
    error_high: float
    calibrated: float
    calibrated_error: float
    length: float
    step_0: float
    step: float


def pairs_of(parts: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """All pairs of all parts, in the order in which they were measured."""
    pairs: list[Pair] = []
    for part in parts:
        given = smoothed(from_plain(LatencyProfile, part["profile"]))
        calibration: Calibration | None = None
        for played in part["rounds"]:
            turns, batch = played["turns"], int(played["batch"])
            stretches = [_stretch(turn) for turn in turns]
            for index, turn in enumerate(turns):
                known = calibration.corrected() if calibration is not None else given
                if turn["gamma"]:
                    none = (stretches[index - 1], stretches[index + 1])
                    pairs.append(Pair(batch, int(turn["gamma"]), stretches[index], none, given, known))
                for sent in turn["reports"]:
                    at_s = sent["at_ms"] / 1000
                    calibration = (calibration or Calibration.of(given, at_s)).add(at_s, _steps(sent))
    return pairs


def cells_of(pairs: Sequence[Pair]) -> list[Cell]:
    """The table, with 95% intervals over pairs. Acceptance is that of all turns at the same batch size, as the prompts are the same."""
    cells: list[Cell] = []
    for batch in sorted({pair.batch for pair in pairs}):
        of_batch = [pair for pair in pairs if pair.batch == batch]
        acceptance = Acceptance.of(
            StepCounts(batch, pair.gamma, pair.drafted.steps, pair.drafted.seconds, pair.drafted.accepted)
            for pair in of_batch
        )
        for gamma in sorted({pair.gamma for pair in of_batch}):
            own = [pair for pair in of_batch if pair.gamma == gamma]
            cells.append(_cell(own, acceptance.length(gamma)))
    return cells


def _cell(own: Sequence[Pair], length: float) -> Cell:
    """`own`: the pairs of one cell."""
    batch, gamma = own[0].batch, own[0].gamma
    sums = np.array([_sums(pair) for pair in own])
    predicted = np.array([speedup_of_length(pair.profile, batch, gamma, length) for pair in own])
    calibrated = np.array([speedup_of_length(pair.calibrated, batch, gamma, length) for pair in own])
    picks = np.random.default_rng(0).integers(0, len(own), (BOOTSTRAP_DRAWS, len(own)))
    drawn = _speedup(sums[picks].sum(axis=1))
    low, high = np.quantile(drawn, [0.025, 0.975])
    error_low, error_high = np.quantile(calibrated[picks].mean(axis=1) / drawn - 1, [0.025, 0.975])
    whole = sums.sum(axis=0)
    measured = float(_speedup(whole))
    drafted_s, tokens, steps, none_s, _, none_steps = whole.tolist()
    return Cell(
        batch,
        gamma,
        len(own),
        measured,
        float(low),
        float(high),
        float(predicted.mean()),
        float(predicted.mean()) / measured - 1,
        float(error_low),
        float(error_high),
        float(calibrated.mean()),
        float(calibrated.mean()) / measured - 1,
        length * steps * batch / tokens - 1,
        float(np.mean([step_s(pair.profile, batch, 0) for pair in own])) * none_steps / none_s - 1,
        float(np.mean([step_s(pair.profile, batch, gamma) for pair in own])) * steps / drafted_s - 1,
    )


def _sums(pair: Pair) -> tuple[float, ...]:
    none = pair.none
    return (
        pair.drafted.seconds,
        pair.drafted.tokens,
        pair.drafted.steps,
        sum(stretch.seconds for stretch in none),
        sum(stretch.tokens for stretch in none),
        sum(stretch.steps for stretch in none),
    )


def _speedup(sums: Any) -> Any:
    """Tokens a second over those without drafting, of sums [..., 6] as `_sums` has them."""
    return (sums[..., 1] / sums[..., 0]) / (sums[..., 4] / sums[..., 3])


def _stretch(turn: Mapping[str, Any]) -> Stretch:
    """Raises `ValueError` for a turn whose batch was never full."""
    full = [
        counts
        for sent in turn["reports"]
        for counts in _steps(sent)
        if (counts.batch, counts.gamma) == (turn["batch"], turn["gamma"])
    ]
    if not full:
        raise ValueError(f"batch {turn['batch']} was never full while {turn['gamma']} tokens were drafted")
    accepted = np.sum([counts.accepted for counts in full], axis=0).tolist()
    return Stretch(sum(counts.steps for counts in full), sum(counts.seconds for counts in full), tuple(accepted))


def _steps(sent: Mapping[str, Any]) -> list[StepCounts]:
    return [from_plain(StepCounts, counts) for counts in sent["steps"]]


def claims_of(cells: Sequence[Cell]) -> list[Claim]:
    """The goals, over all cells, and each cell."""
    errors = [100 * abs(cell.calibrated_error) for cell in cells]
    at_start = [100 * abs(cell.error) for cell in cells]
    worst = cells[int(np.argmax(errors))]
    what = f"vllm: speedup as the policy predicts it against measured, {len(cells)} batch sizes and numbers of drafted tokens"
    claims = [
        at_most("speedup.median", f"{what}: median error", float(np.median(errors)), MEDIAN_PERCENT, "%"),
        at_most(
            "speedup.worst",
            f"{what}: worst error (batch {worst.batch}, {worst.gamma} tokens)",
            max(errors),
            WORST_PERCENT,
            "%",
        ),
        Claim(
            "speedup.start.median",
            f"{what}, by the profile of the start alone: median error",
            float(np.median(at_start)),
            "%",
        ),
        Claim("speedup.start.worst", f"{what}, by the profile of the start alone: worst error", max(at_start), "%"),
    ]
    for cell in cells:
        claims.append(
            Claim(
                f"speedup.{cell.batch}.{cell.gamma}",
                f"batch {cell.batch}, {cell.gamma} drafted tokens, {cell.pairs} turns: measured {cell.measured:.3f}x"
                f" (95% {cell.low:.3f}..{cell.high:.3f}), predicted {cell.calibrated:.3f}x, by the profile of the start"
                f" {cell.predicted:.3f}x; error (95% {100 * cell.error_low:.1f}..{100 * cell.error_high:.1f})",
                100 * cell.calibrated_error,
                "%",
            )
        )
    return claims


def write_report(name: str, parts: Sequence[Mapping[str, Any]], *, show: bool = False) -> None:
    """build/bench/NAME.json from the parts that have run; nothing without any."""
    if not parts:
        return
    cells = cells_of(pairs_of(parts))
    claims = claims_of(cells)
    report.write(name, claims, extra={"cells": [asdict(cell) for cell in cells]})
    if show:
        report.show(name, claims)
