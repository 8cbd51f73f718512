"""Where a checkpoint's tensors lie in the draft that vLLM loaded: reading them back, replacing them, restoring them.

vLLM merges q, k, v and gate, up, and cuts tensors over tensor-parallel ranks. Each tensor of a checkpoint is found as a view into a
parameter, and the shard that this rank holds of it as a slice. That this is right is not assumed: the draft that the engine booted
with is read back through it first, bit by bit, and without that there are no swaps. Replacing writes into those views and nowhere
else, and none of them may share memory with the target.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tided.draft.checkpoint import Checkpoint
from tided.engine.vllm.packing import repack
from tided.model.errors import Refused

if TYPE_CHECKING:
    from tided.draft.tensors import Array

# Tensors that vLLM has no use for: it reads only the map from draft to target ids.
_UNUSED = {"t2d"}


class DraftWeights:
    """The draft model of one rank. Methods are called between steps."""

    def __init__(self, draft: Any, target: Any, rank: int, ranks: int) -> None:
        """Raises `Refused` when the draft is not built as expected, or shares a tensor with the target."""
        self._draft, self._rank, self._ranks = draft, rank, ranks
        try:
            self._views = _views(draft)
        except (AttributeError, IndexError, RuntimeError) as exc:
            raise Refused("the draft is not built as vLLM builds an EAGLE-3 draft of one Llama layer") from exc
        theirs = {_storage(tensor) for tensor in (*target.parameters(), *target.buffers()) if tensor.numel()}
        shared = [name for name, view in self._views.items() if _storage(view) in theirs]
        if shared:
            raise Refused(f"the draft shares {shared[0]!r} with the target; replacing it would change the target")
        empty = [name for name, view in self._views.items() if not view.numel()]
        if empty:
            raise Refused(f"the draft's {empty[0]!r} was packed for this processor and cannot be replaced")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._views)

    def differing(self, checkpoint: Checkpoint) -> str:
        """The first tensor that is not bit by bit the checkpoint's (in the engine's dtype), or ""."""
        expected = self._expected(checkpoint.tensors)
        return next((name for name, view in self._views.items() if not torch.equal(view, expected[name])), "")

    @torch.inference_mode()
    def replace(self, checkpoint: Checkpoint) -> str:
        """Load and read back; what was there before is restored when that fails. Gives the first differing tensor, or ""."""
        expected = self._expected(checkpoint.tensors)
        before = {name: view.clone() for name, view in self._views.items()}
        try:
            for name, view in self._views.items():
                view.copy_(expected[name])
            differing = next((name for name, view in self._views.items() if not torch.equal(view, expected[name])), "")
            if not differing:
                repack(self._draft)
        except Exception:
            self._restore(before)
            raise
        if differing:
            self._restore(before)
        return differing

    def _restore(self, before: Mapping[str, torch.Tensor]) -> None:
        for name, view in self._views.items():
            view.copy_(before[name])
        repack(self._draft)

    def _expected(self, tensors: "Mapping[str, Array]") -> dict[str, torch.Tensor]:
        missing = set(self.names).symmetric_difference(tensors.keys() - _UNUSED)
        if missing == {"d2t"} and "d2t" in tensors:
            # A draft over the whole vocabulary has no map in vLLM: then it must be the identity.
            if tensors["d2t"].any():
                raise Refused("a draft over the whole vocabulary with a map that is not the identity")
        elif missing:
            raise Refused(f"tensors {sorted(missing)} have no place in the loaded draft")
        return {
            name: self._shard(name, _tensor(tensors[name]), view).to(view.device, view.dtype)
            for name, view in self._views.items()
        }

    def _shard(self, name: str, whole: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """This rank's part: rows of a column-parallel or vocabulary-parallel tensor, columns of a row-parallel one."""
        if whole.shape == view.shape:
            return whole
        dim = next((i for i in range(whole.ndim) if whole.shape[i] != view.shape[i]), 0)
        size = view.shape[dim]
        # Key and value heads are repeated over ranks when there are fewer of them.
        repeats = (
            max(size * self._ranks // whole.shape[dim], 1) if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
        )
        start = (self._rank // repeats) * size
        if start + size > whole.shape[dim]:
            raise Refused(f"the draft's {name!r} is cut in a way that this plugin does not know")
        return whole.narrow(dim, start, size)


def _views(draft: Any) -> dict[str, torch.Tensor]:
    """Checkpoint name -> view of it in vLLM's parameters (of this rank)."""
    layer = draft.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    query, key = int(attention.q_size), int(attention.kv_size)
    qkv, gate_up = attention.qkv_proj.weight.data, mlp.gate_up_proj.weight.data
    half = gate_up.shape[0] // 2
    head = draft.lm_head
    # Rows beyond the vocabulary are padding.
    rows = min(int(head.num_embeddings_per_partition), int(draft.config.draft_vocab_size))
    parts: dict[str, Callable[[], torch.Tensor]] = {
        "fc.weight": lambda: draft.model.fc.weight.data,
        "midlayer.hidden_norm.weight": lambda: layer.hidden_norm.weight.data,
        "midlayer.input_layernorm.weight": lambda: layer.input_layernorm.weight.data,
        "midlayer.post_attention_layernorm.weight": lambda: layer.post_attention_layernorm.weight.data,
        "midlayer.self_attn.q_proj.weight": lambda: qkv[:query],
        "midlayer.self_attn.k_proj.weight": lambda: qkv[query : query + key],
        "midlayer.self_attn.v_proj.weight": lambda: qkv[query + key : query + 2 * key],
        "midlayer.self_attn.o_proj.weight": lambda: attention.o_proj.weight.data,
        "midlayer.mlp.gate_proj.weight": lambda: gate_up[:half],
        "midlayer.mlp.up_proj.weight": lambda: gate_up[half:],
        "midlayer.mlp.down_proj.weight": lambda: mlp.down_proj.weight.data,
        "norm.weight": lambda: draft.model.norm.weight.data,
        "lm_head.weight": lambda: head.weight.data[:rows],
    }
    views = {name: part() for name, part in parts.items()}
    if draft.draft_id_to_target_id is not None:
        views["d2t"] = draft.draft_id_to_target_id.data
    return views


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensor(array: "Array") -> torch.Tensor:
    """A tensor over `array`; uint16 is BF16 bits."""
    copy = np.array(array)
    if copy.dtype == np.uint16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)
