"""What the trainer and `draft init` need of a target: its shape, single tensors and a content digest, without instantiating it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tided.draft.tensors import Array, Entry, read_header, read_tensor_entry
from tided.model.engines import TargetInfo
from tided.model.errors import Refused, Unavailable

_BLOCKS = 16
_BLOCK_BYTES = 64 << 10
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What a draft must agree with."""

    hidden: int
    vocab: int


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """The target's config.json, as far as a Llama-architecture decoder needs it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_eps: float
    rope_theta: float
    rope: dict[str, Any]  # rope_parameters, or the older rope_scaling
    max_position: int
    bos: tuple[int, ...]
    eos: tuple[int, ...]

    @property
    def shape(self) -> TargetShape:
        return TargetShape(self.hidden, self.vocab)

    @property
    def aux_layers(self) -> tuple[int, int, int]:
        """Indices into `hidden_states` (0 = embeddings): low, middle, high; vLLM's and SGLang's default. Needs 7 layers."""
        low, middle, high = 2, self.layers // 2, self.layers - 3
        if not low < middle < high:
            raise Refused(
                f"a target of {self.layers} layers is too shallow for EAGLE-3's layers (2, L//2, L-3): 7 at least"
            )
        return low, middle, high


def read_json(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON table from disk; `Refused` when it is missing, oversize or no table."""
    try:
        if path.stat().st_size > max_bytes:
            raise Refused(f"{path}: larger than {max_bytes} bytes")
        plain = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise Refused(f"{path}: no such file") from exc
    except OSError as exc:
        raise Unavailable(f"{path}: cannot be read ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:
        raise Refused(f"{path}: not JSON") from exc
    if not isinstance(plain, dict):
        raise Refused(f"{path}: not a JSON table")
    return cast("dict[str, Any]", plain)


def read_config(directory: Path) -> TargetConfig:
    """Read a Llama-architecture target's config.json."""
    path = directory / "config.json"
    plain = read_json(path)
    if plain.get("model_type") != "llama":
        raise Refused(f"{path}: model_type {plain.get('model_type')!r}; only Llama-architecture targets are supported")
    rope = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
    try:
        heads = int(plain["num_attention_heads"])
        return TargetConfig(
            layers=int(plain["num_hidden_layers"]),
            hidden=int(plain["hidden_size"]),
            intermediate=int(plain["intermediate_size"]),
            heads=heads,
            kv_heads=int(plain.get("num_key_value_heads") or heads),
            head_dim=int(plain.get("head_dim") or int(plain["hidden_size"]) // heads),
            vocab=int(plain["vocab_size"]),
            rms_eps=float(plain.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or plain.get("rope_theta") or 10_000.0),
            rope=dict(rope),
            max_position=int(plain.get("max_position_embeddings", 2048)),
            bos=_token_ids(plain.get("bos_token_id")),
            eos=_token_ids(plain.get("eos_token_id")),
        )
    except KeyError as exc:
        raise Refused(f"{path}: key {exc.args[0]!r} is missing") from exc
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as exc:
        raise Refused(f"{path}: a value has the wrong type") from exc


def describe(directory: Path) -> TargetInfo:
    """The target's identity. The digest covers config.json, every safetensors header and evenly spaced blocks of content."""
    config = read_config(directory)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in _files(directory):
        digest.update(read_header(path).digest_bytes)
        size = path.stat().st_size
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return TargetInfo(
        digest=digest.hexdigest(),
        name=directory.resolve().name,
        layers=config.layers,
        hidden=config.hidden,
        vocab=config.vocab,
        aux_layers=config.aux_layers,
    )


def read_tensor(directory: Path, name: str) -> Array:
    """One tensor by its Hugging Face name, mapped read-only (BF16 as uint16 bits).

    `lm_head.weight` of a tied target is `model.embed_tokens.weight`.
    """
    path, entry = _locate(directory, name)
    return read_tensor_entry(path, entry)


def _locate(directory: Path, name: str) -> tuple[Path, Entry]:
    for path in _files(directory, name):
        entry = read_header(path).entries.get(name)
        if entry is not None:
            return path, entry
    if name == "lm_head.weight":
        return _locate(directory, "model.embed_tokens.weight")
    raise Refused(f"{directory}: no tensor {name!r} in its safetensors files")


def _files(directory: Path, name: str | None = None) -> list[Path]:
    """The target's safetensors files; with `name` and an index, the one that the index gives for it."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise Refused(f"{index}: no weight_map")
        names = {str(value) for key, value in weight_map.items() if name is None or key == name}
        if any("/" in value or value.startswith(".") for value in names):
            raise Refused(f"{index}: a file name leaves the directory")
        return [directory / value for value in sorted(names)]
    single = directory / "model.safetensors"
    if not single.exists():
        raise Refused(
            f"{directory}: no model.safetensors; the target must be a Hugging Face directory with safetensors weights"
        )
    return [single]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)
