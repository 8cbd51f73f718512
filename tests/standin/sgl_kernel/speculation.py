"""Bookkeeping of cache slots and of EAGLE chains. With top-k 1 a tree is a chain: token j + 1 follows token j."""

import ctypes
from typing import Any

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write `out_cache_loc`, request after request, into columns starts..ends of the requests' rows."""
    at = 0
    for row, start, end in zip(req_pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[at : at + end - start].to(req_to_token.dtype)
        at += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """The inverse: gather columns starts..ends of the requests' rows into `out_cache_loc`."""
    at = 0
    for row, start, end in zip(req_pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        out_cache_loc[at : at + end - start] = req_to_token[row, start:end].to(out_cache_loc.dtype)
        at += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    columns: int,
) -> None:
    """The slots of each request's next `topk * columns` tokens."""
    count = topk * columns
    for i, (row, start) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        out_cache_loc[i * count : (i + 1) * count] = req_to_token[row, start : start + count].to(out_cache_loc.dtype)


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    topk: int,
    steps: int,
    pool_len: int,
) -> torch.Tensor:
    """A table with one row for each chain: prefix and drafted tokens lie behind each other in the request's own row."""
    _chain(topk)
    return req_to_token[req_pool_indices.long()].contiguous()


def build_tree_kernel_efficient_cpu(
    parent_list: Any,
    selected_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    steps: int,
    tokens: int,
    tree_mask_mode: Any,
) -> None:
    """Each request's `tokens` rows form a chain from its newest token on. The mask is SGLang's to leave unread for chains."""
    _chain(topk)
    requests = seq_lens.numel()
    columns = torch.arange(tokens)
    positions.view(requests, tokens).copy_(seq_lens[:, None] + columns)
    retrieve_index.copy_(torch.arange(requests * tokens).view(requests, tokens))
    retrieve_next_token.copy_(torch.where(columns + 1 < tokens, columns + 1, -1).expand(requests, tokens))
    retrieve_next_sibling.fill_(-1)


def verify_tree_greedy_cpu(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Accept drafted tokens while they are what the target predicts, then one token of the target's own."""
    rows, drafts, wanted = retrive_index.tolist(), candidates.tolist(), target_predict.tolist()
    for i, (row, drafted, target) in enumerate(zip(rows, drafts, wanted, strict=True)):
        accepted = 0
        while accepted + 1 < len(drafted) and drafted[accepted + 1] == target[accepted]:
            accepted += 1
        accept_token_num[i] = accepted
        for j in range(accepted + 1):
            accept_index[i, j] = row[j]
            predicts[row[j]] = target[j]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, stride: int
) -> None:
    """The last accepted token of each request."""
    at = torch.arange(accept_lens.numel()) * stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.flatten()[at])


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """The slots of the accepted tokens, packed."""
    kept = accept_index.flatten()
    kept = kept[kept >= 0].long()
    accept_out_cache_loc[: kept.numel()] = out_cache_loc[kept]


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor
) -> None:
    """Move cache slots of all layers, whose buffers come as addresses and bytes a slot."""
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        held = [ctypes.string_at(address + source * stride, stride) for source in sources.tolist()]
        for target, data in zip(targets.tolist(), held, strict=True):
            ctypes.memmove(address + target * stride, data, stride)


def rotate_input_ids_cpu(*_: Any) -> None:
    raise NotImplementedError("stand-in CPU kernels: one draft layer only")


def _chain(topk: int) -> None:
    if topk != 1:
        raise NotImplementedError("stand-in CPU kernels: chains only (top-k 1)")
