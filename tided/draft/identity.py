"""What identifies a draft's checkpoint and a target, computed from their files alone: neither torch nor numpy.

For whoever serves with the base installation only; docs/protocol.md describes the same for other languages.
"""

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tided.model.errors import Refused, Unavailable

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_CONFIG_BYTES = 64 << 10
_MAX_HEADER_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DraftIdentity:
    """`version`: the content's digest; `vocab_id`: the digest of its vocabulary map."""

    version: str
    vocab_id: str


def version_of(directory: Path) -> str:
    """SHA-256 over config.json (after its length, 8 bytes little-endian) and model.safetensors; nothing else is checked."""
    config = read_small(directory / CONFIG_FILE, MAX_CONFIG_BYTES)
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    with open_file(directory / WEIGHTS_FILE) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def identify(directory: Path) -> DraftIdentity:
    """Read a draft's checkpoint. Raises `Refused` when it is not one, `Unavailable` when it cannot be read.

    Tensors are hashed, not checked: an engine that loads them checks them. The map's digest is SHA-256 over the target's vocabulary
    size (8 bytes little-endian) and the bytes of `d2t`.
    """
    config = read_small(directory / CONFIG_FILE, MAX_CONFIG_BYTES)
    vocab = _table(config, str(directory / CONFIG_FILE)).get("vocab_size")
    if type(vocab) is not int or not 0 < vocab < 2**31:
        raise Refused(f"{directory / CONFIG_FILE}: vocab_size is not a number of tokens")
    path = directory / WEIGHTS_FILE
    with open_file(path) as file:
        vocabulary = hashlib.sha256(vocab.to_bytes(8, "little") + _d2t(file, path))
    return DraftIdentity(version_of(directory), vocabulary.hexdigest())


def _d2t(file: BinaryIO, path: Path) -> bytes:
    """The bytes of the tensor `d2t`."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
        raise Refused(f"{path}: truncated, or a header of {length} bytes (at most {_MAX_HEADER_BYTES} are read)")
    entry = _table(file.read(length), str(path)).get("d2t")
    offsets: Any = cast("dict[str, Any]", entry).get("data_offsets") if isinstance(entry, dict) else None
    match offsets:
        case [int(first), int(last)] if 0 <= first <= last <= size - 8 - length:
            file.seek(8 + length + first)
            return file.read(last - first)
        case _:
            raise Refused(f"{path}: tensor 'd2t' is missing or lies outside the file")


def _table(raw: bytes, where: str) -> dict[str, Any]:
    try:
        plain = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Refused(f"{where}: not JSON") from exc
    if not isinstance(plain, dict):
        raise Refused(f"{where}: not a JSON table")
    return cast("dict[str, Any]", plain)


@contextmanager
def open_file(path: Path) -> Generator[BinaryIO]:
    """A file of a checkpoint; its errors, also while it is read, become ours."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as exc:
        raise Refused(f"{path}: no such file") from exc
    except OSError as exc:
        raise Unavailable(f"{path}: cannot be read ({exc.strerror})") from exc


def read_small(path: Path, max_bytes: int) -> bytes:
    """A file that is read whole, under a cap. Raises `Refused`, `Unavailable`."""
    with open_file(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise Refused(f"{path}: larger than the {max_bytes} bytes that it may have")
    return raw
