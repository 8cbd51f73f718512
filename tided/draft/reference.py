"""Reference states: what a target computes, in float32 and at every layer, for a few short token sequences.

A `reference` job makes them once for each target (tided.training.reference); the self-test holds what an engine taps against them
(tided.services.selftest). One safetensors file, T tokens of all sequences behind each other, L layers:

    states  F32 [T, L + 2, hidden]  k < L: the residual stream before layer k; L: after the last layer; L + 1: after the final norm
    norms   F32 [L + 1, hidden]     weights of each layer's input norm, and of the final norm
    ids     I32 [T]                 lengths  I32 [sequences]
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tided.draft import target
from tided.draft.tensors import Array, read_header, read_tensor_entry, to_float32
from tided.model.errors import Refused

FILE = "reference.safetensors"
SCHEMA = "2"
LENGTHS = (9, 13, 26)
"""Short, so that a prefix cache finds nothing in most of them and a file stays small: 7 MB for 30 layers of 576."""
_HEAD_ROWS = 2048

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference file, mapped. `sequences` are its tokens."""

    target: str
    rms_eps: float
    states: Float
    norms: Float
    sequences: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        return self.states.shape[1] - 2


def sequences(vocab: int) -> tuple[tuple[int, ...], ...]:
    """The fixed sequences of every target with such a vocabulary: text of no language, so that nobody's prompt is like them."""

    def token(sequence: int, position: int) -> int:
        digest = hashlib.sha256(f"tided self-test {sequence} {position}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % vocab

    return tuple(tuple(token(k, i) for i in range(length)) for k, length in enumerate(LENGTHS))


def read(path: Path) -> Reference:
    """Map a reference file. Raises `Refused` for one that is none, `Unavailable` for a disk that cannot be read."""
    header = read_header(path)
    found: dict[str, Array] = {name: read_tensor_entry(path, entry) for name, entry in header.entries.items()}
    meta = header.metadata
    if set(found) != {"states", "norms", "ids", "lengths"} or meta.get("schema") != SCHEMA:
        raise Refused(f"{path}: not a reference file of schema {SCHEMA}")
    states, norms, lengths = found["states"], found["norms"], found["lengths"]
    tokens, depth, hidden = states.shape if states.ndim == 3 else (0, 0, 0)
    if not tokens or norms.shape != (depth - 1, hidden) or found["ids"].shape != (tokens,) or lengths.sum() != tokens:
        raise Refused(f"{path}: its tensors do not belong together")
    ids = found["ids"].tolist()
    ends = np.cumsum(lengths).tolist()
    try:
        eps = float(meta.get("rms_eps", ""))
    except ValueError as exc:
        raise Refused(f"{path}: rms_eps is not a number") from exc
    tokens_of = tuple(tuple(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    return Reference(meta.get("target", ""), eps, states, norms, tokens_of)


@dataclass(frozen=True, slots=True)
class HeadReading:
    """What the target's head says to last hidden states: its favourite, the favourite's logit, the logit of the token asked for."""

    best: NDArray[np.int64]
    best_logit: Float
    token_logit: Float


def read_head(target_dir: Path, states: Float, tokens: NDArray[np.int64]) -> HeadReading:
    """Apply the target's head to `states` [n, hidden] (after the final norm), a block of the vocabulary at a time.

    Raises `Refused` for a target without one, or tokens outside the vocabulary.
    """
    head = target.read_tensor(target_dir, "lm_head.weight")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(head):
        raise Refused(f"token ids outside the target's vocabulary of {len(head)}")
    best = np.zeros(len(states), np.int64)
    best_logit = np.full(len(states), -np.inf, np.float32)
    token_logit = np.zeros(len(states), np.float32)
    rows = np.arange(len(states))
    for start in range(0, len(head), _HEAD_ROWS):
        logits = states @ to_float32(head[start : start + _HEAD_ROWS]).T
        favourite = logits.argmax(1)
        better = logits[rows, favourite] > best_logit
        best[better], best_logit[better] = favourite[better] + start, logits[rows, favourite][better]
        inside = (tokens >= start) & (tokens < start + logits.shape[1])
        token_logit[inside] = logits[rows[inside], tokens[inside] - start]
    return HeadReading(best, best_logit, token_logit)
