"""The target: any Llama-architecture checkpoint, with a slot KV cache of its own and hooks that show its aux states.

transformers reads the checkpoint; the forward here runs over the same weights with q, k, v and gate, up fused and one rotary
table, because at batch 1 on a core the interpreter's share of transformers' own forward is a third of the step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from tided.draft.target import describe
from tided.model.errors import Refused


class SlotCache:
    """Keys and values of `layers` layers: [layers, slots, 2 * kv_heads, context, head_dim], the key heads first.

    Rolling back is forgetting a length. Callers keep the lengths; rows beyond them may hold anything finite, the mask hides them.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        context: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.data = torch.zeros(layers, slots, 2 * kv_heads, context, head_dim, dtype=dtype, device=device)
        self.context = context

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` rows of slot `source` into slot `destination`."""
        self.data[:, destination, :, :length] = self.data[:, source, :, :length]


@dataclass(slots=True)
class Placement:
    """Where the rows of one forward stand. Row (i, j) is token j of slot first + i, at position starts[i] + j."""

    first: int
    rows: torch.Tensor  # [b * n * 2 * kv_heads] rows of a layer's cache, seen as [.., head_dim], that are written
    positions: torch.Tensor  # [b, n]
    length: int  # cache rows attended to
    mask: torch.Tensor | None  # additive, [b, 1, n * groups, length]; None: everything is visible


def place(cache: SlotCache, first: int, starts: list[int], n: int, groups: int, dtype: torch.dtype) -> Placement:
    """The placement of n tokens for each of the slots first, first + 1, ...; `groups` query heads share a key head."""
    device = cache.data.device
    steps = torch.arange(n, device=device)
    positions = torch.tensor(starts, device=device)[:, None] + steps
    heads = cache.data.shape[2]
    heads_before = (torch.arange(len(starts), device=device) + first)[:, None] * heads + torch.arange(
        heads, device=device
    )
    rows = positions[:, :, None] + heads_before[:, None] * cache.context
    length = max(starts) + n
    mask = None
    if n > 1 or len(starts) > 1:
        hidden = torch.arange(length, device=device) > positions[..., None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None].repeat_interleave(groups, dim=2)
    return Placement(first, rows.flatten(), positions, length, mask)


def attend(cache: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, at: Placement) -> torch.Tensor:
    """Write keys and values, then attend. Returns [b, n, heads * head_dim].

    cache: one layer, [slots, 2 * kv_heads, context, d]; q: [b, n, heads, d]; kv: [b, n, 2 * kv_heads, d], rotated. The query
    heads that share a key head are folded into the query's length, so that keys and values are read once and never repeated.
    """
    b, n, heads, d = q.shape
    kv_heads = cache.shape[1] // 2
    cache.view(-1, d).index_copy_(0, at.rows, kv.reshape(-1, d))
    seen = cache[at.first : at.first + b, :, : at.length]
    folded = q.view(b, n, kv_heads, heads // kv_heads, d).transpose(1, 2).reshape(b, kv_heads, -1, d)
    out = functional.scaled_dot_product_attention(folded, seen[:, :kv_heads], seen[:, kv_heads:], at.mask)
    return out.view(b, kv_heads, n, -1, d).transpose(1, 2).reshape(b, n, heads * d)


def rotate_(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """Rotary embedding in place. x: [b, n, heads, d]; cos, signed_sin: [b, n, 1, d], the first half of signed_sin negated."""
    low, high = x.chunk(2, dim=-1)
    swapped = torch.cat((high, low), dim=-1)
    x.mul_(cos).addcmul_(swapped, signed_sin)


class Layer(nn.Module):
    """One decoder layer over fused weights. Its first argument is the residual stream before it."""

    def __init__(self, source: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        attention, mlp = source.self_attn, source.mlp
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qkv = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.gate_up = _fused(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.act = mlp.act_fn
        self.input_norm = source.input_layernorm
        self.mlp_norm = source.post_attention_layernorm

    def forward(self, x: torch.Tensor, cache: torch.Tensor, at: Placement, rope: tuple[torch.Tensor, torch.Tensor]):
        b, n, _ = x.shape
        qkv = self.qkv(norm(self.input_norm, x)).view(b, n, self.heads + 2 * self.kv_heads, self.head_dim)
        rotate_(qkv[:, :, : self.heads + self.kv_heads], *rope)
        x = x + self.out(attend(cache, qkv[:, :, : self.heads], qkv[:, :, self.heads :], at))
        gate, up = self.gate_up(norm(self.mlp_norm, x)).chunk(2, dim=-1)
        return x + self.down(self.act(gate) * up)


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """RMS norm with the weight and epsilon of one of transformers' norms."""
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _fused(*linears: Any) -> nn.Linear:
    weight = torch.cat([linear.weight for linear in linears])
    fused = nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return fused


class Target:
    """The served model: forwards over slots 0..max_batch-1, each with room for `max_context` tokens and a step's drafts.

    Not thread-safe: the step thread owns it.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        max_batch: int = 8,
        max_context: int = 1024,
        gamma_max: int = 4,
    ) -> None:
        """Load the checkpoint directory. Raises `Refused` when it is missing, broken or of another architecture."""
        self.info = describe(path)
        model: Any = _load(path, dtype)
        config = model.config
        if max_context > config.max_position_embeddings:
            raise Refused(
                f"max_context {max_context} is above the {config.max_position_embeddings} positions of {path}; lower it"
            )
        self.device, self.dtype = torch.device(device), dtype
        self.max_batch, self.max_context, self.gamma_max = max_batch, max_context, gamma_max
        self.hidden, self.vocab = int(config.hidden_size), int(config.vocab_size)
        heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        head_dim = int(getattr(config, "head_dim", None) or self.hidden // heads)
        self.eos = _eos_ids(path, model)
        model = model.to(self.device)
        rows = max_context + gamma_max + 1
        self.cache = SlotCache(len(model.model.layers), max_batch, rows, kv_heads, head_dim, dtype, self.device)
        self.groups = heads // kv_heads
        self.embed: nn.Embedding = model.model.embed_tokens
        self.final_norm, self.head = model.model.norm, model.lm_head
        self.cos, self.signed_sin = _rope_table(model.model.rotary_emb, rows, dtype, self.device)
        self.layers = nn.ModuleList()
        for index in range(len(model.model.layers)):
            self.layers.append(Layer(model.model.layers[index], heads, kv_heads, head_dim))
            model.model.layers[index] = nn.Identity()  # its unfused weights are freed here, not at the end
        self._states: torch.Tensor | None = None
        for column, index in enumerate(self.info.aux_layers):
            self.layers[index].register_forward_pre_hook(self._aux_hook(column))

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, first: int, starts: list[int]) -> torch.Tensor:
        """Run ids [b, n] of slots first.., at positions starts[i] + j, and write their keys and values.

        Returns states [b, n, aux layers + 1, hidden]: the aux states, then the last hidden state after the final norm.
        """
        b, n = ids.shape
        at = place(self.cache, first, starts, n, self.groups, self.dtype)
        rope = (self.cos[at.positions], self.signed_sin[at.positions])
        states = torch.empty(b, n, len(self.info.aux_layers) + 1, self.hidden, dtype=self.dtype, device=self.device)
        self._states = states
        x = functional.embedding(ids, self.embed.weight)
        for layer, cache in zip(self.layers, self.cache.data, strict=True):
            x = layer(x, cache, at, rope)
        states[:, :, -1] = norm(self.final_norm, x)
        self._states = None
        return states

    @torch.inference_mode()
    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of last hidden states [..., hidden] (after the final norm)."""
        # Flat and contiguous: for some strided inputs torch would copy the whole head once for each row.
        return self.head(last.reshape(-1, self.hidden).contiguous()).view(*last.shape[:-1], -1)

    def _aux_hook(self, column: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._states is not None:
                self._states[:, :, column] = args[0]

        return hook


def _load(path: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise Refused(f"target {path} cannot be loaded: {reason}") from exc
    if not isinstance(model, LlamaForCausalLM):
        raise Refused(f"target {path} is a {type(model).__name__}; this engine serves the Llama architecture only")
    return model.eval().requires_grad_(False)


def _eos_ids(path: Path, model: LlamaForCausalLM) -> frozenset[int]:
    try:
        value = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:
        value = model.config.eos_token_id
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)


def _rope_table(rotary: Any, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sign-folded sin of positions 0..rows-1: [rows, 1, head_dim] each."""
    cos, sin = rotary(torch.zeros(1, dtype=dtype, device=device), torch.arange(rows, device=device)[None])
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return cos[0, :, None], signed[0, :, None]
