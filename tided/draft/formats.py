"""Drafts in other trainers' files: those of `speculators` and of trainers for SGLang and vLLM are imported, `speculators` reads an export.

Only the arithmetic of `tided.draft.eagle3` is taken: a draft that was trained with other norms, layers or an embedding of its own
would load, and accept nothing. Each is refused by name.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tided.draft import checkpoint, target
from tided.draft.checkpoint import ARCHITECTURE, DraftConfig
from tided.draft.identity import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.target import TargetConfig
from tided.draft.tensors import Array, read_header, read_tensor_entry, to_bf16, to_float32, write_file
from tided.model.errors import Refused, Unavailable

_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM")
_OTHER_ARITHMETIC = (
    *("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"),
    *("attention_bias", "mlp_bias", "logit_scale", "parallel_drafting"),
)
_EMBEDDING = "embed_tokens.weight"
_TOLERANCE = 2.0**-7  # of a value: what rounding to BF16 or F16 may have changed
_ROWS = 4096
_SPECULATORS = "0.9.0"


def import_draft(source: Path, target_dir: Path, out: Path) -> str:
    """Write the draft in `source` to `out` as engines here load it, and return its version.

    `source` is a directory as `speculators` writes it (`speculators_model_type` eagle3), or one for SGLang or vLLM. Raises `Refused` when
    it is not for this target, or computes otherwise.
    """
    shape = target.read_config(target_dir)
    path = source / CONFIG_FILE
    plain = target.read_json(path)
    layer = _layer_config(plain, str(path))
    _check_arithmetic(plain, layer, shape, str(path))
    tensors = _read_tensors(source)
    _check_embedding(tensors.pop(_EMBEDDING, None), target_dir, str(source))
    if "lm_head.weight" not in tensors:
        raise Refused(f"{source}: tensor 'lm_head.weight' is missing")
    draft_vocab = len(tensors["lm_head.weight"])
    tensors |= _vocabulary(tensors, draft_vocab, shape.vocab, str(source))
    heads = _number(layer, "num_attention_heads", str(path))
    config = DraftConfig(
        hidden=_number(layer, "hidden_size", str(path)),
        intermediate=_number(layer, "intermediate_size", str(path)),
        heads=heads,
        kv_heads=_number({"num_key_value_heads": heads} | layer, "num_key_value_heads", str(path)),
        head_dim=layer.get("head_dim") or _number(layer, "hidden_size", str(path)) // heads,
        vocab=shape.vocab,
        draft_vocab=draft_vocab,
        rms_eps=float(layer.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(layer),
        max_position=_number({"max_position_embeddings": 2048} | layer, "max_position_embeddings", str(path)),
    )
    return checkpoint.write(out, config, tensors)


def export_speculators(draft_dir: Path, target_dir: Path, out: Path, gamma: int = 4) -> None:
    """Write the draft in `draft_dir` to `out` as `speculators` reads it: with the target's embedding, which its format wants inside."""
    draft, shape = checkpoint.load(draft_dir), target.read_config(target_dir)
    config = draft.config
    if (config.hidden, config.vocab) != (shape.hidden, shape.vocab):
        raise Refused(f"{draft_dir}: a draft for another target than {target_dir}")
    tensors = {name.replace("midlayer.", "layers.0."): array for name, array in draft.tensors.items()}
    tensors[_EMBEDDING] = to_bf16(target.read_tensor(target_dir, "model.embed_tokens.weight"))
    layer = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": False,
    }
    plain = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": gamma}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": str(target_dir), "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": list(shape.aux_layers),
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG_FILE).write_text(json.dumps(plain, indent=2) + "\n")
    except OSError as exc:
        raise Unavailable(f"{out}: cannot be written ({exc.strerror}); free space or check the permissions") from exc
    write_file(out / WEIGHTS_FILE, tensors, {"format": "pt"})


def _layer_config(plain: dict[str, Any], where: str) -> dict[str, Any]:
    """The table that describes the draft's layer."""
    kind = plain.get("speculators_model_type")
    if kind is None:
        if not set(plain.get("architectures") or ()) & set(_ARCHITECTURES):
            raise Refused(f"{where}: architectures are none of {', '.join(_ARCHITECTURES)}; not an EAGLE-3 draft")
        return plain
    layer = plain.get("transformer_layer_config")
    if kind != "eagle3" or not isinstance(layer, dict):
        raise Refused(f"{where}: a speculator of type {str(kind)[:40]!r}; only eagle3 is read")
    return layer


def _check_arithmetic(plain: Mapping[str, Any], layer: Mapping[str, Any], shape: TargetConfig, where: str) -> None:
    for key in _OTHER_ARITHMETIC:
        if plain.get(key) or layer.get(key):
            raise Refused(f"{where}: {key} is set; tided's drafts do not compute so")
    for key, value in {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu"}.items():
        if layer.get(key, value) != value:
            raise Refused(f"{where}: {key} is {str(layer[key])[:40]!r}, expected {value!r}")
    rope: Any = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise Refused(f"{where}: scaled RoPE; tided's drafts rotate by plain RoPE")
    if (layer.get("hidden_size"), layer.get("vocab_size")) != (shape.hidden, shape.vocab):
        raise Refused(f"{where}: a draft for another target: hidden size or vocabulary differ")
    nested: Any = (plain.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    # SGLang adds one to what stands there.
    ids = plain.get("eagle_aux_hidden_state_layer_ids") or ([k + 1 for k in nested] if nested else None)
    if ids and tuple(ids) != shape.aux_layers:
        raise Refused(f"{where}: reads the states of layers {ids}, samples here have {list(shape.aux_layers)}")


def _read_tensors(source: Path) -> dict[str, Array]:
    """All tensors by the names that they have here, weights in BF16."""
    path = source / WEIGHTS_FILE
    if not path.exists():
        raise Refused(f"{path}: no such file; a draft is one safetensors file")
    tensors: dict[str, Array] = {}
    for name, entry in read_header(path).entries.items():
        array = read_tensor_entry(path, entry)
        floating = entry.dtype in ("BF16", "F16", "F32")
        ours = name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)
        tensors[ours] = to_bf16(array) if floating and ours != _EMBEDDING else np.array(array)
    return tensors


def _vocabulary(tensors: Mapping[str, Array], draft_vocab: int, vocab: int, where: str) -> dict[str, Array]:
    """The map in both directions. A draft without one has the target's whole vocabulary."""
    d2t = tensors.get("d2t")
    if d2t is None and draft_vocab != vocab:
        raise Refused(f"{where}: a head of {draft_vocab} tokens without the tensor 'd2t' that says which")
    offsets = np.zeros(draft_vocab, np.int64) if d2t is None else d2t.astype(np.int64)
    ids = checkpoint.target_ids(offsets)
    if offsets.shape != (draft_vocab,) or ids.min() < 0 or ids.max() >= vocab:
        raise Refused(f"{where}: d2t does not map {draft_vocab} draft tokens into a vocabulary of {vocab}")
    t2d = np.zeros(vocab, np.bool_)
    t2d[ids] = True
    return {"d2t": offsets, "t2d": t2d}


def _check_embedding(embedding: Array | None, target_dir: Path, where: str) -> None:
    """A draft shares the target's embedding: one of its own cannot be served."""
    if embedding is None:
        return
    theirs = target.read_tensor(target_dir, "model.embed_tokens.weight")
    if embedding.shape != theirs.shape or not all(_close(a, b) for a, b in _blocks(embedding, theirs)):
        raise Refused(f"{where}: has an embedding of its own; drafts here share the target's")


def _blocks(a: Array, b: Array) -> Iterable[tuple[Array, Array]]:
    return ((to_float32(a[i : i + _ROWS]), to_float32(b[i : i + _ROWS])) for i in range(0, len(a), _ROWS))


def _close(a: Array, b: Array) -> bool:
    return bool((np.abs(a - b) <= _TOLERANCE * np.abs(b) + 1e-6).all())


def _rope_theta(layer: Mapping[str, Any]) -> float:
    rope: Any = layer.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or layer.get("rope_theta") or 10_000.0)


def _number(table: Mapping[str, Any], key: str, where: str) -> int:
    value = table.get(key)
    if type(value) is not int or value <= 0:
        raise Refused(f"{where}: {key} must be a whole number above 0")
    return value
