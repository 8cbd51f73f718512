"""Attention over SGLang's paged cache, one request at a time, as torch operators of the namespace `sgl_kernel`."""

import torch
from torch.nn import functional

_DECODE = (
    "decode_attention_cpu(Tensor q, Tensor(a!) k_buffer, Tensor(b!) v_buffer, float k_scale, float v_scale, Tensor(c!) out,"
    " Tensor? k, Tensor? v, Tensor locations, Tensor attn_logits, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens,"
    " float scaling, float logit_cap, bool is_cross, int window, Tensor? encoder_lens, Tensor? sinks) -> ()"
)
_EXTEND = (
    "extend_attention_cpu(Tensor q, Tensor? k, Tensor? v, Tensor(a!) out, Tensor k_buffer, Tensor v_buffer, float k_scale,"
    " float v_scale, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, Tensor extend_seq_lens, Tensor"
    " extend_start_loc, int max_extend_len, float scaling, float logit_cap, bool is_cross, int window, Tensor? encoder_lens,"
    " Tensor? sinks, Tensor? tree_mask, bool is_causal) -> ()"
)
_library = torch.library.Library("sgl_kernel", "FRAGMENT")


def define() -> None:
    """Make `torch.ops.sgl_kernel.decode_attention_cpu` and `extend_attention_cpu` exist."""
    _library.define(_DECODE)
    _library.define(_EXTEND)
    _library.impl("decode_attention_cpu", _decode, "CPU")
    _library.impl("extend_attention_cpu", _extend, "CPU")


def _decode(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    locations: torch.Tensor,
    attn_logits: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float,
    logit_cap: float,
    is_cross: bool,
    window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """One query [heads, dim] for each request; its key and value are written to the cache first."""
    _plain(logit_cap, is_cross, window, sinks)
    if k is not None and v is not None:
        k_buffer[locations] = k.view(-1, *k_buffer.shape[1:])
        v_buffer[locations] = v.view(-1, *v_buffer.shape[1:])
    for i, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[row, :length].long()
        out[i : i + 1] = _attend(q[i : i + 1], k_buffer[slots], v_buffer[slots], scaling, causal=False)


def _extend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    max_extend_len: int,
    scaling: float,
    logit_cap: float,
    is_cross: bool,
    window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    is_causal: bool,
) -> None:
    """The last `extend_seq_lens` tokens of each request attend to all before them; SGLang has written their keys already."""
    _plain(logit_cap, is_cross, window, sinks)
    if tree_mask is not None:
        raise NotImplementedError("stand-in CPU kernels: chains only (top-k 1)")
    requests = zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), extend_start_loc.tolist(), strict=True
    )
    for row, length, count, start in requests:
        slots = req_to_token[row, :length].long()
        queries = q[start : start + count]
        out[start : start + count] = _attend(queries, k_buffer[slots], v_buffer[slots], scaling, causal=is_causal)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, *, causal: bool) -> torch.Tensor:
    """q: [n, heads, d] of the last n positions; k, v: [length, kv_heads, d]. Returns [n, heads, d]."""
    n, length, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(groups, dim=1).transpose(0, 1).to(q.dtype)
    values = v.repeat_interleave(groups, dim=1).transpose(0, 1).to(q.dtype)
    mask = None
    if causal and n > 1:
        positions = torch.arange(length - n, length)
        mask = torch.arange(length)[None] <= positions[:, None]
    result = functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=mask, scale=scaling)
    return result.transpose(0, 1)


def _plain(logit_cap: float, is_cross: bool, window: int, sinks: torch.Tensor | None) -> None:
    if logit_cap > 0 or is_cross or window > 0 or sinks is not None:
        raise NotImplementedError("stand-in CPU kernels: plain causal attention only")
