"""Makes reference states of a target, one layer in memory at a time: what an engine's capture is checked against.

A plain float32 Llama forward over a few short sequences; see tided.draft.reference for what is kept.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tided.draft import target
from tided.draft.reference import FILE, SCHEMA
from tided.draft.target import TargetConfig
from tided.draft.tensors import to_float32, write_file
from tided.model.errors import Refused
from tided.model.jobs import JobResult, JobSpec, Progress

_WEIGHTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def make_reference(spec: JobSpec, out_dir: Path, report: Callable[[Progress], None]) -> JobResult:
    """Run a reference job over `token_ids`, cut into sequences by the option `lengths` (one sequence without it)."""
    target_dir = Path(spec.target_dir)
    digest = target.describe(target_dir).digest
    if digest != spec.target:
        raise Refused(f"{target_dir} holds target {digest[:12]}, the job is about {spec.target[:12]}")
    torch.set_num_threads(int(spec.options.get("threads", 1)))
    sequences = _cut(spec.token_ids, spec.options.get("lengths", [len(spec.token_ids)]))
    config = target.read_config(target_dir)
    states, norms = reference_states(target_dir, sequences, report)
    tensors = {
        "states": states.numpy(),
        "norms": norms.numpy(),
        "ids": np.array(spec.token_ids, np.int32),
        "lengths": np.array([len(ids) for ids in sequences], np.int32),
    }
    path = out_dir / FILE
    write_file(path, tensors, {"schema": SCHEMA, "target": digest, "rms_eps": repr(config.rms_eps)})
    return JobResult(staged=str(path))


@torch.inference_mode()
def reference_states(
    target_dir: Path, sequences: Sequence[Sequence[int]], report: Callable[[Progress], None] = lambda _: None
) -> tuple[Tensor, Tensor]:
    """States [tokens of all sequences, layers + 2, hidden] and norm weights [layers + 1, hidden], float32."""
    config = target.read_config(target_dir)
    tokens = [token for ids in sequences for token in ids]
    if not tokens or min(tokens) < 0 or max(tokens) >= config.vocab:
        raise Refused(f"token_ids: at least one, each in 0..{config.vocab - 1}")
    embeddings = target.read_tensor(target_dir, "model.embed_tokens.weight")
    streams = [torch.from_numpy(to_float32(embeddings[np.array(ids)])) for ids in sequences]
    longest = max(len(ids) for ids in sequences)
    angles = torch.arange(longest).float().unsqueeze(1) * inverse_frequencies(config)
    kept, norms = [torch.cat(streams)], list[Tensor]()
    for layer in range(config.layers):
        weights = {name: _read(target_dir, f"model.layers.{layer}.{name}.weight") for name in _WEIGHTS}
        streams = [_layer(x, weights, angles[: len(x)], config) for x in streams]
        kept.append(torch.cat(streams))
        norms.append(weights["input_layernorm"])
        report(Progress((layer + 1) / config.layers, f"layer {layer + 1} of {config.layers}"))
    norms.append(_read(target_dir, "model.norm.weight"))
    kept.append(_norm(kept[-1], norms[-1], config.rms_eps))
    return torch.stack(kept, 1), torch.stack(norms)


def _cut(token_ids: tuple[int, ...], lengths: object) -> list[tuple[int, ...]]:
    if (
        not isinstance(lengths, list)
        or not all(type(length) is int and length > 0 for length in lengths)
        or sum(lengths) != len(token_ids)
    ):
        raise Refused("options.lengths: expected lengths of sequences that add up to the token_ids")
    ends = np.cumsum(lengths).tolist()
    return [token_ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]


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


def _layer(x: Tensor, weight: dict[str, Tensor], angles: Tensor, config: TargetConfig) -> Tensor:
    normed = _norm(x, weight["input_layernorm"], config.rms_eps)

    def heads(name: str, count: int) -> Tensor:
        return (normed @ weight[f"self_attn.{name}"].T).unflatten(-1, (count, config.head_dim)).transpose(0, 1)

    q, k = (_rotate(heads(*item), angles) for item in (("q_proj", config.heads), ("k_proj", config.kv_heads)))
    v = heads("v_proj", config.kv_heads)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + out.transpose(0, 1).flatten(1) @ weight["self_attn.o_proj"].T
    normed = _norm(x, weight["post_attention_layernorm"], config.rms_eps)
    gated = torch.nn.functional.silu(normed @ weight["mlp.gate_proj"].T) * (normed @ weight["mlp.up_proj"].T)
    return x + gated @ weight["mlp.down_proj"].T


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _read(target_dir: Path, name: str) -> Tensor:
    return torch.from_numpy(to_float32(target.read_tensor(target_dir, name)))
