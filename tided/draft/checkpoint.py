"""A draft's directory: config.json and model.safetensors, as both vLLM and SGLang load them (training.md, "Checkpoint").

Nothing of a checkpoint is trusted: `load` reads each file once, under a cap, and checks names, dtypes, shapes, offsets, values
and the vocabulary map before it returns anything. The version is computed from the very bytes that were checked.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tided.draft.identity import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.identity import version_of as version_of
from tided.draft.target import TargetShape
from tided.draft.tensors import DTYPES, Array, Header, bf16_is_finite, parse_header, view_tensor, write_file
from tided.model.errors import Refused, Unavailable

ARCHITECTURE = "LlamaForCausalLMEagle3"

_MAX_CONFIG_BYTES = 64 << 10
_MAX_HEADER_BYTES = 64 << 10
# Keys that vLLM and SGLang read differently, or that change the semantics; a draft of ours never sets them.
_FORBIDDEN = ("norm_before_residual", "norm_before_fc", "norm_output", "attention_bias", "mlp_bias", "logit_scale")


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Shape of an EAGLE-3 draft: one Llama layer with inputs 2 x hidden wide, and a head over `draft_vocab` tokens.

    Positions are rotated with plain RoPE at the target's `rope_theta`, whatever scaling the target uses.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int
    rms_eps: float
    rope_theta: float
    max_position: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked checkpoint in memory. BF16 tensors are uint16 arrays, views into one buffer."""

    config: DraftConfig
    version: str
    vocab_id: str
    tensors: dict[str, Array]


def expected_tensors(config: DraftConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of every tensor that a checkpoint holds, and no other."""
    hidden, wide = config.hidden, 2 * config.hidden
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "hidden_norm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, wide),
        "self_attn.k_proj": (key, wide),
        "self_attn.v_proj": (key, wide),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (config.intermediate, hidden),
        "mlp.up_proj": (config.intermediate, hidden),
        "mlp.down_proj": (hidden, config.intermediate),
    }
    weights: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 3 * hidden)}
    weights |= {f"midlayer.{name}.weight": shape for name, shape in layer.items()}
    weights |= {"norm.weight": (hidden,), "lm_head.weight": (config.draft_vocab, hidden)}
    expected: dict[str, tuple[str, tuple[int, ...]]] = {name: ("BF16", shape) for name, shape in weights.items()}
    return expected | {"d2t": ("I64", (config.draft_vocab,)), "t2d": ("BOOL", (config.vocab,))}


def read_config(directory: Path) -> DraftConfig:
    """Read and check config.json."""
    return _parse_config(_read(directory / CONFIG_FILE, _MAX_CONFIG_BYTES), str(directory / CONFIG_FILE))


def load(directory: Path, target: TargetShape | None = None) -> Checkpoint:
    """Read and check a checkpoint whole, against `target` when given. Raises `Refused` with the first thing that is wrong."""
    config_bytes = _read(directory / CONFIG_FILE, _MAX_CONFIG_BYTES)
    config = _parse_config(config_bytes, str(directory / CONFIG_FILE))
    if target is not None and target != TargetShape(config.hidden, config.vocab):
        raise Refused(
            f"{directory}: a draft for another target: hidden {config.hidden} and vocabulary {config.vocab},"
            f" this target has {target.hidden} and {target.vocab}"
        )
    expected = expected_tensors(config)
    data_bytes = sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in expected.values())
    where = str(directory / WEIGHTS_FILE)
    raw = _read(directory / WEIGHTS_FILE, 8 + _MAX_HEADER_BYTES + data_bytes)
    tensors = _checked_tensors(_header(raw, where), raw, expected, where)
    _check_vocabulary(tensors["d2t"], tensors["t2d"], config, where)
    digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little") + config_bytes)
    digest.update(raw)
    return Checkpoint(config, digest.hexdigest(), vocab_id(tensors["d2t"], config.vocab), tensors)


def verify(directory: Path, target: TargetShape | None = None) -> str:
    """Check a checkpoint whole and return its version. Raises `Refused` with the first thing that is wrong."""
    return load(directory, target).version


def vocab_id_of(directory: Path) -> str:
    """Digest of a checked checkpoint's vocabulary map: drafts of one pool share it."""
    return load(directory).vocab_id


def write(directory: Path, config: DraftConfig, tensors: Mapping[str, Array]) -> str:
    """Write a checkpoint (BF16 as uint16 bits) into `directory`, check what was written, and return its version."""
    expected = expected_tensors(config)
    if set(tensors) != set(expected):
        raise Refused(f"{directory}: tensors {sorted(set(tensors) ^ set(expected))} are missing or too many")
    plain = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "draft_vocab_size": config.draft_vocab,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(plain, indent=2) + "\n")
    except OSError as exc:
        raise Unavailable(
            f"{directory}: cannot be written ({exc.strerror}); free space or check the permissions"
        ) from exc
    write_file(directory / WEIGHTS_FILE, tensors, {"format": "pt"})
    return verify(directory)


def target_ids(d2t: Array) -> Array:
    """Target ids of the draft vocabulary: draft id + d2t[draft id]. Shape [draft_vocab], int64."""
    return np.arange(d2t.shape[0], dtype=np.int64) + d2t


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError as exc:
        raise Refused(f"{path}: no such file") from exc
    except OSError as exc:
        raise Unavailable(f"{path}: cannot be read ({exc.strerror})") from exc
    if len(raw) > max_bytes:
        raise Refused(f"{path}: larger than the {max_bytes} bytes that it may have")
    return raw


def _header(raw: bytes, where: str) -> Header:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > _MAX_HEADER_BYTES or 8 + length > len(raw):
        raise Refused(f"{where}: truncated, or a header of {length} bytes (at most {_MAX_HEADER_BYTES} are read)")
    return parse_header(raw[8 : 8 + length], len(raw), where)


def _checked_tensors(
    header: Header, raw: bytes, expected: dict[str, tuple[str, tuple[int, ...]]], where: str
) -> dict[str, Array]:
    embedding = next((name for name in header.entries if "embed_tokens" in name), None)
    if embedding is not None:
        raise Refused(f"{where}: holds {embedding[:80]!r}; engines would overwrite the target's embedding with it")
    for name in expected:
        if name not in header.entries:
            raise Refused(f"{where}: tensor {name!r} is missing")
    tensors: dict[str, Array] = {}
    for name, entry in header.entries.items():
        if name not in expected:
            raise Refused(f"{where}: tensor {name[:80]!r} does not belong in a draft")
        if (entry.dtype, entry.shape) != expected[name]:
            dtype, shape = expected[name]
            raise Refused(f"{where}: tensor {name!r} is {entry.dtype} {entry.shape}, expected {dtype} {shape}")
        tensors[name] = view_tensor(raw, entry)
        if entry.dtype == "BF16" and not bf16_is_finite(tensors[name]):
            raise Refused(f"{where}: tensor {name!r} holds NaN or infinite values")
    return tensors


def _check_vocabulary(d2t: Array, t2d: Array, config: DraftConfig, where: str) -> None:
    if bool((t2d.view(np.uint8) > 1).any()):
        raise Refused(f"{where}: t2d holds bytes that are neither true nor false")
    ids = target_ids(d2t)
    if bool((ids < 0).any()) or bool((ids >= config.vocab).any()) or np.unique(ids).size != ids.size:
        raise Refused(
            f"{where}: d2t maps outside the target's vocabulary of {config.vocab}, or two draft ids to one token"
        )
    if int(t2d.sum()) != ids.size or not bool(t2d[ids].all()):
        raise Refused(f"{where}: t2d and d2t disagree")


def vocab_id(d2t: Array, vocab: int) -> str:
    """Digest of a vocabulary map: drafts of one pool share it."""
    return hashlib.sha256(vocab.to_bytes(8, "little") + np.ascontiguousarray(d2t).tobytes()).hexdigest()


def _parse_config(raw: bytes, where: str) -> DraftConfig:
    try:
        plain = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Refused(f"{where}: not JSON") from exc
    if not isinstance(plain, dict):
        raise Refused(f"{where}: not a JSON table")
    fixed = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    for key, value in fixed.items():
        if plain.get(key) != value:
            raise Refused(f"{where}: {key} is {str(plain.get(key))[:80]!r}, expected {value!r}")
    for key in _FORBIDDEN:
        if plain.get(key):
            raise Refused(f"{where}: {key} is set; vLLM and SGLang do not agree on it")
    config = DraftConfig(
        hidden=_count(plain, "hidden_size", where),
        intermediate=_count(plain, "intermediate_size", where),
        heads=_count(plain, "num_attention_heads", where),
        kv_heads=_count(plain, "num_key_value_heads", where),
        head_dim=_count(plain, "head_dim", where),
        vocab=_count(plain, "vocab_size", where),
        draft_vocab=_count(plain, "draft_vocab_size", where),
        rms_eps=_positive(plain, "rms_norm_eps", where),
        rope_theta=_positive(plain, "rope_theta", where),
        max_position=_count(plain, "max_position_embeddings", where, 2**30),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise Refused(f"{where}: heads must be a multiple of key-value heads, and head_dim even")
    if config.draft_vocab > config.vocab:
        raise Refused(f"{where}: draft_vocab_size {config.draft_vocab} exceeds vocab_size {config.vocab}")
    return config


def _count(plain: dict[str, Any], key: str, where: str, most: int = 2**22) -> int:
    value = plain.get(key)
    if type(value) is not int or not 0 < value <= most:
        raise Refused(f"{where}: {key} must be a whole number in 1..{most}")
    return value


def _positive(plain: dict[str, Any], key: str, where: str) -> float:
    value = plain.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise Refused(f"{where}: {key} must be a positive number")
    return float(value)
