"""Version 0 of a lineage: a draft built from the target alone, on which engines boot (training.md, "Cold start")."""

from pathlib import Path
from typing import Any

import numpy as np

from tided.draft import checkpoint, target
from tided.draft.checkpoint import DraftConfig
from tided.draft.tensors import Array, to_bf16
from tided.model.errors import Refused

_ONE = np.uint16(0x3F80)  # 1.0 in BF16


def init_draft(target_dir: Path, out_dir: Path, draft_vocab: int = 8192) -> str:
    """Write version 0 for the target in `target_dir` into `out_dir` and return its version.

    fc passes the high layer's state through; layer and norms are those of the target's last layer, its q, k and v acting on the
    hidden half of the doubled input; head rows come from the target's head, the norm from its final norm.
    """
    shape = target.read_config(target_dir)
    _ = shape.aux_layers  # too shallow a target is refused before anything is written
    if draft_vocab < 1:
        raise Refused(f"draft vocabulary of {draft_vocab}: at least one token")
    ids = default_vocabulary(target_dir, min(draft_vocab, shape.vocab))
    config = DraftConfig(
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab,
        draft_vocab=ids.size,
        rms_eps=shape.rms_eps,
        rope_theta=shape.rope_theta,
        max_position=shape.max_position,
    )
    tensors = _layer_tensors(target_dir, shape.layers - 1)
    fc = np.zeros((config.hidden, 3 * config.hidden), np.uint16)
    fc[np.arange(config.hidden), 2 * config.hidden + np.arange(config.hidden)] = _ONE
    t2d = np.zeros(config.vocab, np.bool_)
    t2d[ids] = True
    tensors |= {
        "fc.weight": fc,
        "norm.weight": to_bf16(target.read_tensor(target_dir, "model.norm.weight")),
        "lm_head.weight": to_bf16(target.read_tensor(target_dir, "lm_head.weight")[ids]),
        "d2t": ids - np.arange(ids.size, dtype=np.int64),
        "t2d": t2d,
    }
    return checkpoint.write(out_dir, config, tensors)


def default_vocabulary(target_dir: Path, size: int) -> Array:
    """`size` target ids, ascending (int64): the special tokens, then the lowest ids, which BPE merges gave the commonest tokens."""
    config = target.read_config(target_dir)
    special = {*config.bos, *config.eos, *_special_tokens(target_dir)}
    chosen = sorted(token for token in special if 0 <= token < config.vocab)[:size]
    taken = set(chosen)
    chosen += [token for token in range(min(config.vocab, size + len(taken))) if token not in taken][
        : size - len(chosen)
    ]
    return np.array(sorted(chosen), np.int64)


def _special_tokens(target_dir: Path) -> set[int]:
    path = target_dir / "tokenizer.json"
    if not path.exists():
        return set()
    added: Any = target.read_json(path).get("added_tokens", [])
    return {int(token["id"]) for token in added if token.get("special")}


def _layer_tensors(target_dir: Path, layer: int) -> dict[str, Array]:
    prefix = f"model.layers.{layer}."
    tensors: dict[str, Array] = {}
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = to_bf16(target.read_tensor(target_dir, f"{prefix}{name}.weight"))
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = to_bf16(target.read_tensor(target_dir, f"{prefix}self_attn.{name}.weight"))
        tensors[f"midlayer.self_attn.{name}.weight"] = np.concatenate([np.zeros_like(weight), weight], axis=1)
    norm = to_bf16(target.read_tensor(target_dir, f"{prefix}input_layernorm.weight"))
    return tensors | {"midlayer.hidden_norm.weight": norm, "midlayer.input_layernorm.weight": np.full_like(norm, _ONE)}
