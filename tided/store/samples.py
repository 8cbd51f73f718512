"""Samples at rest: safetensors shards, written once, listed, consumed, pruned. docs/architecture.md gives their format.

A commit of the collector becomes durable as one directory by one rename, whatever number of shards it has, and carries a
receipt: what must be acknowledged in Redis. Only when that is done are its shards moved to where readers look, so no shard that
could still be delivered again is ever trained on. After a crash `unpublished()` gives the commits to finish.

Rows leave for exactly one counted reason. A discard is written to a journal before the file goes, so a crash between the two
neither loses the count nor counts twice. Collector and daemon may discard at the same time: a file lock orders them.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from tided.draft.tensors import Stacked, read_header, read_tensor_entry, write_file
from tided.model import failpoints
from tided.model.codec import from_plain, to_plain
from tided.model.errors import Conflict, Refused, Unavailable
from tided.model.ids import is_held_out, new_id

log = structlog.get_logger(__name__)

SCHEMA = "1"
HELD_OUT_SHARE = 0.25
"""Of the byte budget, what held-out shards may fill: they are kept where training shards are consumed."""


class Split(StrEnum):
    TRAIN = "train"
    HELD_OUT = "held-out"
    ASIDE = "aside"  # for the self-test of an engine: never trained on, never judged by


class Reason(StrEnum):
    """Why rows left the disk."""

    TRAINED = "trained"
    EXPIRED = "expired"
    PURGED = "purged"
    OVER_BUDGET = "over_budget"
    TESTED = "tested"  # were for the self-test


@dataclass(frozen=True, slots=True)
class Run:
    """A gap-free sequence of positions of one request. `ids` starts at the first row's token and goes up to 2 beyond the last
    row's; `states` are its rows in order, BF16 bits, each array [n, states, hidden]."""

    request: str
    group: bytes
    prompt_tokens: int
    first_position: int
    ids: NDArray[np.int32]
    states: tuple[NDArray[np.uint16], ...]

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.states)


@dataclass(frozen=True, slots=True)
class Source:
    """What all runs of a shard have in common."""

    engine: str
    target: str
    states: int
    hidden: int
    has_last: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard on disk, from its header alone."""

    path: Path
    split: Split
    engine: str
    target: str
    has_last: bool
    created_ms: int
    since_ms: int  # all its requests ended later; 0: not known
    rows: int
    runs: int
    scored: int  # rows that an evaluation counts: the others are prompts
    bytes: int


@dataclass(frozen=True, slots=True)
class Discarded:
    rows: int = 0
    shards: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoreLedger:
    """Rows on disk and rows gone: stored = trained + expired + purged + over_budget + tested + held_out + waiting, always.

    `tested`: set aside for the self-test, whether they are still on disk or not.
    """

    stored: int
    trained: int
    expired: int
    purged: int
    over_budget: int
    held_out: int
    waiting: int
    tested: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """A durable commit whose shards readers do not see yet."""

    path: Path
    receipt: Any


@dataclass(slots=True)
class _Journal:
    """`gone`: shards that are counted in `rows` and are to be unlinked, if that has not happened yet."""

    rows: dict[str, int]
    gone: tuple[str, ...]


class SampleStore:
    """The shards below `root`. Calls block on the disk: make them in a thread. A full disk raises `Unavailable`."""

    def __init__(self, root: Path, held_out_fraction: float, max_bytes: int, max_age_s: float) -> None:
        self.root = root.absolute()
        self._held_out_fraction = held_out_fraction
        self._max_bytes, self._max_age_ms = max_bytes, int(max_age_s * 1000)
        self._staging = self.root / "staging"
        self._known: dict[Path, Shard] = {}
        try:
            for directory in (self._staging, *(self.root / split for split in Split)):
                _make_private(directory)
        except OSError as exc:
            raise _disk(self.root, exc) from exc

    # --- writing: the collector ---

    def lock_writer(self) -> int:
        """Become the only collector on this root, until the returned descriptor is closed or the process ends.

        Raises `Conflict` when another process is. Leaves of a commit that never became durable are removed.
        """
        descriptor = os.open(self.root / "writer.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(descriptor)
            raise Conflict(
                f"{self.root}: another tided-collector writes here; stop it, or give this one another root"
            ) from exc
        for leftover in self._staging.glob("tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return descriptor

    def split_of(self, group: bytes) -> Split:
        """On which side of the split a prompt is, for ever."""
        return Split.HELD_OUT if is_held_out(group, self._held_out_fraction) else Split.TRAIN

    def commit(
        self,
        batch: Mapping[Source, Sequence[Run]],
        receipt: Any,
        aside: Mapping[Source, Sequence[Run]] | None = None,
        age_s: float = 0.0,
    ) -> Commit:
        """Make `batch` durable together with `receipt` (plain data), all or nothing. `publish` makes it visible.

        Runs in `aside` go to `Split.ASIDE`, whatever their prompt. `age_s`: how long ago the first request ended.
        """
        name = new_id("commit")
        temporary, final = self._staging / f"tmp-{name}", self._staging / name
        try:
            temporary.mkdir(mode=0o700)
            for source, runs in batch.items():
                for split in (Split.TRAIN, Split.HELD_OUT):
                    chosen = [run for run in runs if self.split_of(run.group) is split]
                    if chosen:
                        _write_shard(temporary / f"{split}.{new_id('s')}.safetensors", source, chosen, age_s)
            for source, runs in (aside or {}).items():
                _write_shard(temporary / f"{Split.ASIDE}.{new_id('s')}.safetensors", source, runs, age_s)
            for path in temporary.iterdir():
                path.chmod(0o600)
            _write_durably(temporary / "receipt.json", json.dumps(receipt).encode())
            _sync_directory(temporary)
            failpoints.hit("samples.staged")
            temporary.rename(final)
            _sync_directory(self._staging)
        except OSError as exc:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _disk(self.root, exc) from exc
        except Unavailable:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Commit(final, receipt)

    def publish(self, commit: Commit) -> None:
        """Show a commit's shards to readers, once its receipt was acknowledged. May be repeated after a crash."""
        try:
            for path in sorted(commit.path.glob("*.safetensors")):
                split, name = path.name.split(".", 1)
                path.rename(self.root / Split(split) / name)
                failpoints.hit("samples.publishing")
            for split in Split:
                _sync_directory(self.root / split)
            shutil.rmtree(commit.path)
        except OSError as exc:
            raise _disk(self.root, exc) from exc

    def unpublished(self) -> list[Commit]:
        """Durable commits that a crash kept from being published, oldest first."""
        try:
            return [
                Commit(path, json.loads((path / "receipt.json").read_bytes()))
                for path in sorted(self._staging.glob("commit-*"))
            ]
        except (OSError, ValueError) as exc:
            raise Unavailable(f"{self._staging}: a commit's receipt cannot be read ({type(exc).__name__})") from exc

    # --- reading ---

    def shards(self, split: Split, target: str | None = None, engine: str | None = None) -> tuple[Shard, ...]:
        """The shards of one side, oldest first, optionally only those of one target or engine."""
        with self._journal() as journal:
            gone = set(journal.gone)
        found = (
            self._read(path, split)
            for path in sorted((self.root / split).glob("*.safetensors"))
            if path.name not in gone
        )
        return tuple(
            shard
            for shard in found
            if shard is not None
            and (target is None or shard.target == target)
            and (engine is None or shard.engine == engine)
        )

    def rows(self, split: Split, target: str | None = None, engine: str | None = None) -> int:
        return sum(shard.rows for shard in self.shards(split, target, engine))

    def held_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.bytes for split in Split for shard in self.shards(split))

    def ledger(self) -> StoreLedger:
        """Where all rows that were ever stored are."""
        with self._journal() as journal:
            counts = {reason.value: journal.rows.get(reason, 0) for reason in Reason}
        counts[Reason.TESTED] += self.rows(Split.ASIDE)
        held_out, waiting = self.rows(Split.HELD_OUT), self.rows(Split.TRAIN)
        return StoreLedger(sum(counts.values()) + held_out + waiting, **counts, held_out=held_out, waiting=waiting)

    # --- discarding ---

    def consume(self, paths: Iterable[str | Path]) -> Discarded:
        """Delete shards that were trained on. Those that are gone already are passed over."""
        wanted = {Path(path).name for path in paths}
        return self._discard(Reason.TRAINED, (shard for shard in self.shards(Split.TRAIN) if shard.path.name in wanted))

    def drop_aside(self, engine: str) -> Discarded:
        """Delete what was set aside for the engine's self-test."""
        return self._discard(Reason.TESTED, self.shards(Split.ASIDE, engine=engine))

    def reject(self, engine: str, since_ms: int) -> Discarded:
        """Delete all of an engine since a time (this host's clock): its self-test has found that it is wrong."""
        shards = (shard for split in Split for shard in self.shards(split, engine=engine))
        return self._discard(Reason.TESTED, (shard for shard in shards if shard.created_ms >= since_ms))

    def purge(self, engine: str | None = None) -> Discarded:
        """Delete everything that was captured, of one engine or of all, held-out shards included."""
        return self._discard(Reason.PURGED, (shard for split in Split for shard in self.shards(split, engine=engine)))

    def prune(self) -> dict[Reason, Discarded]:
        """Delete what is too old, then the oldest of what is over the byte budget, which each target has for itself."""
        oldest = time.time_ns() // 1_000_000 - self._max_age_ms
        expired = [shard for split in Split for shard in self.shards(split) if shard.created_ms < oldest]
        result = {Reason.EXPIRED: self._discard(Reason.EXPIRED, expired)}
        excess: list[Shard] = []
        for split, share in ((Split.TRAIN, 1 - HELD_OUT_SHARE), (Split.HELD_OUT, HELD_OUT_SHARE)):
            room: dict[str, int] = {}
            for shard in reversed(self.shards(split)):
                room[shard.target] = room.get(shard.target, int(self._max_bytes * share)) - shard.bytes
                if room[shard.target] < 0:
                    excess.append(shard)
        return {**result, Reason.OVER_BUDGET: self._discard(Reason.OVER_BUDGET, excess)}

    def _discard(self, reason: Reason, shards: Iterable[Shard]) -> Discarded:
        chosen = tuple(shards)
        if not chosen:
            return Discarded()
        with self._journal() as journal:
            # Another process may have discarded some since they were listed.
            chosen = tuple(shard for shard in chosen if shard.path.name not in journal.gone and shard.path.exists())
            rows = sum(shard.rows for shard in chosen)
            counted = {**journal.rows, reason.value: journal.rows.get(reason, 0) + rows}
            # The earlier ones were unlinked when the journal was opened: only these are on their way out now.
            self._write_journal(_Journal(counted, tuple(shard.path.name for shard in chosen)))
            failpoints.hit("samples.discarding")
            for shard in chosen:
                shard.path.unlink(missing_ok=True)
                self._known.pop(shard.path, None)
        return Discarded(rows, len(chosen), sum(shard.bytes for shard in chosen))

    @contextmanager
    def _journal(self) -> Generator[_Journal]:
        """The journal, under the lock that orders processes; what a crash left to be unlinked is unlinked first."""
        try:
            with open(self.root / "journal.lock", "ab", opener=_private) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                journal = self._read_journal()
                for name in journal.gone:
                    for split in Split:
                        (self.root / split / name).unlink(missing_ok=True)
                yield journal
        except OSError as exc:
            raise _disk(self.root, exc) from exc

    def _read_journal(self) -> _Journal:
        path = self.root / "journal.json"
        try:
            return from_plain(_Journal, json.loads(path.read_bytes()), "journal")
        except FileNotFoundError:
            return _Journal({}, ())
        except ValueError as exc:
            raise Refused(f"{path}: not a journal of samples; move it away to start counting anew") from exc

    def _write_journal(self, journal: _Journal) -> None:
        _write_durably(self.root / "journal.json", json.dumps(to_plain(journal)).encode())
        _sync_directory(self.root)

    def _read(self, path: Path, split: Split) -> Shard | None:
        """What the header says; None when the shard was discarded meanwhile. Shards never change, so it is read once."""
        shard = self._known.get(path)
        if shard is None:
            try:
                shard = self._known[path] = _describe(path, split)
            except FileNotFoundError:
                return None
            except Refused as exc:
                if path.exists():
                    # One unreadable file must not stop training on all others; it is kept for a person to look at.
                    path.rename(path.with_suffix(".bad"))
                    log.warning("shard set aside", path=str(path.with_suffix(".bad")), error=str(exc))
                return None
        return shard if path.exists() else None


def read_runs(path: Path) -> list[Run]:
    """The runs of a shard, mapped. Raises `Refused` for a file that is none, also when it was deleted meanwhile."""
    header = read_header(path)
    table: dict[str, NDArray[Any]] = {
        name: np.asarray(read_tensor_entry(path, header.entries[name]))
        for name in ("states", "ids", "run_rows", "run_ids", "first_position", "prompt_tokens", "groups")
    }
    requests = json.loads(header.metadata["requests"])
    rows, ids = (np.concatenate(([0], np.cumsum(table[name]))) for name in ("run_rows", "run_ids"))
    return [
        Run(
            request=request,
            group=table["groups"][i].tobytes(),
            prompt_tokens=int(table["prompt_tokens"][i]),
            first_position=int(table["first_position"][i]),
            ids=table["ids"][ids[i] : ids[i + 1]],
            states=(table["states"][rows[i] : rows[i + 1]],),
        )
        for i, request in enumerate(requests)
    ]


def _describe(path: Path, split: Split) -> Shard:
    size = path.stat().st_size
    try:
        header = read_header(path)
        meta = header.metadata
        return Shard(
            path=path,
            split=split,
            engine=meta["engine"],
            target=meta["target"],
            has_last=meta["has_last"] == "1",
            created_ms=int(meta["created_ms"]),
            since_ms=int(meta.get("since_ms", "0")),
            rows=header.entries["states"].shape[0],
            runs=header.entries["run_rows"].shape[0],
            scored=int(meta["scored"]),
            bytes=size,
        )
    except (KeyError, ValueError) as exc:
        raise Refused(f"{path}: not a shard of schema {SCHEMA}; move it away") from exc


def _write_shard(path: Path, source: Source, runs: Sequence[Run], age_s: float) -> None:
    """Write one shard, fsynced. Byte order of ids and states is little-endian, as safetensors has it."""
    now_ms = time.time_ns() // 1_000_000
    tensors: dict[str, NDArray[Any] | Stacked] = {
        "states": Stacked([part for run in runs for part in run.states]),
        "ids": np.concatenate([run.ids for run in runs]).astype("<i4", copy=False),
        "run_rows": np.array([run.rows for run in runs], dtype="<i4"),
        "run_ids": np.array([len(run.ids) for run in runs], dtype="<i4"),
        "first_position": np.array([run.first_position for run in runs], dtype="<i4"),
        "prompt_tokens": np.array([run.prompt_tokens for run in runs], dtype="<i4"),
        "groups": np.frombuffer(b"".join(run.group for run in runs), dtype=np.uint8).reshape(-1, 16),
    }
    metadata = {
        "schema": SCHEMA,
        "engine": source.engine,
        "target": source.target,
        "has_last": "1" if source.has_last else "0",
        "created_ms": str(now_ms),
        "since_ms": str(now_ms - round(age_s * 1000)),
        "requests": json.dumps([run.request for run in runs]),
        "scored": str(sum(_scored(run) for run in runs)),
    }
    write_file(path, tensors, metadata)


def _scored(run: Run) -> int:
    """Rows that an evaluation counts: row i predicts token i + 2, which must be known and generated after the first one."""
    first = max(run.first_position, run.prompt_tokens - 1)
    last = run.first_position + min(run.rows, len(run.ids) - 2)
    return max(0, last - first)


def _make_private(directory: Path) -> None:
    """Make `directory`, and what is missing above it, for this user alone: samples are as private as prompts."""
    for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk(root: Path, exc: OSError) -> Unavailable:
    return Unavailable(
        f"{root}: samples cannot be written ({exc.strerror or type(exc).__name__}); free space or check the permissions"
    )
