"""Draft versions on disk: immutable, addressed by content, `ROOT/VERSION/{config.json, model.safetensors, draft.json}`.

Synchronous: the daemon calls it from a thread. A version appears whole or not at all: it is copied and checked beside its place,
synced, then renamed into it. The only file that is ever added later is `quarantined`; it outlives any loss of Redis.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import structlog

from tided.draft import checkpoint
from tided.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.target import TargetShape
from tided.model.codec import from_plain, to_plain
from tided.model.drafts import Draft, DraftOrigin, Evaluation
from tided.model.engines import TargetInfo
from tided.model.errors import NotFound, Refused, Unavailable
from tided.model.ids import check_digest, check_name

SCHEMA = 1
MIN_PREFIX = 6
_RECORD = "draft.json"
_QUARANTINED = "quarantined"
_STAGING = ".staging-"
_LOCK = ".lock"
_MAX_RECORD_BYTES = 16 << 20
_COPY_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")

_log = structlog.get_logger()


class DraftStore:
    """All methods raise `Unavailable` when the disk fails or is full, `Refused` for what is wrong or unknown."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with _disk(root):
            root.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        staged_dir: Path,
        *,
        lineage: str,
        parent: str,
        origin: DraftOrigin,
        target: TargetInfo,
        job: str = "",
        evaluation: Evaluation | None = None,
        now_ms: int,
    ) -> Draft:
        """Copy a checkpoint into the store, checked whole against `target`. Content that is already there gives its existing record.

        Raises `Refused` for a bad checkpoint, one for another target, or an evaluation of another version.
        """
        check_name(lineage, "lineage")
        if parent:
            check_digest(parent, "parent")
        with self._locked(), _disk(self._root):
            staging = self._fresh_staging()
            try:
                size = sum(_copy(staged_dir / name, staging / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
                loaded = checkpoint.load(staging, TargetShape(target.hidden, target.vocab))
                if evaluation is not None and evaluation.version != loaded.version:
                    raise Refused(
                        f"{staged_dir}: the evaluation is of draft {evaluation.version[:12]}, not of {loaded.version[:12]}"
                    )
                if (self._root / loaded.version).exists():
                    return self._read(loaded.version)
                draft = Draft(
                    version=loaded.version,
                    lineage=lineage,
                    number=1 + max((known.number for known in self.list(lineage)), default=-1),
                    parent=parent,
                    origin=origin,
                    target=target.digest,
                    vocab_id=loaded.vocab_id,
                    draft_vocab=loaded.config.draft_vocab,
                    bytes=size,
                    created_ms=now_ms,
                    job=job,
                    evaluation=evaluation,
                )
                _write(staging / _RECORD, json.dumps({"v": SCHEMA, **to_plain(draft)}).encode())
                _sync_directory(staging)
                staging.rename(self._root / draft.version)
                _sync_directory(self._root)
                return draft
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def get(self, ref: str) -> Draft:
        """The draft of a version, of a unique prefix of one (6 digits or more), or of `lineage@NUMBER`.

        Raises `NotFound`, or `Refused` for a prefix of several.
        """
        lineage, at, number = ref.partition("@")
        if at:
            found = [draft for draft in self.list(check_name(lineage, "lineage")) if str(draft.number) == number]
        elif _DIGEST.fullmatch(ref):
            return self._read(ref)
        elif _PREFIX.fullmatch(ref):
            found = [self._read(version) for version in self._versions() if version.startswith(ref)]
        else:
            raise Refused(
                f"{ref[:80]!r} names no draft: give a version, at least {MIN_PREFIX} digits of one, or LINEAGE@NUMBER"
            )
        if not found:
            raise NotFound(f"no draft {ref[:80]}: see `tidectl drafts list`")
        if len(found) > 1:
            raise Refused(f"{len(found)} drafts begin with {ref}: give more digits")
        return found[0]

    def path(self, version: str) -> Path:
        """The version's directory, absolute. Does not read it: see `verify`. Raises `NotFound`."""
        directory = (self._root / check_digest(version, "version")).absolute()
        if directory.is_symlink() or not directory.is_dir():
            raise NotFound(f"no draft {version[:12]} in {self._root}")
        return directory

    def verify(self, version: str) -> None:
        """Read the version again, whole. Raises `Refused` if it is not what was added: the disk, or somebody, changed it."""
        actual = checkpoint.verify(self.path(version))
        if actual != version:
            raise Refused(
                f"{self.path(version)} was changed on disk: its content is version {actual[:12]}; restore or remove it"
            )

    def quarantine(self, version: str, reason: str) -> Draft:
        """Mark a version as never to be deployed again. The first reason stays."""
        directory = self.path(version)
        if not (directory / _QUARANTINED).exists():
            with self._locked(), _disk(directory):
                fresh = directory / f"{_QUARANTINED}.new"
                fresh.unlink(missing_ok=True)
                _write(fresh, (reason or "no reason given").encode())
                fresh.rename(directory / _QUARANTINED)
                _sync_directory(directory)
        return self._read(version)

    def list(self, lineage: str = "") -> list[Draft]:
        """All drafts, or those of a lineage, by lineage and number. An unreadable one is logged and left out."""
        found: list[Draft] = []
        for version in self._versions():
            try:
                found.append(self._read(version))
            except Refused as exc:
                _log.warning("draft-unreadable", version=version, why=str(exc))
        chosen = [draft for draft in found if not lineage or draft.lineage == lineage]
        return sorted(chosen, key=lambda draft: (draft.lineage, draft.number))

    def _versions(self) -> Iterator[str]:
        with _disk(self._root):
            entries = sorted(self._root.iterdir())
        return (
            entry.name
            for entry in entries
            if _DIGEST.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
        )

    def _read(self, version: str) -> Draft:
        directory = self.path(version)
        with _disk(directory):
            try:
                with _open(directory / _RECORD) as file:
                    plain = json.loads(file.read(_MAX_RECORD_BYTES))
            except (ValueError, RecursionError) as exc:
                raise Refused(f"{directory / _RECORD}: not JSON") from exc
            if not isinstance(plain, dict) or plain.pop("v", None) != SCHEMA:
                raise Refused(f"{directory / _RECORD}: unknown schema; this tided reads version {SCHEMA}")
            draft = from_plain(Draft, plain, _RECORD)
            if draft.version != version:
                raise Refused(f"{directory / _RECORD}: is about version {draft.version[:12]}")
            try:
                reason = (directory / _QUARANTINED).read_text(errors="replace")
            except FileNotFoundError:
                return draft
        return replace(draft, quarantined=reason or "no reason given")

    def _fresh_staging(self) -> Path:
        for left_behind in self._root.glob(f"{_STAGING}*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        staging = self._root / f"{_STAGING}{os.getpid()}"
        staging.mkdir()
        return staging

    @contextmanager
    def _locked(self) -> Generator[None]:
        """One writer at a time, over processes: numbers count up, and nobody's staging is swept away."""
        with _disk(self._root):
            lock = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


@contextmanager
def _disk(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as exc:
        raise Unavailable(
            f"{exc.filename or path}: the draft store failed ({exc.strerror}); free space or check the permissions"
        ) from exc


def _open(path: Path) -> BinaryIO:
    """A regular file, never through a symlink: it could lead out of the directory that was meant."""
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except FileNotFoundError as exc:
        raise Refused(f"{path}: no such file") from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise Refused(f"{path}: is a symbolic link; give the file itself") from exc
        raise


def _copy(source: Path, to: Path) -> int:
    """Copy and sync; the number of bytes."""
    with _open(source) as reader, to.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _COPY_BYTES)
        writer.flush()
        os.fsync(writer.fileno())
        return writer.tell()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
