"""What jobs need goes out to the shared storage, and what they gave comes in: between tided and workers on other hosts.

Level-triggered: each look holds what is in the storage against the jobs that are not over. What one of them names and is not there
is put there; what none names is removed. So an upload that a crash cut short is made up for, a worker that died leaves nothing, and
samples are in the storage while a job is about them and no longer than they are in tided's own store: what was trained on, purged or is
too old is gone there too. Workers drop from their caches what is gone from the storage.

Without a `storage.url` tided, its workers and its engines share a filesystem, and all of this does nothing.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import structlog

from tided.config import Config, StorageConfig
from tided.draft.cache import Cache
from tided.model.errors import NotFound, Refused, TideError, Unavailable
from tided.model.jobs import Job, JobKind, JobResult, JobSpec, JobState, StoredObject
from tided.services.leadership import Leadership
from tided.store import objects
from tided.store.drafts import DraftStore
from tided.store.jobs import JobStore
from tided.store.objects import Kind, ObjectStore, Stager
from tided.store.references import ReferenceStore

LOOK_S = 1.0
IDLE_S = 15.0
SAMPLES_KEPT_S = 60.0
"""After the last job that names them, for the next one; sooner when they are gone from tided's own store."""
OTHERS_KEPT_S = 3600.0
"""Drafts are named again and again, and an attempt's result is there before the job says so."""
_MOST_JOBS = 10_000
_RESULTS = 200
_FAILURES = 64
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING)

_log = structlog.get_logger()


def open_storage(storage: StorageConfig) -> ObjectStore | None:
    """None when there is none. Raises `ConfigError` for one that cannot be opened on this host."""
    return ObjectStore(storage.url.get_secret_value(), storage.options) if storage.is_shared else None


class Exchange:
    """`lend` and `taken` are called by whoever submits a job and takes its result; `run` does the work behind them."""

    def __init__(self, config: Config, jobs: JobStore, drafts: DraftStore, leadership: Leadership) -> None:
        """Raises `ConfigError` for a storage that cannot be opened."""
        opened = open_storage(config.storage)
        self._stager = Stager(opened, Cache(config.cache_dir, config.storage.cache_bytes)) if opened else None
        self._jobs, self._drafts, self._leadership = jobs, drafts, leadership
        self._references = ReferenceStore(config.references_dir)
        self._described: dict[str, StoredObject] = {}
        self._sources: dict[str, Path] = {}
        self._coming: dict[str, StoredObject] = {}
        self._failed: OrderedDict[str, Refused] = OrderedDict()
        self._unwanted: dict[str, float] = {}
        self._changed = anyio.Event()
        self.problem = ""
        """Why nothing can be handed over now, or ""."""

    async def lend(self, spec: JobSpec) -> JobSpec:
        """The job as a worker on any host can do it: with the objects that its paths name. `run` puts them into the storage."""
        if self._stager is None:
            return spec
        found = await anyio.to_thread.run_sync(self._describe, spec)
        self._changed.set()
        return replace(spec, objects=tuple(found))

    def taken(self, result: JobResult) -> Path | None:
        """Where, on this host, what a job staged is; None while it is on its way. Raises `Refused` when it will never be here."""
        if not result.objects:
            path = Path(result.staged)
            if not result.staged or not path.is_absolute():
                raise Refused(f"staged {result.staged!r}: expected an absolute path on the shared filesystem")
            return path
        if self._stager is None:
            raise Refused("the worker put its result into a storage, and this tided has none: set storage.url on both")
        stored = result.objects[0]
        if stored.key in self._failed:
            raise self._failed[stored.key]
        found = self._stager.cache.find(objects.entry_name(stored))
        if found is not None:
            return found if objects.kind_of(stored) is Kind.DRAFTS else found / objects.FILE_NAME
        self._coming[stored.key] = stored
        self._changed.set()
        return None

    async def contents(self) -> tuple[str, str]:
        """What is in the storage, in words, and why that, a write there, or the last look at it failed, or ""."""
        if self._stager is None:
            return "", ""
        store = self._stager.objects
        try:
            await anyio.to_thread.run_sync(store.prove)
            sizes = await anyio.to_thread.run_sync(store.sizes)
        except Unavailable as exc:
            return "", str(exc)
        return f"{len(sizes)} objects, {sum(sizes.values()) / 2**20:.0f} MiB in {store.shown}", self.problem

    def look(self) -> None:
        """Look now: something has changed, such as that samples were purged."""
        self._changed.set()

    async def run(self) -> None:
        """For ever, while this tided leads."""
        while True:
            busy = False
            if self._stager is not None and self._leadership.leads:
                try:
                    busy = await self.step()
                    self._tell("")
                except TideError as exc:
                    self._tell(str(exc))
            with anyio.move_on_after(LOOK_S if busy or self.problem else IDLE_S):
                await self._changed.wait()
            self._changed = anyio.Event()

    async def step(self) -> bool:
        """One look; whether there is anything to look after. Raises `Unavailable`."""
        if self._stager is None:
            return False
        unfinished = await self._jobs.list(_MOST_JOBS, _UNFINISHED)
        wanted = {stored.key: stored for job in reversed(unfinished) for stored in job.spec.objects}
        there = await anyio.to_thread.run_sync(self._stager.objects.sizes)
        for stored in wanted.values():
            if there.get(stored.key) != stored.bytes:
                await anyio.to_thread.run_sync(self._put, stored)
        for stored in tuple(self._coming.values()):
            await anyio.to_thread.run_sync(self._take, stored)
        kept = {key for key in wanted if self._is_here(wanted[key])}
        spare = [key for key in there if key not in kept]
        if spare:
            kept |= await self._results()
            await anyio.to_thread.run_sync(self._sweep, [key for key in spare if key not in kept], set(wanted))
        return bool(unfinished or there)

    def _describe(self, spec: JobSpec) -> list[StoredObject]:
        drafts = {path for path in (spec.draft_dir, spec.previous_dir, *(c.path for c in spec.candidates)) if path}
        found = [objects.describe_draft(Path(path), Path(path).name) for path in sorted(drafts)]
        for path in dict.fromkeys((*spec.shards, *spec.replay, *spec.held_out)):
            if path not in self._described:
                try:
                    self._described[path] = objects.describe_file(Path(path), Kind.SAMPLES)
                except NotFound:
                    continue  # discarded meanwhile: the job will say that it lacks it
            found.append(self._described[path])
        for path in [path for path in self._described if not Path(path).exists()]:
            del self._described[path]
        return found

    def _put(self, stored: StoredObject) -> None:
        assert self._stager is not None
        source = Path(stored.path)
        try:
            self._stager.objects.put(stored, source, self._check)
        except NotFound:
            return  # purged meanwhile
        self._sources[stored.key] = source

    def _take(self, stored: StoredObject) -> None:
        assert self._stager is not None
        try:
            self._stager.stage(stored, self._check)
        except Refused as exc:
            self._failed[stored.key] = exc
            if len(self._failed) > _FAILURES:
                self._failed.popitem(last=False)
        self._coming.pop(stored.key, None)

    async def _results(self) -> set[str]:
        """Keys of results that tided has yet to take into its own stores."""
        done = await self._jobs.list(_RESULTS, (JobState.SUCCEEDED,))
        return await anyio.to_thread.run_sync(
            self._not_taken, [job for job in done if job.result and job.result.objects]
        )

    def _not_taken(self, jobs: Iterable[Job]) -> set[str]:
        return {stored.key for job in jobs if job.result and not self._is_taken(job) for stored in job.result.objects}

    def _is_taken(self, job: Job) -> bool:
        if job.spec.kind is JobKind.REFERENCE:
            return self._references.has(job.spec.target)
        try:
            return job.result is not None and bool(self._drafts.path(job.result.version))
        except Refused:
            return False

    def _is_here(self, stored: StoredObject) -> bool:
        """Whether a job's object may stay: samples that are gone from tided's own store may not."""
        return objects.kind_of(stored) is not Kind.SAMPLES or Path(stored.path).exists()

    def _sweep(self, unwanted: Iterable[str], named: set[str]) -> None:
        """Remove what nobody wants: samples without a source at once, all else after a while."""
        assert self._stager is not None
        now_s = time.monotonic()
        since = {key: self._unwanted.get(key, now_s) for key in unwanted}
        for key, first_s in tuple(since.items()):
            samples = key.startswith(f"{Kind.SAMPLES}/")
            source = self._sources.get(key)
            kept_s = SAMPLES_KEPT_S if samples else OTHERS_KEPT_S
            if samples and (key in named or source is None or not source.exists()):
                kept_s = 0.0
            if now_s - first_s >= kept_s:
                self._check()
                self._stager.objects.delete(key)
                del since[key]
                self._sources.pop(key, None)
        self._unwanted = since

    def _check(self) -> None:
        """From a thread: stop when the task was cancelled or another tided leads."""
        anyio.from_thread.check_cancelled()
        if not self._leadership.leads:
            raise Unavailable("this tided leads no more")

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            _log.warning("storage-unavailable", why=problem)
        self.problem = problem
