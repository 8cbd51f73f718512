"""Shards to runs to packs. States stay BF16 and mapped from disk until a pack needs them; a pack has no padding.

A *run* is a gap-free sequence of positions of one request. With i a row, t its token ids and p its first position:
row i of the first pass reads token t[i+1] and predicts t[i+2], whose position is p + i + 2.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tided.draft.tensors import Array, Entry, read_header, read_tensor_entry
from tided.model.errors import Refused

_SCHEMA = "1"
AUX_STATES = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a shard. `states` is mapped: BF16 bits [rows, 3 or 4, hidden], the fourth being the final-normed last state."""

    states: Array
    ids: Array  # int64 [ids], from the first row's token up to two beyond the last row's
    first_position: int
    prompt_tokens: int
    group: bytes

    @property
    def has_last(self) -> bool:
        return self.states.shape[1] > AUX_STATES

    def queries(self, skip: int) -> range:
        """Rows whose prediction counts: predicted position >= prompt_tokens + skip, and a label is at hand.

        Training takes every generated token (skip 0). Serving never drafts the first one: evaluation takes skip 1.
        A soft label for t[i+2] is the last state of row i + 1, so that row must exist.
        """
        first = max(0, self.prompt_tokens + skip - 2 - self.first_position)
        stop = min(len(self.states) - int(self.has_last), len(self.ids) - 2)
        return range(first, max(first, stop))


@dataclass(frozen=True, slots=True)
class Piece:
    """A run, those of its rows that are asked, and the first row whose keys they may see."""

    run: Run
    queries: range
    first: int = 0

    @property
    def rows(self) -> int:
        return self.queries.stop - self.first


@dataclass(frozen=True, slots=True)
class Span:
    """One run's share of a pack: `keys` index the pack's rows, `queries` its queries."""

    keys: slice
    queries: slice


@dataclass(frozen=True, slots=True)
class Pack:
    """Runs side by side: K key rows, of which Q ask a question (are queries).

    Query q predicts label q in the first pass and label q + k in pass k, as long as `left[q]` > k.
    """

    aux: Tensor  # [K, 3H] bf16
    next_ids: Tensor  # [K] the token after each row's own
    positions: Tensor  # [K]
    query_rows: Tensor  # [Q] into the K rows
    left: Tensor  # [Q] labels from this query to the end of its piece
    label_ids: Tensor  # [Q] target ids
    last: Tensor | None  # [Q, H] bf16: the last state whose distribution label q was drawn from
    spans: tuple[Span, ...]
    groups: tuple[bytes, ...]  # one a span

    @property
    def tokens(self) -> int:
        return len(self.query_rows)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = (self.aux, self.next_ids, self.positions, self.query_rows, self.left, self.label_ids, self.last)
        return tuple(tensor for tensor in every if tensor is not None)


def read_shard(path: Path, hidden: int, target: str = "") -> list[Run]:
    """The runs of one shard. Raises `Refused` when it is malformed or holds another target's states.

    `target` is the digest that the samples must be of; "" (in the shard, too) means that nobody knows.
    """
    header = read_header(path)
    if header.metadata.get("schema") != _SCHEMA:
        raise Refused(
            f"{path}: shard schema {header.metadata.get('schema')!r} is unknown; this trainer reads {_SCHEMA!r}"
        )
    owner = header.metadata.get("target", "")
    if owner and target and owner != target:
        raise Refused(f"{path}: samples of another target's model ({owner[:12]}, not {target[:12]})")
    states = _tensor(path, header.entries, "states", "BF16", 3)
    ids = np.asarray(_tensor(path, header.entries, "ids", "I32", 1), np.int64)
    names = ("run_rows", "run_ids", "first_position", "prompt_tokens")
    rows, id_counts, first, prompt = (
        np.asarray(_tensor(path, header.entries, name, "I32", 1), np.int64) for name in names
    )
    groups = np.asarray(_tensor(path, header.entries, "groups", "U8", 2))
    runs = len(rows)
    if states.shape[1] not in (AUX_STATES, AUX_STATES + 1) or states.shape[2] != hidden:
        raise Refused(f"{path}: states of shape {states.shape}, expected [rows, 3 or 4, {hidden}]: another target's")
    if {len(id_counts), len(first), len(prompt), len(groups)} != {runs} or groups.shape[1] != 16:
        raise Refused(f"{path}: the run tables differ in length")
    if min(rows.min(initial=0), id_counts.min(initial=0), first.min(initial=0), prompt.min(initial=0)) < 0:
        raise Refused(f"{path}: negative counts")
    if rows.sum() != len(states) or id_counts.sum() != len(ids):
        raise Refused(f"{path}: the runs do not add up to the rows and ids that are there")
    row_ends, id_ends = np.cumsum(rows), np.cumsum(id_counts)
    return [
        Run(
            states=states[row_ends[i] - rows[i] : row_ends[i]],
            ids=ids[id_ends[i] - id_counts[i] : id_ends[i]],
            first_position=int(first[i]),
            prompt_tokens=int(prompt[i]),
            group=groups[i].tobytes(),
        )
        for i in range(runs)
    ]


def read_runs(paths: Iterable[str], hidden: int, vocab: int, target: str = "") -> list[Run]:
    """The runs of all shards, in their order; a directory stands for its shards. Raises `Refused` for ids outside the vocabulary."""
    runs = [run for path in paths for shard in _shards(Path(path)) for run in read_shard(shard, hidden, target)]
    if any(len(run.ids) and (run.ids.min() < 0 or run.ids.max() >= vocab) for run in runs):
        raise Refused(f"a shard holds token ids outside the target's vocabulary of {vocab}")
    return runs


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (found := sorted(path.glob("*.safetensors"))):
        raise Refused(f"{path}: a directory without shards (*.safetensors)")
    return found


def split_prompts(runs: Sequence[Run], share: float, purpose: bytes) -> tuple[list[Run], list[Run]]:
    """(the rest, `share` for `purpose`): by prompt, for ever the same, so that no prompt is on both sides."""
    bound = share * 2**64
    held = [int.from_bytes(hashlib.sha256(purpose + run.group).digest()[:8], "big") < bound for run in runs]
    return (
        [run for run, is_held in zip(runs, held, strict=True) if not is_held],
        [run for run, is_held in zip(runs, held, strict=True) if is_held],
    )


def mix(fresh: Sequence[Run], replay: Sequence[Run], share: float, rng: random.Random) -> list[Run]:
    """One pass's runs in random order: all fresh ones, and replayed ones until they are `share` of the tokens."""
    chosen = list(fresh)
    want = sum(len(run.queries(0)) for run in fresh) * share / (1 - share)
    for run in rng.sample(replay, len(replay)):
        if want <= 0:
            break
        chosen.append(run)
        want -= len(run.queries(0))
    rng.shuffle(chosen)
    return chosen


def whole_packs(runs: Iterable[Run], tokens: int, skip: int, device: str = "cpu") -> Iterator[Pack]:
    """Pack whole runs in their order, `tokens` queries or a little more each. Runs without a query are left out."""
    batch: list[Piece] = []
    for run in runs:
        piece = Piece(run, run.queries(skip))
        if not len(piece.queries):
            continue
        if batch and not _fits(batch, piece, tokens):
            yield pack(batch, device)
            batch = []
        batch.append(piece)
    if batch:
        yield pack(batch, device)


def equal_pieces(runs: Iterable[Run], tokens: int, rows: int) -> Iterator[list[Piece]]:
    """Divide runs in their order into packs for training, exactly `tokens` queries each but for the last: a run may be cut in two.

    The second piece has its earlier rows' keys again; chains end at the cut. Equal packs make matrix products of few distinct
    shapes, for each of which oneDNN compiles a kernel: with whole runs that took a third of a training step.
    A pack has at most `rows` rows: long prompts end it early, and the oldest rows of a run longer than that are not seen.
    """
    batch: list[Piece] = []
    for run in runs:
        rest = run.queries(0)
        while len(rest):
            room = tokens - sum(len(piece.queries) for piece in batch)
            queries = rest[:room]
            piece = Piece(run, queries, max(0, queries.stop - rows))
            full = not room or sum(other.rows for other in batch) + piece.rows > rows
            if batch and (full or run.has_last != batch[0].run.has_last):
                yield batch
                batch = []
                continue
            batch.append(piece)
            rest = rest[len(piece.queries) :]
    if batch:
        yield batch


def _fits(batch: Sequence[Piece], piece: Piece, tokens: int) -> bool:
    full = sum(len(other.queries) for other in batch) >= tokens
    return not full and piece.run.has_last == batch[0].run.has_last


def pack(pieces: Sequence[Piece], device: str = "cpu") -> Pack:
    """Lay runs side by side. Rows after the last query of a run are not needed and left out.

    States are copied once, from the mapped file. For another device that is into memory which it reads by itself, and the copies to
    it are queued on the current stream: this thread does not wait for them.
    """
    aux, last = list[Array](), list[Array]()
    next_ids, positions, query_rows, left, label_ids = ([] for _ in range(5))
    spans: list[Span] = []
    keys = asked = 0
    for piece in pieces:
        run, queries, first = piece.run, piece.queries, piece.first
        aux.append(run.states[first : queries.stop, :AUX_STATES])
        next_ids.append(torch.from_numpy(run.ids[first + 1 : queries.stop + 1]))
        positions.append(torch.arange(run.first_position + first, run.first_position + queries.stop))
        query_rows.append(torch.arange(queries.start, queries.stop) + (keys - first))
        left.append(torch.arange(len(queries), 0, -1))
        label_ids.append(torch.from_numpy(run.ids[queries.start + 2 : queries.stop + 2]))
        if run.has_last:
            last.append(run.states[queries.start + 1 : queries.stop + 1, AUX_STATES])
        spans.append(Span(slice(keys, keys + piece.rows), slice(asked, asked + len(queries))))
        keys += piece.rows
        asked += len(queries)
    pinned = torch.device(device).type != "cpu"

    def joined(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        return whole.pin_memory().to(device, non_blocking=True) if pinned else whole

    return Pack(
        aux=_states(aux, pinned).to(device, non_blocking=pinned),
        next_ids=joined(next_ids),
        positions=joined(positions),
        query_rows=joined(query_rows),
        left=joined(left),
        label_ids=joined(label_ids),
        last=_states(last, pinned).to(device, non_blocking=pinned) if last else None,
        spans=tuple(spans),
        groups=tuple(piece.run.group for piece in pieces),
    )


def _states(parts: Sequence[Array], pinned: bool) -> Tensor:
    """BF16 bits [rows, ..., H] one after the other, as [rows, ... * H]."""
    rows, width = sum(map(len, parts)), int(np.prod(parts[0].shape[1:]))
    states = torch.empty(rows, width, dtype=torch.bfloat16, pin_memory=pinned)
    np.concatenate(parts, out=states.view(torch.int16).numpy().view(np.uint16).reshape(rows, *parts[0].shape[1:]))
    return states


def _tensor(path: Path, entries: dict[str, Entry], name: str, dtype: str, dimensions: int) -> Array:
    entry = entries.get(name)
    if entry is None or entry.dtype != dtype or len(entry.shape) != dimensions:
        raise Refused(f"{path}: no tensor {name!r} of {dtype} with {dimensions} dimensions; not a shard of ours")
    return read_tensor_entry(path, entry)
