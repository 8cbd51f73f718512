"""The unrolled draft over a pack: what the engine computes while it drafts, for many start rows at once.

Pass 0 reads the true states. Pass k >= 1 reads the previous pass's `pre`, the token that pass k-1 should have drafted
(teacher-forced) and position + 1. Its attention sees pass 0's keys up to the start row, and the keys of its own passes 1..k:
exactly the cache that an engine has at that moment. Prompt rows only give keys and values: nothing asks them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tided.draft.eagle3 import Eagle3
from tided.training import flash
from tided.training.data import Pack, Span

_MAX_SCORES = 1 << 26  # float32 attention scores at once


class Unroll:
    """The state of an unroll: pass 0 at construction, then `advance` for each further one.

    `active` are the pack's queries that the newest pass computed, ascending; `pre` [len(active), H] is its output.
    """

    def __init__(self, draft: Eagle3, pack: Pack, embedding: Tensor) -> None:
        self._draft = draft
        self._pack = pack
        self._embedding = embedding
        self._bounds = flash.Bounds.of(pack) if _has_flash(draft, pack) else None
        emb = torch.nn.functional.embedding(pack.next_ids, embedding).to(draft.fc.weight.dtype)
        h = draft.fuse(pack.aux.to(draft.fc.weight.dtype)).to(emb.dtype)
        x = draft.mixed(emb, h)
        self._keys, self._values = draft.keys_values(x, pack.positions)
        rows = pack.query_rows
        q = draft.queries(x[rows], pack.positions[rows])
        self._own: list[tuple[Tensor, Tensor]] = []
        self.passes = 1
        self.active = torch.arange(pack.tokens, device=rows.device)
        self.pre = self._attend_and_finish(h[rows], q)

    def advance(self, active: Tensor) -> None:
        """Run the next pass for `active` (ascending, a subset of the previous pass's, each with a label left)."""
        kept = torch.searchsorted(self.active, active)
        h = self.pre[kept]
        self._own = [(k[kept], v[kept]) for k, v in self._own]
        self.active = active
        tokens = self._pack.label_ids[active + (self.passes - 1)]
        emb = torch.nn.functional.embedding(tokens, self._embedding).to(h.dtype)
        positions = self._pack.positions[self._pack.query_rows[active]] + self.passes
        q, k, v = self._draft.project(emb, h, positions)
        self._own.append((k, v))
        self.passes += 1
        self.pre = self._attend_and_finish(h, q)

    def _attend_and_finish(self, h: Tensor, q: Tensor) -> Tensor:
        if self._bounds is not None:
            own = [(self._placed(k), self._placed(v)) for k, v in self._own]
            out = flash.joint_attention(self._placed(q), self._keys, self._values, own, self._bounds)[self.active]
        else:
            rows = self._pack.query_rows[self.active]
            spans = [part for span in _narrow(self._pack.spans, self.active) for part in _bounded(span, q.shape[1])]
            out = attend(q, self._keys, self._values, self._own, rows, spans)
        return self._draft.finish(h, out.to(h.dtype)).to(h.dtype)

    def _placed(self, rows: Tensor) -> Tensor:
        """`rows` of the active queries among those of all: flash kernels need the queries of a run to be its last rows."""
        if len(self.active) == self._pack.tokens:
            return rows
        return rows.new_zeros(self._pack.tokens, *rows.shape[1:]).index_copy(0, self.active, rows)


def _has_flash(draft: Eagle3, pack: Pack) -> bool:
    config, kind = draft.config, pack.left.device.type
    in_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
    return in_bf16 and flash.available(kind, config.head_dim, config.heads, config.kv_heads)


def _narrow(spans: Sequence[Span], active: Tensor) -> list[Span]:
    """The spans with their query ranges counted in `active` instead of in the pack; empty ones left out."""
    stops = torch.tensor([span.queries.stop for span in spans], device=active.device)
    bounds = [0, *torch.searchsorted(active, stops).tolist()]
    return [
        Span(span.keys, slice(start, stop))
        for span, start, stop in zip(spans, bounds[:-1], bounds[1:], strict=True)
        if stop > start
    ]


def _bounded(span: Span, heads: int) -> Iterator[Span]:
    """`span` in parts of its queries, each with at most `_MAX_SCORES` scores: a long run is not a large matrix."""
    most = max(1, _MAX_SCORES // (heads * (span.keys.stop - span.keys.start)))
    for start in range(span.queries.start, span.queries.stop, most):
        yield Span(span.keys, slice(start, min(start + most, span.queries.stop)))


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    spans: Sequence[Span],
) -> Tensor:
    """Joint softmax attention over pass 0's rows and each query's own later rows. Returns [Q, heads * D].

    q [Q, heads, D]; keys, values [K, kv_heads, D] of pass 0; own: (k, v) [Q, kv_heads, D] of each later pass;
    rows [Q]: a query sees its run's keys up to this row. In float32: it is a hundredth of the work, and the shapes vary.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _attend(q.float(), keys.float(), values.float(), [(k.float(), v.float()) for k, v in own], rows, spans)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    spans: Sequence[Span],
) -> Tensor:
    count, heads, size = q.shape
    kv_heads = keys.shape[1]
    grouped = q.view(count, kv_heads, heads // kv_heads, size) * size**-0.5
    own_scores = [(grouped * k.unsqueeze(2)).sum(-1) for k, _ in own]
    parts: list[Tensor] = []
    for span in spans:
        group = grouped[span.queries]  # [n, kv, g, D]
        n, m = group.shape[0], span.keys.stop - span.keys.start
        k = keys[span.keys].permute(1, 2, 0)  # [kv, D, m]
        v = values[span.keys].transpose(0, 1)  # [kv, m, D]
        scores = torch.matmul(group.permute(1, 2, 0, 3).reshape(kv_heads, -1, size), k)
        scores = scores.view(kv_heads, heads // kv_heads, n, m)
        hidden = torch.arange(span.keys.start, span.keys.stop, device=q.device) > rows[span.queries].unsqueeze(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        diagonal = [score[span.queries].permute(1, 2, 0).unsqueeze(-1) for score in own_scores]
        weights = torch.softmax(torch.cat([scores, *diagonal], -1), -1)
        shared = torch.matmul(weights[..., :m].reshape(kv_heads, -1, m), v)
        out = shared.view(kv_heads, heads // kv_heads, n, size).permute(2, 0, 1, 3)
        for j, (_, value) in enumerate(own):
            share = weights[..., m + j].permute(2, 0, 1).unsqueeze(-1)  # [n, kv, g, 1]
            out = out + share * value[span.queries].unsqueeze(2)
        parts.append(out.reshape(n, heads * size))
    return torch.cat(parts)
