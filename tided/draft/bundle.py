"""A draft's checkpoint as one sequence of bytes, for sending it to another host: neither torch nor numpy.

It is the length of config.json (8 bytes, little-endian), config.json, model.safetensors: what the draft's version is the SHA-256 of.
So whoever receives it knows whether it is what was asked for. Nothing else of it is checked here.
"""

import hashlib
from collections.abc import Generator
from pathlib import Path

from tided.draft.identity import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, open_file, read_small
from tided.model.errors import Refused, Unavailable

BLOCK_BYTES = 1 << 20
_LENGTH_BYTES = 8


def size_of(directory: Path) -> int:
    """How long the sequence is. Raises `Refused` for a directory that holds no draft."""
    return len(_head(directory)) + _weights_bytes(directory)


def read(directory: Path, offset: int, count: int) -> bytes:
    """At most `count` bytes of the sequence from `offset` on; fewer only at its end."""
    head = _head(directory)
    part = head[offset : offset + count]
    if len(part) < count:
        with open_file(directory / WEIGHTS_FILE) as file:
            file.seek(max(0, offset - len(head)))
            part += file.read(count - len(part))
    return part


def blocks(directory: Path) -> Generator[bytes]:
    """The whole sequence."""
    yield _head(directory)
    with open_file(directory / WEIGHTS_FILE) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


class Unpacker:
    """Writes a sequence that arrives in pieces as a checkpoint's two files. Raises `Refused`, `Unavailable`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._digest = hashlib.sha256()
        self._head = b""
        self._head_is_whole = False
        try:
            self._weights = (directory / WEIGHTS_FILE).open("xb")
        except OSError as exc:
            raise _disk(directory, exc) from exc

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the sequence."""
        self._digest.update(data)
        if not self._head_is_whole:
            data = self._take_head(data)
        try:
            self._weights.write(data)
        except OSError as exc:
            raise _disk(self._directory, exc) from exc

    def finish(self) -> str:
        """Complete the files; the digest of what was written, which is the version."""
        try:
            (self._directory / CONFIG_FILE).write_bytes(self._head[_LENGTH_BYTES:])
            self._weights.close()
        except OSError as exc:
            raise _disk(self._directory, exc) from exc
        return self._digest.hexdigest()

    def close(self) -> None:
        """Give the file back; whatever was written stays."""
        self._weights.close()

    def _take_head(self, data: bytes | memoryview) -> bytes:
        """Keep what belongs in front of the weights; the rest."""
        head = self._head + bytes(data)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        if len(head) >= _LENGTH_BYTES and length > MAX_CONFIG_BYTES:
            raise Refused(f"a draft whose config.json has {length} bytes: at most {MAX_CONFIG_BYTES} are read")
        self._head_is_whole = len(head) >= _LENGTH_BYTES + length
        end = _LENGTH_BYTES + length if self._head_is_whole else len(head)
        self._head = head[:end]
        return head[end:]


def _head(directory: Path) -> bytes:
    config = read_small(directory / CONFIG_FILE, MAX_CONFIG_BYTES)
    return len(config).to_bytes(_LENGTH_BYTES, "little") + config


def _weights_bytes(directory: Path) -> int:
    with open_file(directory / WEIGHTS_FILE) as file:
        return file.seek(0, 2)


def _disk(directory: Path, exc: OSError) -> Unavailable:
    return Unavailable(f"{directory}: a draft cannot be written ({exc.strerror}); free space or check the permissions")
