"""What a draft is trained towards. Soft: the target's distribution over the draft vocabulary. Hard: cross entropy.

Soft is the forward KL divergence, or the negative log of the rate at which a sampled token is accepted, sum_v min(p_v, q_v), which is 1
less the total variation between the two (LK loss: Samarin et al. 2026, arXiv 2602.23881).
The target's distribution comes from the captured last hidden state (after the final norm) through the target's own head rows;
the target itself is never run. Labels outside the draft vocabulary weigh nothing: no drafted token can match them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from tided.draft import target
from tided.draft.checkpoint import Checkpoint, target_ids
from tided.draft.eagle3 import tensor_of
from tided.training.data import Pack, Run
from tided.training.options import SoftLoss

_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class Frozen:
    """The target's matrices that training reads, in one dtype: embedding [vocab, H], its head's rows for the draft vocabulary."""

    embedding: Tensor
    head: Tensor  # [draft_vocab, H]
    draft_ids: Tensor  # [vocab] int64: a target id's draft id, or -1

    @classmethod
    def read(cls, target_dir: Path, draft: Checkpoint, device: str, dtype: torch.dtype = torch.bfloat16) -> "Frozen":
        """Read them from the target's safetensors files."""
        embedding = tensor_of(target.read_tensor(target_dir, "model.embed_tokens.weight")).to(dtype).to(device)
        return cls._of(embedding, target_dir, draft)

    def for_draft(self, target_dir: Path, draft: Checkpoint) -> "Frozen":
        """The same for a draft with another vocabulary; the embedding is shared."""
        return self._of(self.embedding, target_dir, draft)

    @classmethod
    def _of(cls, embedding: Tensor, target_dir: Path, draft: Checkpoint) -> "Frozen":
        ids = target_ids(draft.tensors["d2t"])
        inverse = np.full(draft.config.vocab, -1, np.int64)
        inverse[ids] = np.arange(len(ids))
        return cls(
            embedding=embedding,
            head=tensor_of(target.read_tensor(target_dir, "lm_head.weight")[ids])
            .to(embedding.dtype)
            .to(embedding.device),
            draft_ids=torch.from_numpy(inverse).to(embedding.device),
        )


def whole_head(target_dir: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The target's head [vocab, H]: for what needs its probabilities over all tokens."""
    return tensor_of(target.read_tensor(target_dir, "lm_head.weight")).to(dtype).to(device)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The draft tokens that a softmax runs over: `ids` [C] draft ids, `index` [draft_vocab] their places or -1.

    `correction` [C] is added to logits: log(1 / probability of having been drawn), so that the drawn stand for all.
    """

    ids: Tensor
    index: Tensor
    correction: Tensor


class CandidateSampler:
    """Sampled softmax: every draft token that occurs in the samples, and a fresh draw of `negatives` others for each step.

    A workload uses about a tenth of its draft vocabulary; the head over all of it would be half of a training step. A few more are drawn,
    so that candidates come in multiples of `_ALIGNED`: for other widths a device has slow kernels only.
    """

    def __init__(self, runs: Sequence[Run], frozen: Frozen, negatives: int, seed: int = 0) -> None:
        occurs = torch.zeros(len(frozen.draft_ids), dtype=torch.bool)
        for run in runs:
            occurs[torch.from_numpy(run.ids)] = True
        drafts = frozen.draft_ids.cpu()
        occurs &= drafts >= 0
        self._size = len(frozen.head)
        self._device = frozen.head.device
        self.seen = drafts[occurs].to(self._device)
        """Draft ids [seen] of all that occur: the first candidates of every step."""
        unseen = torch.ones(self._size, dtype=torch.bool)
        unseen[drafts[occurs]] = False
        self._others = unseen.nonzero().squeeze(1)
        wanted = negatives + -(len(self.seen) + negatives) % _ALIGNED if negatives else 0
        self._negatives = min(wanted, len(self._others))
        self._seed = seed

    def draw(self, step: int = 0) -> Candidates:
        """The candidates of one step, by its number: the same in every process, and when training goes on from a checkpoint."""
        generator = torch.Generator().manual_seed(random.Random(f"{self._seed} {step}").getrandbits(32))
        drawn = self._others[torch.randperm(len(self._others), generator=generator)[: self._negatives]]
        ids = torch.cat([self.seen, drawn.to(self._device)])
        index = torch.full((self._size,), -1, device=self._device)
        index[ids] = torch.arange(len(ids), device=self._device)
        correction = torch.zeros(len(ids), device=self._device)
        if self._negatives:
            correction[len(self.seen) :] = math.log(len(self._others) / self._negatives)
        return Candidates(ids, index, correction)


@dataclass(frozen=True, slots=True)
class Labels:
    """The targets of one pack's labels: `ids` [Q] candidates, -1 for a token that cannot be drafted; `soft` [Q, C] sums to 1."""

    ids: Tensor
    soft: Tensor | None


@torch.no_grad()
def labels_of(pack: Pack, frozen: Frozen, candidates: Candidates) -> Labels:
    """Label q of `pack`: its candidate, and the target's distribution over the candidates when the last state was captured."""
    ids = frozen.draft_ids[pack.label_ids]
    ids = torch.where(ids >= 0, candidates.index[ids.clamp(min=0)], -1)
    if pack.last is None:
        return Labels(ids, None)
    head = frozen.head[candidates.ids]
    logits = (pack.last.to(head.dtype) @ head.T).float() + candidates.correction
    return Labels(ids, torch.softmax(logits, -1).to(head.dtype))


class _RowLoss(Function):
    """soft(p, q) - hard log q_id a row, with q = softmax(logits) [n, C], `soft` p [n, C]; a row with id -1 adds nothing.

    soft(p, q) is the cross entropy -sum_v p_v log q_v, the log acceptance -log sum_v min(p_v, q_v), or 0 without p. Its gradient,
    q - p or q (s - [q < p]) / acceptance with s = sum of q where q < p, and q - [v = id], is formed at once and kept in the logits' dtype.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, soft: Tensor | None, ids: Tensor, hard: float, kind: SoftLoss
    ) -> Tensor:
        usable, at = (ids >= 0).unsqueeze(-1), ids.clamp(min=0).unsqueeze(-1)
        wide = logits.float()
        norm = wide.logsumexp(-1, keepdim=True)
        loss = hard * (norm - wide.gather(-1, at))
        q = (wide - norm).exp_()
        if soft is None:
            grad = q.mul_(hard)
        elif kind is SoftLoss.KL:
            loss += norm - torch.linalg.vecdot(wide, soft.float()).unsqueeze(-1)
            grad = q.mul_(1.0 + hard).sub_(soft)
        else:
            p = soft.float()
            below = q < p
            accepted = torch.minimum(q, p).sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            share = (q * below).sum(-1, keepdim=True)
            loss -= accepted.log()
            grad = q.mul_((share - below.float()).div_(accepted).add_(hard))
        if hard:
            grad.scatter_add_(-1, at, grad.new_full((1, 1), -hard).expand_as(at))
        ctx.save_for_backward(grad.mul_(usable).to(logits.dtype))
        return (loss * usable).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].unsqueeze(-1).to(grad.dtype), None, None, None, None


def step_loss(logits: Tensor, labels: Labels, rows: Tensor, hard_weight: float, kind: SoftLoss) -> Tensor:
    """Summed loss of one pass: logits [n, C] against labels `rows` [n]. Rows without a usable label add nothing."""
    soft = None if labels.soft is None else labels.soft[rows]
    hard = hard_weight if labels.soft is not None else 1.0
    return _RowLoss.apply(logits, soft, labels.ids[rows], hard, kind).sum()
