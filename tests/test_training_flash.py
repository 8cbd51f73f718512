"""The joint attention over flash kernels against the plain one: its arithmetic with stand-ins for the kernels, the kernels on a device."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE
from tided.training import flash, ttt
from tided.training.data import Span
from tided.training.flash import Bounds, joint_attention

HEADS, KV_HEADS, SIZE = 4, 2, 32
RUNS = [(7, 7), (9, 4), (1, 1), (12, 5)]
"""Rows and, of these, queries."""


def spans_of(runs: Sequence[tuple[int, int]]) -> tuple[list[Span], Tensor]:
    """The runs' spans, and the row of each query."""
    spans: list[Span] = []
    rows: list[int] = []
    keys = asked = 0
    for count, queries in runs:
        spans.append(Span(slice(keys, keys + count), slice(asked, asked + queries)))
        rows += range(keys + count - queries, keys + count)
        keys, asked = keys + count, asked + queries
    return spans, torch.tensor(rows)


def bounds_of(spans: Sequence[Span], device: str) -> Bounds:
    queries, keys = (
        torch.tensor([0, *stops], dtype=torch.int32, device=device) for stops in zip(*stops_of(spans), strict=True)
    )
    return Bounds(queries, keys, max(count for _, count in RUNS), max(count for count, _ in RUNS))


def stops_of(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(span.queries.stop, span.keys.stop) for span in spans]


def inputs(later: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, keys, values, then k and v of each later pass."""
    generator = torch.Generator().manual_seed(later)
    rows, asked = sum(count for count, _ in RUNS), sum(count for _, count in RUNS)
    shapes = [(asked, HEADS, SIZE), *[(rows, KV_HEADS, SIZE)] * 2, *[(asked, KV_HEADS, SIZE)] * (2 * later)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def results(body: Callable[[], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What it returns, and the gradients of its weighted sum."""
    out = body()
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach().float(), *(grad.float() for grad in torch.autograd.grad((out * weights).sum(), tensors))]


def both(later: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    spans, rows = spans_of(RUNS)
    tensors = inputs(later, dtype, device)
    q, keys, values, *rest = tensors
    own = list(zip(rest[0::2], rest[1::2], strict=True))
    plain = results(lambda: ttt.attend(q, keys, values, own, rows.to(device), spans), tensors)
    joint = results(lambda: joint_attention(q, keys, values, own, bounds_of(spans, device)), tensors)
    return plain, joint


def scores(q: Tensor, keys: Tensor, stops_q: Tensor, stops_k: Tensor) -> Tensor:
    """[heads, Q, K]; -inf for what a query must not see: queries are their run's last rows."""
    wide = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", q, wide) * q.shape[-1] ** -0.5
    hidden = torch.ones(found.shape[1:], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(stops_q.unfold(0, 2, 1).tolist(), stops_k.unfold(0, 2, 1).tolist(), strict=True):
        for i in range(q0, q1):
            hidden[i, k0 : k1 - (q1 - 1 - i)] = False
    return found.masked_fill(hidden, float("-inf"))


def shared(
    q: Tensor, keys: Tensor, values: Tensor, stops_q: Tensor, stops_k: Tensor, *_: float, **__: bool
) -> tuple[Tensor, Tensor, None, None, None]:
    """As torch's kernel: the output and each query's log-sum-exp [heads, Q]."""
    found = scores(q, keys, stops_q, stops_k)
    wide = values.repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("hqk,khd->qhd", found.softmax(-1), wide), found.logsumexp(-1), None, None, None


def shared_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, norm: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As torch's kernel: it takes the output and the log-sum-exp as they are given."""
    share = HEADS // KV_HEADS
    p = (scores(q, keys, rest[0], rest[1]) - norm.unsqueeze(-1)).exp()
    given = torch.einsum("qhd,khd->hqk", grad, values.repeat_interleave(share, 1))
    slope = p * (given - (grad * out).sum(-1).T.unsqueeze(-1)) * SIZE**-0.5
    wide_keys = torch.einsum("hqk,qhd->khd", slope, q)
    wide_values = torch.einsum("hqk,qhd->khd", p, grad)
    grad_q = torch.einsum("hqk,khd->qhd", slope, keys.repeat_interleave(share, 1))
    return grad_q, *(x.view(len(keys), KV_HEADS, share, SIZE).sum(2) for x in (wide_keys, wide_values))


@pytest.mark.parametrize("later", [0, 1, 3])
def test_own_keys_join_what_the_kernels_give(later: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_SHARED", shared)
    monkeypatch.setattr(flash, "_SHARED_BACKWARD", shared_backward)
    plain, joint = both(later, torch.float32, "cpu")
    for expected, found in zip(plain, joint, strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="no device with flash kernels")
@pytest.mark.parametrize("later", [0, 1, 3])
def test_the_kernels_give_what_the_stand_ins_do(later: int) -> None:
    assert flash.available(DEVICE, SIZE, HEADS, KV_HEADS)
    plain, joint = both(later, torch.bfloat16, DEVICE)
    for expected, found in zip(plain, joint, strict=True):
        assert (expected - found).norm() < 0.02 * expected.norm()


def test_a_processor_has_none() -> None:
    assert not flash.available("cpu", SIZE, HEADS, KV_HEADS)
