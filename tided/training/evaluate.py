"""Acceptance of a draft on held-out runs, as at serving time: greedy, and conditional on all earlier tokens having been right.

From each generated position the draft is unrolled on its own pre-norm outputs. While all its tokens were right, feeding the
true token is feeding its own, so one batched teacher-forced unroll equals drafting step by step; a chain ends at its first miss.
An engine does not draft from every position: its next step begins behind the tokens that the last one emitted, so positions that
are hard to predict begin more than their share of steps. Counts are therefore taken along that walk, not over all positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tided.draft.eagle3 import Eagle3
from tided.model.drafts import Evaluation
from tided.training.data import Pack, Run, whole_packs
from tided.training.losses import Frozen
from tided.training.ttt import Unroll

_PACK_TOKENS = 1024


@torch.inference_mode()
def evaluate(
    draft: Eagle3,
    runs: Sequence[Run],
    frozen: Frozen,
    gamma: int,
    autocast: bool = True,
) -> Evaluation:
    """Score `draft` on `runs`: per prompt the acceptance length 1 + a0 + a0 a1 + ..., where a_k = right / asked in pass k.

    A chain asks as long as the run has a label for it. `autocast`: matrix products in BF16.
    """
    asked: dict[bytes, Tensor] = {}
    scored: dict[bytes, int] = {}
    outside = total = 0
    device_type = frozen.embedding.device.type
    for pack in whole_packs(runs, _PACK_TOKENS, skip=1, device=str(frozen.embedding.device)):
        with torch.autocast(device_type, torch.bfloat16, enabled=autocast):
            right = chains(draft, pack, frozen, gamma).tolist()
        for group, span in zip(pack.groups, pack.spans, strict=True):
            counts = walk(right[span.queries], gamma)
            asked[group] = asked[group] + counts if group in asked else counts
            scored[group] = scored.get(group, 0) + span.queries.stop - span.queries.start
        outside += int((frozen.draft_ids[pack.label_ids] < 0).sum())
        total += pack.tokens
    groups = tuple(asked)
    table = torch.stack([asked[group] for group in groups]) if groups else torch.zeros(0, 2, gamma, dtype=torch.int64)
    overall = table.sum(0)
    return Evaluation(
        version=draft.version,
        gamma=gamma,
        groups=tuple(group.hex() for group in groups),
        lengths=tuple(acceptance_length(item) for item in table),
        tokens=tuple(scored[group] for group in groups),
        conditional=tuple((overall[1] / overall[0].clamp(min=1)).tolist()),
        out_of_vocabulary=outside / total if total else 0.0,
    )


def chains(draft: Eagle3, pack: Pack, frozen: Frozen, gamma: int) -> Tensor:
    """[Q] how many of `gamma` tokens drafted from each query are right before the first miss, or before its labels end."""
    labels = frozen.draft_ids[pack.label_ids]
    right = torch.zeros(pack.tokens, dtype=torch.int64, device=labels.device)
    unroll = Unroll(draft, pack, frozen.embedding)
    for k in range(gamma):
        going_on = unroll.active[draft.logits(unroll.pre).argmax(-1) == labels[unroll.active + k]]
        right[going_on] += 1
        going_on = going_on[pack.left[going_on] > k + 1]
        if k + 1 == gamma or not len(going_on):
            break
        unroll.advance(going_on)
    return right


def walk(right: Sequence[int], gamma: int) -> Tensor:
    """[2, gamma] int64 over the steps of serving one run whose query q has `right[q]` right tokens: how often drafted token k was
    judged (all before it right, and a label there), and how often it was right. A step emits right + 1 tokens."""
    counts = torch.zeros(2, gamma, dtype=torch.int64)
    start = 0
    while start < len(right):
        accepted = right[start]
        counts[0, : min(accepted + 1, gamma, len(right) - start)] += 1
        counts[1, :accepted] += 1
        start += accepted + 1
    return counts


def acceptance_length(counts: Tensor) -> float:
    """1 + a0 + a0 a1 + ... from (asked, right) [2, gamma]; a pass that was never asked ends the sum."""
    length = product = 1.0
    for asked, right in counts.T.tolist():
        if not asked:
            break
        product *= right / asked
        length += product
    return length
