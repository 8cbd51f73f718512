"""The storage that tided and its workers share, on any host: an fsspec filesystem with content-addressed objects.

An object's key is KIND/SHA256 (or `drafts/VERSION`, which is the same), so that putting it twice is putting it once, and whoever
takes it knows whether it is whole. It appears under its key after all of it was written: in a bucket as its upload completes, in a
directory by a move from below `tmp/`, where what a dead process was writing stays for the leader to sweep.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tided.draft import bundle
from tided.draft.cache import Cache
from tided.model import failpoints
from tided.model.errors import ConfigError, NotFound, Refused, TideError, Unavailable
from tided.model.ids import check_digest, new_id
from tided.model.jobs import StoredObject

BLOCK_BYTES = 1 << 20
FILE_NAME = "file.safetensors"
TEMPORARY = "tmp"


class Kind(StrEnum):
    """What an object is, which says how long it lives (tided.services.exchange). A draft is two files in one sequence of bytes."""

    SAMPLES = "samples"
    DRAFTS = "drafts"
    REFERENCES = "references"


def describe_file(path: Path, kind: Kind, name: str = "") -> StoredObject:
    """The object that a file becomes; reads it whole. Raises `NotFound`, `Unavailable`."""
    digest, size = hashlib.sha256(), 0
    for block in _file_blocks(path):
        digest.update(block)
        size += len(block)
    return StoredObject(name or str(path), f"{kind}/{digest.hexdigest()}", digest.hexdigest(), size)


def describe_draft(path: Path, version: str, name: str = "") -> StoredObject:
    """The object that a draft's directory becomes."""
    return StoredObject(name or str(path), f"{Kind.DRAFTS}/{check_digest(version)}", version, bundle.size_of(path))


def kind_of(stored: StoredObject) -> Kind:
    """The kind that an object's key says. Raises `Refused` for a key that none of ours has."""
    kind, _, digest = stored.key.partition("/")
    if kind not in tuple(Kind) or digest != check_digest(stored.sha256) or stored.bytes < 1:
        raise Refused(f"{stored.key[:80]!r} is no key of the shared storage")
    return Kind(kind)


class ObjectStore:
    """Calls block on the network: make them in a thread, any number at a time. All raise `Unavailable` when the storage fails."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        """Raises `ConfigError` for a URL that this host's fsspec cannot open."""
        self.shown = _shown(url)
        try:
            self._fs, root = _opened(url, options or {})
        except (ImportError, ValueError, TypeError) as exc:
            raise ConfigError(f"storage.url {self.shown}: {exc}") from exc
        self._root: str = root.rstrip("/")

    def put(self, stored: StoredObject, source: Path, check: Callable[[], None] = lambda: None) -> bool:
        """Write the object from its file, or draft's directory; False when it is there already. `check` may raise to stop it."""
        if self._size(stored.key) == stored.bytes:
            return False
        blocks = bundle.blocks(source) if kind_of(stored) is Kind.DRAFTS else _file_blocks(source)
        with self._appearing(stored.key) as file:
            for block in blocks:
                check()
                file.write(block)
                failpoints.hit("objects.writing")
            failpoints.hit("objects.written")
        return True

    def blocks(self, stored: StoredObject) -> Generator[bytes]:
        """The object's bytes, as they are there. Raises `NotFound`."""
        with self._translated(f"read {stored.key}"):
            try:
                with self._fs.open(self._path(stored.key), "rb") as file:
                    while block := file.read(BLOCK_BYTES):
                        yield block
            except FileNotFoundError as exc:
                raise NotFound(f"{self.shown}: there is no {stored.key}") from exc

    def sizes(self, kind: str = "") -> dict[str, int]:
        """Key -> bytes of all objects, or those of one kind, or below `TEMPORARY`."""
        root = self._path(kind) if kind else self._root
        with self._translated("list what is there"):
            found = self._fs.find(root, detail=True)
        prefix = len(self._root) + 1
        files = {path[prefix:]: entry for path, entry in found.items() if entry["type"] == "file"}
        return {key: int(entry["size"] or 0) for key, entry in files.items() if key and not key.endswith("/")}

    def delete(self, key: str) -> None:
        """Remove an object; one that is gone already is no error."""
        with self._translated(f"remove {key}"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def prove(self) -> None:
        """Write, list, read and remove a few bytes. Raises `Unavailable`, which says what of it this host may not do."""
        key, content = f"{TEMPORARY}/{new_id('proof')}", b"tided"
        with self._appearing(key) as file:
            file.write(content)
        there = self.sizes(TEMPORARY).get(key)
        with self._translated(f"read {key}"):
            read = self._fs.cat_file(self._path(key))
        self.delete(key)
        if (there, read) != (len(content), content):
            raise Unavailable(f"{self.shown}: what was written is not what is there")

    @contextmanager
    def _appearing(self, key: str) -> Generator[IO[bytes]]:
        """A file that is there under `key`, whole, when the block ends, and not at all when it raises.

        To write beside and to move is wrong for a bucket: the move is a copy, by requests that not all servers know, and of which
        s3fs leaves the parts when it fails. fsspec's own transactions are wrong for a directory: they write to /tmp, and copy.
        """
        with self._translated(f"write {key}"):
            if isinstance(self._fs, LocalFileSystem):
                yield from self._moved(key)
            else:
                yield from self._committed(key)

    def _moved(self, key: str) -> Generator[IO[bytes]]:
        temporary = self._path(f"{TEMPORARY}/{new_id('put')}")
        try:
            for path in (temporary, self._path(key)):
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._fs.open(temporary, "wb") as file:
                yield file
            self._fs.mv(temporary, self._path(key))
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def _committed(self, key: str) -> Generator[IO[bytes]]:
        file = self._fs.open(self._path(key), "wb", autocommit=False)
        try:
            yield file
            file.close()
            file.commit()
        except BaseException:
            with suppress(Exception):
                file.discard()
            with suppress(AttributeError):
                file.closed = True  # or it would go on writing what it holds when it is collected
            raise

    def _size(self, key: str) -> int:
        with self._translated(f"look for {key}"):
            try:
                return int(self._fs.info(self._path(key))["size"])
            except FileNotFoundError:
                return -1

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _translated(self, doing: str) -> Generator[None]:
        self._fs.invalidate_cache()  # of listings: other hosts write, too
        try:
            yield
        except (TideError, GeneratorExit):
            raise
        except Exception as exc:  # a filesystem is a plugin, and raises what it likes
            raise Unavailable(f"{self.shown}: cannot {doing} ({_why(exc)})") from exc


def _opened(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The filesystem (of partial types) and the path in it."""
    if not url.startswith(("s3://", "s3a://")):
        return fsspec.url_to_fs(url, **options)
    try:
        from tided.store import s3
    except ImportError as exc:
        raise ImportError("it needs s3fs: pip install 'tided[s3]'") from exc
    return s3.open_filesystem(url, options)


def _why(exc: Exception) -> str:
    """In few words, and none that could hold a URL."""
    if isinstance(exc, PermissionError | FileNotFoundError):
        return exc.strerror or str(exc) or type(exc).__name__
    return (exc.strerror if isinstance(exc, OSError) else None) or type(exc).__name__


class Stager:
    """Brings objects from the storage to this host's cache. What does not verify does not get there."""

    def __init__(self, objects: ObjectStore, cache: Cache) -> None:
        self.objects, self.cache = objects, cache

    def stage(self, stored: StoredObject, check: Callable[[], None] = lambda: None) -> Path:
        """The file, or draft's directory, of an object, whose content was read here and has the object's digest.

        What is not whole is removed from the storage, for whoever has the source to put it there again, and is `Unavailable`. Raises
        `NotFound` for an object that is not there (yet), `Refused` for one that does not fit into the cache.
        """
        kind, name = kind_of(stored), entry_name(stored)
        found = self.cache.find(name)
        if found is not None:
            if _digest_of(found, kind) == stored.sha256:
                return _inside(found, kind)
            self.cache.drop(name)  # this host's disk has changed it
        with self.cache.filling(name, stored.bytes) as directory:
            sink = bundle.Unpacker(directory) if kind is Kind.DRAFTS else _File(directory / FILE_NAME)
            received = 0
            try:
                for block in self.objects.blocks(stored):
                    check()
                    received += len(block)
                    if received > stored.bytes:
                        break
                    sink.write(block)
                actual = sink.finish() if received == stored.bytes else ""
            except Refused as exc:
                if isinstance(exc, NotFound):
                    raise
                actual = ""
            finally:
                sink.close()
            if actual != stored.sha256:
                self.objects.delete(stored.key)
                raise Unavailable(
                    f"{self.objects.shown}: {stored.key} is not what it should be: {received} bytes of {stored.bytes},"
                    f" SHA-256 {actual[:12] or 'not computed'}; it was removed, and is put there again"
                )
        found = self.cache.find(name)
        if found is None:
            raise Unavailable(f"{stored.key} was staged and is not in the cache: its disk fails")
        return _inside(found, kind)


def entry_name(stored: StoredObject) -> str:
    """What the object is called in a cache. Names have at most 64 characters: the kind's first letter, and 62 digits of 64."""
    return f"{kind_of(stored)[0]}-{stored.sha256[:62]}"


def sample_entry(key: str) -> str:
    """What the object under a key of `Kind.SAMPLES` is called in a cache."""
    return f"{Kind.SAMPLES[0]}-{key.partition('/')[2][:62]}"


SAMPLE_ENTRIES = f"{Kind.SAMPLES[0]}-"


class _File:
    def __init__(self, path: Path) -> None:
        self._path, self._digest = path, hashlib.sha256()
        try:
            self._file = path.open("xb")
        except OSError as exc:
            raise Unavailable(f"{path}: cannot be written ({exc.strerror})") from exc

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as exc:
            raise Unavailable(f"{self._path}: cannot be written ({exc.strerror}); free space") from exc

    def finish(self) -> str:
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _inside(entry: Path, kind: Kind) -> Path:
    return entry if kind is Kind.DRAFTS else entry / FILE_NAME


def _digest_of(entry: Path, kind: Kind) -> str:
    """Of what a cache holds; "" if it cannot be read."""
    digest = hashlib.sha256()
    try:
        blocks: Iterable[bytes] = bundle.blocks(entry) if kind is Kind.DRAFTS else _file_blocks(entry / FILE_NAME)
        for block in blocks:
            digest.update(block)
    except TideError:
        return ""
    return digest.hexdigest()


def _file_blocks(path: Path) -> Generator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except FileNotFoundError as exc:
        raise NotFound(f"{path}: no such file") from exc
    except OSError as exc:
        raise Unavailable(f"{path}: cannot be read ({exc.strerror})") from exc


def _shown(url: str) -> str:
    """`url` as it may be printed: without user, password and query."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    except ValueError:
        return "(malformed)"
