"""What was brought to this host, on its disk: entries ROOT/NAME, each a directory, of a bounded size together.

An entry appears whole, by one rename, and never changes. Those used longest ago make room for new ones, except what is held. An
entry's name tells its content's digest; whoever fills one checks that before it appears. One process fills a root at a time.
"""

import os
import shutil
import threading
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from tided.model.errors import Refused, Unavailable
from tided.model.ids import check_name

_TEMPORARY = ".new-"


class Cache:
    """Calls block on the disk, and may come from several threads. A full disk raises `Unavailable`."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root.absolute()
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._coming: dict[str, int] = {}
        self._lock = threading.Lock()
        for leftover in self._root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def find(self, name: str) -> Path | None:
        """The entry's directory, now the one used last; None if there is none."""
        path = self._root / check_name(name, "cache entry")
        if path.is_symlink() or not path.is_dir():
            return None
        with suppress(OSError):  # somebody may have dropped it: who uses it will see
            os.utime(path)
        return path

    @contextmanager
    def filling(self, name: str, size: int) -> Generator[Path]:
        """A fresh directory to put `size` bytes into; it becomes the entry when the block ends well, and is removed otherwise.

        Raises `Refused` when the cache can never take so much, `Unavailable` when it cannot beside what is in use.
        """
        final = self._root / check_name(name, "cache entry")
        temporary = self._root / f"{_TEMPORARY}{name}-{os.getpid()}-{threading.get_ident()}"
        with self._lock:
            self._make_room(size)
            self._coming[name] = size
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700, parents=True)
            yield temporary
            if not final.exists():  # the same content may have come by another way meanwhile
                temporary.rename(final)
        except OSError as exc:
            raise Unavailable(
                f"{self._root}: cannot be written ({exc.strerror}); free space or check the permissions"
            ) from exc
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with self._lock:
                self._coming.pop(name, None)

    @contextmanager
    def holding(self, names: Iterable[str]) -> Generator[None]:
        """While the block runs, entries of these names are not dropped, also when they appear meanwhile."""
        held = list(names)
        with self._lock:
            self._held.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(held)

    def drop(self, name: str) -> None:
        """Remove an entry, unless it is held."""
        with self._lock:
            if not self._held[name]:
                self._remove(self._root / check_name(name, "cache entry"))

    def names(self) -> list[str]:
        """All entries, the one used longest ago first."""
        return [path.name for path in self._entries()]

    def _make_room(self, size: int) -> None:
        room = self._max_bytes - sum(self._coming.values()) - size
        entries = self._entries()
        sizes = {path: _size_of(path) for path in entries}
        fixed = sum(sizes[path] for path in entries if self._held[path.name])
        if size > self._max_bytes:
            raise Refused(f"{self._root}: {size} bytes do not fit into the cache of {self._max_bytes}: make it larger")
        if room < fixed:
            raise Unavailable(
                f"{self._root}: {size} bytes do not fit into the cache of {self._max_bytes} beside what is in use"
            )
        used = sum(sizes.values())
        for path in entries:
            if used <= room:
                return
            if not self._held[path.name]:
                self._remove(path)
                used -= sizes[path]

    def _entries(self) -> list[Path]:
        found: list[tuple[int, Path]] = []
        with suppress(FileNotFoundError):
            for path in self._root.iterdir():
                if not path.name.startswith("."):
                    with suppress(FileNotFoundError):
                        found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def _remove(self, path: Path) -> None:
        """First out of sight, so that nobody finds half an entry."""
        gone = self._root / f"{_TEMPORARY}gone-{path.name}"
        with suppress(OSError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _size_of(path: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0
