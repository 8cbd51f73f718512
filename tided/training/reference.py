"""Reference states of a target, one layer in memory at a time: what an engine's capture is checked against.

A plain float32 Llama forward over one sequence. Aux state k is the residual stream before layer k (Hugging Face's
`hidden_states[k]`), the fourth is the last hidden state after the final norm.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tided.draft import target
from tided.draft.target import TargetConfig
from tided.draft.tensors import Array, to_float32, write_file
from tided.model.errors import Refused

FILE = "reference.safetensors"


@torch.inference_mode()
def reference_states(target_dir: Path, token_ids: tuple[int, ...]) -> Tensor:
    """[tokens, 4, hidden] float32: low, middle and high aux states, and the last one."""
    config = target.read_config(target_dir)
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= config.vocab:
        raise Refused(f"token_ids: at least one, each in 0..{config.vocab - 1}")
    rows = target.read_tensor(target_dir, "model.embed_tokens.weight")[np.array(token_ids)]
    x = torch.from_numpy(to_float32(rows))
    angles = torch.arange(len(token_ids)).float().unsqueeze(1) * inverse_frequencies(config)
    kept: list[Tensor] = []
    for layer in range(config.layers):
        if layer in config.aux_layers:
            kept.append(x)
        x = _layer(x, _Weights(target_dir, f"model.layers.{layer}."), angles, config)
    kept.append(_norm(x, _read(target_dir, "model.norm.weight"), config.rms_eps))
    return torch.stack(kept, 1)


def write_reference(target_dir: Path, token_ids: tuple[int, ...], out_dir: Path) -> Path:
    """Compute and write `states` F32 [tokens, 4, hidden] and `ids` I32 [tokens]; returns the file's path."""
    states: Array = reference_states(target_dir, token_ids).numpy()
    path = out_dir / FILE
    write_file(path, {"states": states, "ids": np.array(token_ids, np.int32)}, {"schema": "1"})
    return path


def inverse_frequencies(config: TargetConfig) -> Tensor:
    """RoPE's inverse frequencies [head_dim / 2], with Llama 3's scaling where the target has it."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = config.rope_theta**-exponents
    kind = config.rope.get("rope_type") or config.rope.get("type") or "default"
    if kind == "default":
        return plain
    if kind != "llama3":
        raise Refused(f"rope_type {kind!r}: the reference knows default and llama3")
    factor, low = float(config.rope["factor"]), float(config.rope["low_freq_factor"])
    high, old = float(config.rope["high_freq_factor"]), float(config.rope["original_max_position_embeddings"])
    smooth = ((old * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # turns within the old context
    return (1 - smooth) * plain / factor + smooth * plain


class _Weights:
    """A layer's matrices, read when they are asked for."""

    def __init__(self, target_dir: Path, prefix: str) -> None:
        self._target_dir, self._prefix = target_dir, prefix

    def __call__(self, name: str) -> Tensor:
        return _read(self._target_dir, f"{self._prefix}{name}.weight")


def _layer(x: Tensor, weight: _Weights, angles: Tensor, config: TargetConfig) -> Tensor:
    normed = _norm(x, weight("input_layernorm"), config.rms_eps)

    def heads(name: str, count: int) -> Tensor:
        return (normed @ weight(f"self_attn.{name}").T).unflatten(-1, (count, config.head_dim)).transpose(0, 1)

    q, k = (_rotate(heads(*item), angles) for item in (("q_proj", config.heads), ("k_proj", config.kv_heads)))
    v = heads("v_proj", config.kv_heads)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + out.transpose(0, 1).flatten(1) @ weight("self_attn.o_proj").T
    normed = _norm(x, weight("post_attention_layernorm"), config.rms_eps)
    gated = torch.nn.functional.silu(normed @ weight("mlp.gate_proj").T) * (normed @ weight("mlp.up_proj").T)
    return x + gated @ weight("mlp.down_proj").T


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _read(target_dir: Path, name: str) -> Tensor:
    return torch.from_numpy(to_float32(target.read_tensor(target_dir, name)))
