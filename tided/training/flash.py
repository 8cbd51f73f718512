"""The unroll's attention by torch's flash kernels for packed sequences, where a device has them.

A query's softmax runs jointly over two sets of keys: those of pass 0, which its run shares, and those of its own later passes, one each
(`tided.training.ttt`). The kernels know the first set alone. They return its log-sum-exp, so the second is joined behind them. Backward the
kernels are given the joint output and the joint log-sum-exp in place of their own: a key's probability is exp(score - log-sum-exp), and
the gradient of its score is p (dp - grad . output), in which the other keys occur nowhere else. So theirs is exactly the joint gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from tided.training.data import Pack

_SHARED = torch.ops.aten._flash_attention_forward
_SHARED_BACKWARD = torch.ops.aten._flash_attention_backward


@cache
def available(kind: str, head_dim: int, heads: int, kv_heads: int) -> bool:
    """Whether a kind of device computes this attention: tried once, forward and backward."""
    if kind == "cpu":
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q = torch.zeros(2, heads, head_dim, dtype=torch.bfloat16, device=kind, requires_grad=True)
            k, v = (torch.zeros(2, kv_heads, head_dim, dtype=torch.bfloat16, device=kind) for _ in range(2))
            stops = torch.tensor([0, 2], dtype=torch.int32, device=kind)
            joint_attention(q, k, v, [], Bounds(stops, stops, 2, 2)).sum().backward()
    except (NotImplementedError, RuntimeError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where runs lie side by side: `queries` and `keys` [runs + 1] int32, and the longest run's. Queries are the last rows of their run."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, pack: Pack) -> "Bounds":
        device = pack.left.device
        queries, keys = [span.queries for span in pack.spans], [span.keys for span in pack.spans]
        return cls(
            torch.tensor([0, *(part.stop for part in queries)], dtype=torch.int32, device=device),
            torch.tensor([0, *(part.stop for part in keys)], dtype=torch.int32, device=device),
            max(part.stop - part.start for part in queries),
            max(part.stop - part.start for part in keys),
        )


def joint_attention(
    q: Tensor, keys: Tensor, values: Tensor, own: Sequence[tuple[Tensor, Tensor]], bounds: Bounds
) -> Tensor:
    """[Q, heads * D] in the queries' dtype, BF16. q [Q, heads, D]; keys, values [K, kv_heads, D]; `own`: (k, v) [Q, kv_heads, D] each."""
    later = [tensor for pair in own for tensor in pair]
    return _Joint.apply(q, keys, values, bounds, *later).flatten(1)


class _Joint(Function):
    """Own keys' scores are formed in float32: a query has three of them at most."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, *later: Tensor) -> Tensor:
        out, norm, _, _, _ = _SHARED(
            *(q, keys, values, bounds.queries, bounds.keys, bounds.most_queries, bounds.most_keys, 0.0),
            is_causal=True,
            return_debug_mask=False,
        )
        scores = _scores(q, later[0::2]) if later else None  # [P, Q, kv, g]
        if scores is not None:
            shared = norm.T.view(scores.shape[1:])
            joint = torch.logaddexp(shared, scores.logsumexp(0))
            grouped = out.view(*joint.shape, -1).float() * (shared - joint).exp_().unsqueeze(-1)
            for score, value in zip(scores, later[1::2], strict=True):
                grouped.addcmul_((score - joint).exp_().unsqueeze(-1), value.unsqueeze(2).float())
            out, norm = grouped.view(q.shape).to(q.dtype), joint.flatten(1).T.contiguous()
        ctx.save_for_backward(q, keys, values, out, norm, *later)
        ctx.bounds, ctx.scores = bounds, scores  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, out, norm, *later = ctx.saved_tensors
        bounds: Bounds = ctx.bounds
        scores: Tensor | None = ctx.scores
        grad = grad_outputs[0].contiguous()
        none = torch.empty(0, device=q.device)
        seeds = torch.zeros(2, dtype=torch.uint64, device=q.device)  # nothing is dropped out
        grad_q, grad_keys, grad_values = _SHARED_BACKWARD(
            *(grad, q, keys, values, out, norm, bounds.queries, bounds.keys, bounds.most_queries, bounds.most_keys),
            *(0.0, True, seeds, none),
        )
        if scores is None:
            return grad_q, grad_keys, grad_values, None
        shape = scores.shape[1:]
        wide, asked = grad.view(*shape, -1).float(), q.view(*shape, -1).float()
        delta = (wide * out.view(*shape, -1).float()).sum(-1)
        joint, size = norm.T.view(shape), q.shape[-1]
        more = grad_q.view(*shape, -1).float()
        own: list[Tensor] = []
        for score, key, value in zip(scores, later[0::2], later[1::2], strict=True):
            p = (score - joint).exp_()
            slope = ((wide * value.unsqueeze(2)).sum(-1) - delta).mul_(p).mul_(size**-0.5).unsqueeze(-1)
            more.addcmul_(slope, key.unsqueeze(2).float())
            own += [(slope * asked).sum(2).to(key.dtype), (p.unsqueeze(-1) * wide).sum(2).to(value.dtype)]
        return more.view(q.shape).to(q.dtype), grad_keys, grad_values, None, *own


def _scores(q: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """[P, Q, kv_heads, heads / kv_heads] float32, scaled."""
    count, _, size = q.shape
    grouped = q.view(count, keys[0].shape[1], -1, size).float() * size**-0.5
    return torch.stack([(grouped * key.unsqueeze(2)).sum(-1) for key in keys])
