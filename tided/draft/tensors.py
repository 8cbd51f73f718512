"""safetensors files with numpy alone. BF16, which numpy lacks, is held as its bits in uint16.

The reader trusts nothing: the header is capped before it is parsed, and each tensor's offsets, dtype and shape must agree with
each other and with the file's size before a byte of data is used. Raises `Refused` for a malformed file, `Unavailable` for a
disk that cannot be read or written.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tided.draft.output import write_through
from tided.model.errors import Refused, Unavailable

Array = NDArray[Any]

MAX_HEADER_BYTES = 8 << 20  # a target of a thousand layers stays far below

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its bytes are `start`..`end`, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds. `digest_bytes` are the raw header bytes, for content digests."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    digest_bytes: bytes


def read_header(path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check a file's header; no tensor data is read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, max_header_bytes):
                raise Refused(
                    f"{path}: truncated, or no safetensors file (header of {length} bytes in a file of {size})"
                )
            return parse_header(file.read(length), size, str(path))
    except FileNotFoundError as exc:
        raise Refused(f"{path}: no such file") from exc
    except OSError as exc:
        raise Unavailable(f"{path}: cannot be read ({exc.strerror})") from exc


def parse_header(raw: bytes, file_bytes: int, where: str) -> Header:
    """Check the header bytes `raw` of a file of `file_bytes`. The tensors must cover the data exactly, without gap or overlap."""
    try:
        plain = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Refused(f"{where}: the safetensors header is not JSON") from exc
    if not isinstance(plain, dict):
        raise Refused(f"{where}: the safetensors header is not a table")
    metadata = plain.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(f"{where}: the metadata is not a table of strings")
    base = 8 + len(raw)
    entries = {str(name): _entry(item, base, f"{where}: tensor {str(name)[:80]!r}") for name, item in plain.items()}
    at = base
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.start != at:
            raise Refused(f"{where}: tensor {name[:80]!r} overlaps another, or leaves a gap")
        at = entry.end
    if at != file_bytes:
        raise Refused(f"{where}: truncated or too long (tensors end at byte {at}, the file at {file_bytes})")
    return Header(entries, {str(key): str(value) for key, value in metadata.items()}, raw)


def _entry(item: Any, base: int, where: str) -> Entry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{where}: malformed header entry")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(f"{where}: dtype {str(dtype)[:20]!r} is none of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
        raise Refused(f"{where}: malformed shape or offsets")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise Refused(f"{where}: {end - start} bytes do not hold {dtype} of shape {shape}")
    return Entry(dtype, tuple(shape), base + start, base + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def read_tensor_entry(path: Path, entry: Entry) -> Array:
    """The tensor as a read-only array mapped from the file (BF16 as uint16)."""
    if math.prod(entry.shape) == 0:
        return np.zeros(entry.shape, DTYPES[entry.dtype])
    try:
        return np.memmap(path, DTYPES[entry.dtype], "r", entry.start, entry.shape)
    except (OSError, ValueError) as exc:
        raise Unavailable(f"{path}: cannot be mapped") from exc


def view_tensor(buffer: bytes, entry: Entry) -> Array:
    """The tensor as a read-only view into the bytes of a whole file."""
    count = math.prod(entry.shape)
    return np.frombuffer(buffer, DTYPES[entry.dtype], count, entry.start).reshape(entry.shape)


@dataclass(frozen=True, slots=True)
class Stacked:
    """One tensor in parts, that follow each other along its first axis: written without being joined in memory. At least one part."""

    parts: Sequence[Array]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(part) for part in self.parts), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def write_file(path: Path, tensors: Mapping[str, Array | Stacked], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` (uint16 arrays become BF16) so that equal content gives equal bytes; fsynced, renamed into place."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        array = tensors[name]
        table[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_through(temporary, _contents(raw, [tensors[name] for name in order]))
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise Unavailable(f"{path}: cannot be written ({exc.strerror}); free space or check the permissions") from exc


def _contents(raw_header: bytes, tensors: Sequence[Array | Stacked]) -> Iterator[memoryview]:
    yield memoryview(len(raw_header).to_bytes(8, "little") + raw_header)
    for tensor in tensors:
        for part in tensor.parts if isinstance(tensor, Stacked) else (tensor,):
            # As bytes: the memoryview of an array without elements has no such cast.
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def to_float32(array: Array) -> NDArray[np.float32]:
    """Widen BF16 (uint16 bits), F16 or F32 to float32, exactly."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32)


def to_bf16(array: Array) -> NDArray[np.uint16]:
    """Round float32 to BF16 bits, nearest even. BF16 bits pass unchanged. Input must be finite."""
    if array.dtype == np.uint16:
        return np.asarray(array)
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def bf16_is_finite(bits: Array) -> bool:
    """Whether no BF16 value (uint16 bits) is NaN or infinite: an exponent of all ones."""
    return not bool(((bits & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())
