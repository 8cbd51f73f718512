"""Where drafted tokens are right, position by position: what an engine that serves a draft must accept, and would with each fault.

As `evaluate`, but in float32, and with near ties left open: an engine computes in another order, often in 16 bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tided.draft.checkpoint import Checkpoint
from tided.draft.eagle3 import Eagle3
from tided.model.jobs import Chain, DraftFault
from tided.training.data import AUX_STATES, Pack, Run, whole_packs
from tided.training.losses import Frozen
from tided.training.ttt import Unroll

TIE = 0.02
"""Logits that differ by less than this share of the largest are a tie."""
_PACK_TOKENS = 1024
_HEAD = ("norm.weight", "lm_head.weight", "d2t", "t2d")


def chains_of(
    source: Checkpoint, previous: Checkpoint | None, runs: Sequence[Run], frozen: Frozen, target_dir: Path, gamma: int
) -> Iterator[Chain]:
    """A chain for each prompt of `runs`, for the draft as it should serve and with each fault. `frozen` is for `source`."""
    for fault, draft, faulty, drafted in _faults(source, runs, frozen):
        yield from _chains(draft, faulty, drafted, gamma, fault)
    if previous is not None and previous.config == source.config:
        before = frozen.for_draft(target_dir, previous)
        yield from _chains(previous, runs, before, gamma, DraftFault.PREVIOUS)
        # The vocabulary map is that of the head.
        yield from _chains(_joined(previous, source), runs, frozen, gamma, DraftFault.HALF_HEAD)
        yield from _chains(_joined(source, previous), runs, before, gamma, DraftFault.HALF_BODY)


def _joined(body: Checkpoint, head: Checkpoint) -> Checkpoint:
    return replace(body, tensors=body.tensors | {name: head.tensors[name] for name in _HEAD})


def _faults(
    source: Checkpoint, runs: Sequence[Run], frozen: Frozen
) -> Iterator[tuple[DraftFault, Checkpoint, Sequence[Run], Frozen]]:
    yield DraftFault.NONE, source, runs, frozen
    unmapped = torch.arange(len(frozen.draft_ids), device=frozen.draft_ids.device)
    unmapped[source.config.draft_vocab :] = -1
    if not torch.equal(unmapped, frozen.draft_ids):
        yield DraftFault.VOCABULARY, source, runs, replace(frozen, draft_ids=unmapped)
    yield DraftFault.FEATURES_LATE, source, [_moved(run, -1) for run in runs], frozen
    yield DraftFault.FEATURES_EARLY, source, [_moved(run, 1) for run in runs], frozen
    yield DraftFault.FEATURES_ORDER, source, [_reversed(run) for run in runs], frozen


def _moved(run: Run, by: int) -> Run:
    """Every row with the aux states of the row `by` further on."""
    rows = np.clip(np.arange(len(run.states)) + by, 0, len(run.states) - 1)
    return replace(run, states=run.states[rows])


def _reversed(run: Run) -> Run:
    return replace(run, states=run.states[:, [*reversed(range(AUX_STATES)), *range(AUX_STATES, run.states.shape[1])]])


@torch.inference_mode()
def _chains(source: Checkpoint, runs: Sequence[Run], frozen: Frozen, gamma: int, fault: DraftFault) -> Iterator[Chain]:
    draft = Eagle3.of(source, device=frozen.embedding.device)
    for pack in whole_packs(runs, _PACK_TOKENS, skip=1, device=str(frozen.embedding.device)):
        low, high = bounds(draft, pack, frozen, gamma)
        for group, span in zip(pack.groups, pack.spans, strict=True):
            yield Chain(group.hex(), tuple(low[span.queries].tolist()), tuple(high[span.queries].tolist()), fault)


def bounds(draft: Eagle3, pack: Pack, frozen: Frozen, gamma: int) -> tuple[Tensor, Tensor]:
    """[Q] each: of `gamma` tokens drafted from each query, how many are surely right in a row, and how many may be.

    A chain asks as long as the run has a label for it.
    """
    labels = frozen.draft_ids[pack.label_ids]
    low, high = torch.zeros(2, pack.tokens, dtype=torch.int64, device=labels.device)
    unroll = Unroll(draft, pack, frozen.embedding)
    for k in range(gamma):
        logits, active = draft.logits(unroll.pre), unroll.active
        label = labels[active + k]
        at = label.clamp(min=0).unsqueeze(1)
        ahead = logits.gather(1, at)[:, 0] - logits.scatter(1, at, float("-inf")).amax(-1)
        tie = TIE * logits.abs().amax(-1)
        low[active[(label >= 0) & (ahead > tie) & (low[active] == k)]] += 1
        going_on = active[(label >= 0) & (ahead >= -tie)]
        high[going_on] += 1
        going_on = going_on[pack.left[going_on] > k + 1]
        if not len(going_on):
            break
        if k + 1 < gamma:
            unroll.advance(going_on)
    return low, high
