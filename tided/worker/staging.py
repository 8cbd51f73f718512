"""A job whose samples and drafts are in the shared storage, made this host's: staged here before, uploaded after.

The targets are not in the storage: each worker has its own, found by the digest that the job names.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Self

import anyio.from_thread

from tided.draft.cache import Cache
from tided.draft.target import describe
from tided.model.errors import NotFound, Refused, TideError, Unavailable
from tided.model.jobs import JobKind, JobResult, JobSpec, StoredObject
from tided.store import objects
from tided.store.objects import Kind, ObjectStore, Stager
from tided.worker.settings import WorkerSettings

CACHE_DIR = "cache"
"""Below the worker's directory, beside those of its jobs."""
WAIT_S = 60.0
"""For the next object of a job: tided puts them into the storage when the job is already queued."""
_POLL_S = 0.2


class Staging:
    """Calls block: make them in a thread of anyio, which a cancelled attempt then leaves soon."""

    def __init__(self, store: ObjectStore, cache: Cache, targets: tuple[Path, ...]) -> None:
        self._objects, self._cache, self._targets = store, cache, targets
        self._stager = Stager(store, cache)
        self._digests: dict[Path, str] = {}

    @classmethod
    def of(cls, settings: WorkerSettings) -> Self | None:
        """None for a worker that shares a filesystem with tided. Raises `ConfigError`."""
        if not settings.storage_url:
            return None
        store = ObjectStore(settings.storage_url, dict(settings.storage_options))
        return cls(store, Cache(settings.work_dir / CACHE_DIR, settings.cache_bytes), settings.targets)

    def holding(self, spec: JobSpec) -> AbstractContextManager[None]:
        """While the block runs, nothing of the job leaves the cache."""
        return self._cache.holding([objects.entry_name(stored) for stored in spec.objects])

    def localise(self, spec: JobSpec) -> JobSpec:
        """Stage all of the job and give it with this host's paths. Raises `Refused` for what the job names and does not bring,
        `Unavailable` when it does not come, does not verify, or its target is not on this host."""
        local = {stored.path: str(self._staged(stored)) for stored in spec.objects}

        def here(path: str) -> str:
            if path and path not in local:
                raise Refused(
                    f"{path}: the job names it, and it is not in the shared storage: it was discarded meanwhile"
                )
            return local.get(path, "")

        def all_here(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(map(here, paths))

        return replace(
            spec,
            target_dir=str(self._target(spec)),
            draft_dir=here(spec.draft_dir),
            previous_dir=here(spec.previous_dir),
            shards=all_here(spec.shards),
            replay=all_here(spec.replay),
            held_out=all_here(spec.held_out),
            candidates=tuple(replace(candidate, path=here(candidate.path)) for candidate in spec.candidates),
            objects=(),
        )

    def upload(self, kind: JobKind, result: JobResult) -> JobResult:
        """Put what a job staged into the storage; the result that says where."""
        staged = Path(result.staged)
        stored = (
            objects.describe_draft(staged, result.version)
            if kind is JobKind.TRAIN
            else objects.describe_file(staged, Kind.REFERENCES)
        )
        self._objects.put(stored, staged, anyio.from_thread.check_cancelled)
        return replace(result, objects=(stored,))

    def drop_old_samples(self) -> None:
        """Remove from the cache the samples that are in the storage no more. Raises `Unavailable`."""
        cached = [name for name in self._cache.names() if name.startswith(objects.SAMPLE_ENTRIES)]
        if cached:
            there = {objects.sample_entry(key) for key in self._objects.sizes(Kind.SAMPLES)}
            for name in cached:
                if name not in there:
                    self._cache.drop(name)

    def _staged(self, stored: StoredObject) -> Path:
        until_s = time.monotonic() + WAIT_S
        for _ in _polls(until_s):
            try:
                return self._stager.stage(stored, anyio.from_thread.check_cancelled)
            except NotFound:
                continue  # tided is about to put it there
        raise Unavailable(
            f"{self._objects.shown}: {stored.key} did not come in {WAIT_S:g} s; does tided use this storage?"
        )

    def _target(self, spec: JobSpec) -> Path:
        for path in self._targets:
            try:
                if path not in self._digests:
                    self._digests[path] = describe(path).digest
            except TideError:
                continue  # perhaps another one is meant
            if self._digests[path] == spec.target:
                return path.absolute()
        raise Unavailable(
            f"target {spec.target[:12]} is not on this worker's host: name its directory as [target] path, or --target"
        )


def _polls(until_s: float) -> Iterator[None]:
    while time.monotonic() < until_s:
        anyio.from_thread.check_cancelled()
        yield
        time.sleep(_POLL_S)
