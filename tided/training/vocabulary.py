"""Re-selection of the draft vocabulary from traffic, same size, for engines that can swap the map with the weights.

The lowest BPE ids are a poor stand-in for a workload: on templated traffic a tenth of the generated tokens lies outside 8,192 of
them, and a token outside can never be drafted.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tided.draft import checkpoint, target
from tided.draft.checkpoint import Checkpoint
from tided.draft.tensors import Array, to_bf16
from tided.training.data import Run


def adapt(parent: Checkpoint, runs: Sequence[Run], target_dir: Path) -> Checkpoint:
    """`parent` with the vocabulary that `runs` ask for: head rows of tokens that stay are kept, new ones are the target's.

    Returns `parent` itself when it already covers every token that occurs.
    """
    counts = np.zeros(parent.config.vocab, np.int64)
    for run in runs:
        np.add.at(counts, run.ids, 1)
    old = checkpoint.target_ids(parent.tensors["d2t"])
    ids = select(old, counts, parent.config.draft_vocab)
    if np.array_equal(ids, np.sort(old)):
        return parent
    rows = to_bf16(target.read_tensor(target_dir, "lm_head.weight")[ids])
    _, at_new, at_old = np.intersect1d(ids, old, assume_unique=True, return_indices=True)
    rows[at_new] = parent.tensors["lm_head.weight"][at_old]
    t2d = np.zeros(parent.config.vocab, np.bool_)
    t2d[ids] = True
    d2t = ids - np.arange(ids.size, dtype=np.int64)
    tensors = parent.tensors | {"lm_head.weight": rows, "d2t": d2t, "t2d": t2d}
    return replace(parent, version="", vocab_id=checkpoint.vocab_id(d2t, parent.config.vocab), tensors=tensors)


def select(old: Array, counts: Array, size: int) -> Array:
    """`size` target ids, ascending: tokens that occur, commonest first, then old ones.

    Of the old ones those above `size` go first: they are special tokens, or were selected from earlier traffic.
    """
    seen = np.flatnonzero(counts)
    seen = seen[np.argsort(-counts[seen], kind="stable")]
    idle = np.sort(old[counts[old] == 0])
    order = np.concatenate([seen, idle[idle >= size], idle[idle < size]])
    return np.sort(order[:size]).astype(np.int64)
