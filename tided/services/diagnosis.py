"""What tapped rows say about an engine's capture: numpy only, no IO but the target's head, nothing remembered.

Rows are held against reference states (tided.draft.reference). Where they do not fit, the reason is looked for among the faults that
engines have been seen with: another layer, another position, a norm too many or too few, bytes of another dtype, a scale, the rows of
another request. The first one that makes the rows fit is the cause that people are told.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tided.draft.reference import Float, Reference, read_head
from tided.draft.tensors import to_float32
from tided.model.engines import TargetInfo
from tided.model.verification import Check, CheckOutcome
from tided.store.samples import Run

SHIFTS = (-1, 1, -2, 2)
DISTINCT = 0.5
"""Another layer is the right one if its error is below this share of the declared one's."""
LEAST_ROWS = 4
TIE = 0.02
"""Logits that differ by less than this share of the greatest are a tie: engines compute in 16 bits."""
GREEDY_SHARE = 0.9
SAMPLED_SHARE = 0.3
"""Of sampled traffic the head's favourite is a smaller part; of rows that are wrong it is next to nothing."""

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Shape:
    """What the engine declares: aux layers in ascending order, and whether the last hidden state follows them."""

    aux_layers: tuple[int, ...]
    has_last: bool


@dataclass(frozen=True, slots=True)
class Tapped:
    """All rows of one request that arrived, by ascending position. `tokens`: the token at each position that is known."""

    positions: NDArray[np.int64]
    bits: NDArray[np.uint16]  # [rows, states, hidden]: BF16
    tokens: dict[int, int]
    prompt_tokens: int

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Tapped":
        """Join the runs of one request. Raises `ValueError` without any."""
        ordered = sorted(runs, key=lambda run: run.first_position)
        tokens = {
            run.first_position + i: token for run in ordered for i, token in enumerate(run.ids.tolist())
        }  # a later run's rows overrule the labels of an earlier one
        return cls(
            positions=np.concatenate([run.first_position + np.arange(run.rows) for run in ordered]),
            bits=np.concatenate([part for run in ordered for part in run.states]),
            tokens=tokens,
            prompt_tokens=ordered[0].prompt_tokens,
        )


@dataclass(frozen=True, slots=True)
class Probed:
    """One probe: the prompt that was sent, which begins with the reference's sequence `sequence`, and what was tapped of it.

    `again`: what was tapped when prompt and answer together were sent as a prompt.
    """

    prompt: tuple[int, ...]
    sequence: int
    tapped: Tapped
    again: Tapped | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """How one column of states can be explained. `kind`: "" as they are, else the fault; `error`: median relative L2."""

    kind: str
    layer: int
    shift: int
    error: float
    factor: float = 1.0
    runner_up: float = float("inf")  # error of the best other layer


class _Column:
    """One state of all rows that have a reference, and where their reference is."""

    def __init__(self, reference: Reference, probes: Sequence[Probed], column: int) -> None:
        self._reference = reference
        ends = np.cumsum([len(ids) for ids in reference.sequences])
        bits, positions, starts, lengths, sequences = [], [], [], [], []
        for probe in probes:
            length = len(reference.sequences[probe.sequence])
            inside = probe.tapped.positions < length
            bits.append(probe.tapped.bits[inside, column])
            positions.append(probe.tapped.positions[inside])
            starts.append(np.full(int(inside.sum()), ends[probe.sequence] - length))
            lengths.append(np.full(int(inside.sum()), length))
            sequences.append(np.full(int(inside.sum()), probe.sequence))
        self._bits = np.concatenate(bits)
        self._rows = to_float32(self._bits)
        self._positions, self._starts = np.concatenate(positions), np.concatenate(starts)
        self._lengths, self._sequences = np.concatenate(lengths), np.concatenate(sequences)
        self._first = ends - [len(ids) for ids in reference.sequences]
        self._sizes = np.array([len(ids) for ids in reference.sequences])

    def errors(self, rows: Float, shift: int = 0) -> Float:
        """Of each layer [layers + 2], when row i is held against the reference `shift` positions on."""
        at, chosen = self._at(shift)
        return np.array([_error(rows[chosen], self._states(at, layer)) for layer in range(self._depth)], np.float32)

    def fit(self, expected: int, tolerance: float) -> Fit:
        """The simplest explanation within the tolerance; kind "none" if there is none."""
        plain = self.errors(self._rows)
        others = np.delete(plain, expected)
        runner_up, declared = float(others.min()), float(plain[expected])
        if declared <= tolerance and runner_up >= DISTINCT * declared:
            return Fit("", expected, 0, declared, runner_up=runner_up)
        candidates = [Fit("", int(plain.argmin()), 0, float(plain.min()))]
        for shift in SHIFTS:
            shifted = self.errors(self._rows, shift)
            candidates.append(Fit("", int(shifted.argmin()), shift, float(shifted.min())))
        best = min(candidates, key=lambda fit: fit.error)
        if best.error <= tolerance:
            return best
        for fit in self._faults():
            if fit.error <= tolerance:
                return fit
        return Fit("none", expected, 0, declared, runner_up=runner_up)

    def _faults(self) -> Iterable[Fit]:
        as_half = self._bits.view(np.float16).astype(np.float32)
        errors = self.errors(np.nan_to_num(as_half))
        yield Fit("float16", int(errors.argmin()), 0, float(errors.min()))
        at, chosen = self._at(0)
        rows = self._rows[chosen]
        for layer in range(self._depth):
            states = self._states(at, layer)
            factor = float((rows * states).sum() / max(float((states * states).sum()), _TINY))
            if factor > 0:
                yield Fit("scaled", layer, 0, _error(rows / factor, states), factor)
        for layer in range(self._depth - 1):
            states = self._states(at, layer)
            unit = states / np.sqrt(np.square(states).mean(1, keepdims=True) + self._reference.rms_eps)
            yield Fit("unit", layer, 0, _error(rows, unit))
            yield Fit("normed", layer, 0, _error(rows, unit * self._reference.norms[layer]))
        yield from self._mixed(rows, chosen)

    def _mixed(self, rows: Float, chosen: NDArray[np.int64]) -> Iterable[Fit]:
        """Rows that are right, at their position, for another request of the same time."""
        for other in range(len(self._sizes)):
            there = (self._positions[chosen] < self._sizes[other]) & (self._sequences[chosen] != other)
            if there.sum() < LEAST_ROWS:
                continue
            at = self._first[other] + self._positions[chosen][there]
            for layer in range(self._depth):
                yield Fit("mixed", layer, 0, _error(rows[there], self._states(at, layer)))

    def _at(self, shift: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        moved = self._positions + shift
        chosen = np.flatnonzero((moved >= 0) & (moved < self._lengths))
        return self._starts[chosen] + moved[chosen], chosen

    def _states(self, at: NDArray[np.int64], layer: int) -> Float:
        return np.asarray(self._reference.states[at, layer])

    @property
    def _depth(self) -> int:
        return self._reference.layers + 2


def declared(engine: TargetInfo, target: TargetInfo) -> Check:
    """Whether the engine says of its target what the target's files say."""
    for what, says, is_ in (
        ("aux layers", engine.aux_layers, target.aux_layers),
        ("layers", engine.layers, target.layers),
        ("hidden size", engine.hidden, target.hidden),
        ("vocabulary", engine.vocab, target.vocab),
    ):
        if says != is_:
            return failed(
                "declaration",
                f"the engine declares {what} {says}, its target has {is_}",
                "correct what the engine's plugin puts into its heartbeat",
            )
    layers = ", ".join(map(str, target.aux_layers))
    return Check("declaration", CheckOutcome.OK, f"layers {layers} of {target.layers}, vocabulary {target.vocab:,}")


def tokens(probes: Sequence[Probed]) -> Check:
    """Whether the ids of the tapped rows are those that were sent."""
    name = "token ids"
    right = wrong = sent = 0
    for probe in probes:
        sent += len(probe.prompt)
        for position in probe.tapped.positions[probe.tapped.positions < len(probe.prompt)].tolist():
            matches = probe.tapped.tokens[position] == probe.prompt[position]
            right, wrong = right + matches, wrong + (not matches)
    if wrong:
        for shift in SHIFTS:
            pairs = [
                (probe.tapped.tokens[p], probe.prompt[p + shift])
                for probe in probes
                for p in probe.tapped.positions.tolist()
                if 0 <= p + shift < len(probe.prompt)
            ]
            if pairs and all(got == want for got, want in pairs):
                return failed(name, f"the token ids of rows are {moved(shift)}", "fix the positions in the tap")
        return failed(
            name,
            f"{wrong} of {right + wrong} rows of known prompts carry other token ids than were sent",
            "the engine maps token ids: give the tap the ids that the target sees",
        )
    if not right:
        return Check(name, CheckOutcome.SKIPPED, "no row of a prompt arrived: a prefix cache had them all")
    return Check(name, CheckOutcome.OK, f"{right} rows of {sent} prompt tokens, all ids as sent")


def row_shape(tapped: Iterable[Tapped], shape: Shape, hidden: int) -> Check:
    """Whether a row has as many states, of as many values, as it must."""
    name, want = "row shape", (len(shape.aux_layers) + shape.has_last, hidden)
    for states_, values in {request.bits.shape[1:] for request in tapped}:
        if (states_, values) != want:
            return failed(
                name,
                f"{states_} states of {values} values a row, where {want[0]} of {want[1]} were expected",
                "tap three aux layers, and the last hidden state if capability last_hidden is declared",
            )
    return Check(name, CheckOutcome.OK, f"{want[0]} states of {want[1]} values")


def finite(tapped: Iterable[Tapped]) -> Check:
    """Whether the states are numbers, and not all the same."""
    for request in tapped:
        exponents = request.bits & np.uint16(0x7F80)
        if bool((exponents == np.uint16(0x7F80)).any()):
            return failed("values", "states hold NaN or infinity", "look at the dtype that the tap declares")
        if not request.bits.any():
            return failed("values", "states are all zero", "the tap copies before the engine has written")
    return Check("values", CheckOutcome.OK, "all finite")


def states(reference: Reference, probes: Sequence[Probed], shape: Shape, tolerance: float) -> tuple[Check, ...]:
    """Layer ids, alignment, norms, dtype and accuracy of what was tapped in prefill, against the reference."""
    names = ("token alignment", "layer ids", "norms", "dtype", "accuracy")
    rows = sum(int((p.tapped.positions < len(reference.sequences[p.sequence])).sum()) for p in probes)
    if rows < LEAST_ROWS:
        why = "too few rows with a reference arrived: a prefix cache had them"
        return tuple(Check(name, CheckOutcome.SKIPPED, why) for name in names)
    columns = [*shape.aux_layers, *([reference.layers + 1] if shape.has_last else [])]
    fits = [_Column(reference, probes, i).fit(layer, tolerance) for i, layer in enumerate(columns)]
    return _judged(fits, columns, shape, rows, tolerance, reference.layers)


def _judged(
    fits: list[Fit], columns: list[int], shape: Shape, rows: int, tolerance: float, layers: int
) -> tuple[Check, ...]:
    found = [fit for fit in fits if fit.kind != "none"]
    lost = [(fit, want) for fit, want in zip(fits, columns, strict=True) if fit.kind == "none"]
    pairs = [(fit, want) for fit, want in zip(fits, columns, strict=True) if fit.kind != "none"]
    shifts = {fit.shift for fit in found} - {0}
    checks: list[Check] = []

    def say(name: str, cause: str, advice: str, fine: str) -> None:
        if cause:
            checks.append(failed(name, cause, advice))
        elif not found:
            checks.append(Check(name, CheckOutcome.SKIPPED, "the rows fit nothing: see accuracy"))
        else:
            checks.append(Check(name, CheckOutcome.OK, fine))

    cause = f"rows are {moved(min(shifts))}" if shifts else ""
    if any(fit.kind == "mixed" for fit in found):
        cause = "rows hold the states of another request of the same batch"
    say("token alignment", cause, "fix which rows the tap takes of a step", "rows are at their tokens")

    def aux(want: int) -> bool:
        return want < layers

    wrong = [
        f"the states declared as {_named(want, layers)} are {_named(fit.layer, layers)}"
        for fit, want in pairs
        if fit.layer != want and (aux(want) or fit.layer < layers)
    ]
    say(
        "layer ids",
        "; ".join(wrong),
        f"tap the residual stream before layers {', '.join(map(str, shape.aux_layers))} (hidden_states[k])",
        f"layers {', '.join(map(str, shape.aux_layers))}"
        + (" and the last one" if shape.has_last else "")
        + f"; the next best layer is off by {min((fit.runner_up for fit in found), default=0):.2g}",
    )
    cause = ""
    for fit, want in pairs:
        if not aux(want) and fit.layer == layers:
            cause = "the last state is the one before the final norm"
        elif fit.kind in ("normed", "unit"):
            weight = "with" if fit.kind == "normed" else "without"
            cause = f"the states of layer {fit.layer} are normed ({weight} the norm's weight), the residual stream was expected"
    say("norms", cause, "aux states are taken before any norm, the last state after the final one", "as they should be")
    cause = ""
    for fit, _ in pairs:
        if fit.kind == "float16":
            cause = "the bytes are float16 where the header says bfloat16"
        elif fit.kind == "scaled":
            cause = f"the states are {fit.factor:.3g} times the target's: scaled, or read as another dtype"
    say("dtype", cause, "declare the dtype that the bytes have; tap before any scaling", "the values are the target's")
    measured = ", ".join(f"{fit.error:.2g}" for fit in fits)
    if lost:
        fit, want = max(lost, key=lambda item: item[0].error)
        near = fit.error < 4 * tolerance and fit.error <= fit.runner_up
        cause = (
            f"the states of {_named(want, layers)} are those of the right layer, and off by {fit.error:.2g}"
            if near
            else f"the states declared as {_named(want, layers)} are like those of no layer (off by {fit.error:.2g})"
        )
        advice = (
            f"raise self_test.tolerance (now {tolerance:g}) if the engine serves a quantised target"
            if near
            else "does the engine serve the weights in target.path, and is the hook on the decoder's layers?"
        )
        checks.append(failed("accuracy", cause, advice))
    else:
        worst = f"relative error {measured} over {rows} rows (at most {tolerance:g})"
        checks.append(Check("accuracy", CheckOutcome.OK, worst))
    return tuple(checks)


def decoding(probes: Sequence[Probed], tolerance: float) -> Check:
    """Whether rows tapped while decoding and verifying are those of the same tokens as a prompt."""
    name = "decoding rows"
    worst, rows, shifted = 0.0, 0, dict.fromkeys(SHIFTS, 0.0)
    for probe in probes:
        if probe.again is None:
            continue
        for shift in (0, *SHIFTS):
            decoded, prefilled = _common(probe.tapped, probe.again, shift)
            if not len(decoded):
                continue
            error = max(_error(decoded[:, i], prefilled[:, i]) for i in range(decoded.shape[1]))
            if shift:
                shifted[shift] = max(shifted[shift], error)
            else:
                worst, rows = max(worst, error), rows + len(decoded)
    if rows < LEAST_ROWS:
        return Check(name, CheckOutcome.SKIPPED, "no row was tapped both in decoding and in prefill")
    if worst <= tolerance:
        return Check(name, CheckOutcome.OK, f"relative error {worst:.2g} over {rows} generated rows, against prefill")
    shift = min(shifted, key=lambda item: shifted[item])
    if shifted[shift] <= tolerance:
        return failed(name, f"in decoding, rows are {moved(shift)}", "fix which rows the tap takes in verification")
    return failed(
        name,
        f"rows tapped in decoding differ from the same tokens' in prefill by {worst:.2g}",
        "does the tap take rejected rows, or those of another request?",
    )


def greedy(target_dir: Path, requests: Sequence[Tapped], shape: Shape, *, sampled: bool) -> Check:
    """Whether the head, on each last state, prefers the token that the engine emitted next. `sampled`: it need not have."""
    name = "emitted tokens"
    if not shape.has_last:
        return Check(name, CheckOutcome.SKIPPED, "the engine does not tap the last hidden state")
    rows, following = list[Float](), list[int]()
    for tapped in requests:
        generated = tapped.positions >= tapped.prompt_tokens - 1
        for i in np.flatnonzero(generated).tolist():
            token = tapped.tokens.get(int(tapped.positions[i]) + 1)
            if token is not None:
                rows.append(to_float32(tapped.bits[i, -1]))
                following.append(token)
    if len(rows) < LEAST_ROWS:
        return Check(name, CheckOutcome.SKIPPED, "too few generated rows arrived")
    reading = read_head(target_dir, np.stack(rows), np.array(following, np.int64))
    near = reading.best_logit - reading.token_logit <= TIE * np.abs(reading.best_logit)
    share, least = float(near.mean()), SAMPLED_SHARE if sampled else GREEDY_SHARE
    measured = f"the head's favourite is the next token in {share:.0%} of {len(rows)} rows"
    if share >= least:
        return Check(name, CheckOutcome.OK, measured)
    return failed(
        name,
        f"the last states do not predict the emitted tokens: {measured}",
        "is the last state taken after the final norm, at its own token, and is the vocabulary the target's?",
    )


def _common(decoded: Tapped, prefilled: Tapped, shift: int) -> tuple[Float, Float]:
    """States of generated tokens in both, the second `shift` positions on."""
    index = {position: i for i, position in enumerate(prefilled.positions.tolist())}
    pairs = [
        (i, index[position + shift])
        for i, position in enumerate(decoded.positions.tolist())
        if position >= decoded.prompt_tokens and position + shift in index
    ]
    left, right = [i for i, _ in pairs], [j for _, j in pairs]
    return to_float32(decoded.bits[left]), to_float32(prefilled.bits[right])


def _error(rows: Float, states: Float) -> float:
    """Median over rows of the relative L2 distance."""
    if not len(rows):
        return float("inf")
    distance = np.linalg.norm(rows - states, axis=1)
    return float(np.median(distance / np.maximum(np.linalg.norm(states, axis=1), _TINY)))


def moved(shift: int) -> str:
    """Where rows are that fit the reference `shift` positions on."""
    count = "one position" if abs(shift) == 1 else f"{abs(shift)} positions"
    return f"{count} late" if shift < 0 else f"{count} early"


def _named(layer: int, layers: int) -> str:
    if layer == layers:
        return "the last one, before the final norm"
    return "the last one" if layer > layers else f"those before layer {layer}"


def failed(name: str, cause: str, advice: str) -> Check:
    return Check(name, CheckOutcome.FAILED, cause, advice)
