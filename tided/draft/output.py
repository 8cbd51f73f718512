"""Large files on disk for good, past the page cache where the filesystem allows it: one copy, into an aligned buffer.

Through the page cache every byte is copied by the processor once more, and `fsync` waits for all of them at the end: on the machine of
docs/benchmarks.md a GB took 0.3 to 0.5 CPU seconds and 2 to 3 s like that, and 0.05 and 1.3 s without (`O_DIRECT`).
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

BUFFER_BYTES = 4 << 20
_BLOCK_BYTES = 4096


def write_through(path: Path, parts: Iterable[memoryview]) -> None:
    """Write `parts`, one after the other, as a new file and fsync it. Raises `OSError`."""
    descriptor = _open(path)
    try:
        with contextlib.closing(mmap.mmap(-1, BUFFER_BYTES)) as buffer:
            at = size = 0
            for part in parts:
                view = part.cast("B")
                size += len(view)
                while view:
                    taken = min(len(view), BUFFER_BYTES - at)
                    buffer[at : at + taken] = view[:taken]
                    at, view = at + taken, view[taken:]
                    if at == BUFFER_BYTES:
                        _write(descriptor, buffer, at)
                        at = 0
            _write(descriptor, buffer, -(-at // _BLOCK_BYTES) * _BLOCK_BYTES)
        os.ftruncate(descriptor, size)  # the last block was written whole
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write(descriptor: int, buffer: mmap.mmap, size: int) -> None:
    """The first `size` bytes. A filesystem that took O_DIRECT at open and refuses it now is written to without."""
    with memoryview(buffer) as view:
        at = 0
        while at < size:
            try:
                at += os.write(descriptor, view[at:size])
            except OSError as exc:
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                if exc.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
