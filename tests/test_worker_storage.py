"""tided and a worker on two hosts that share Redis and a storage, and no directory else: one that is mounted at different paths, or a
bucket of a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import fsspec
import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_draft, store_samples, variant
from tests.support import eventually
from tided.config import Config
from tided.draft import checkpoint
from tided.draft.cache import Cache
from tided.draft.target import describe
from tided.model.drafts import DraftOrigin
from tided.model.errors import Refused, Unavailable
from tided.model.jobs import Job, JobKind, JobSpec, JobState
from tided.services import exchange
from tided.store.objects import Kind, ObjectStore
from tided.store.samples import Split
from tided.worker.staging import Staging

pytest_plugins = ("tests.tiny_fixtures", "tests.s3_fixtures")
pytestmark = pytest.mark.real
either_storage = pytest.mark.parametrize("hosts", ["file", "s3"], indirect=True)

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, anyio
from pathlib import Path
from tided.model.jobs import JobKind
from tided.worker.agent import Agent
from tided.worker.settings import WorkerSettings
url, name, root, storage, fake, lease_s = sys.argv[1:]
anyio.run(Agent(WorkerSettings(
    redis_url=url, name=name, kinds=tuple(JobKind), work_dir=Path(root, name), drain_s=0.0, lease_s=float(lease_s),
    keep_s=600.0, heartbeat_ttl_s=4.0, trainer=(sys.executable, fake), storage_url=storage,
    targets=(Path(root, "nothing"), Path(root, "target")))).run)
"""


@dataclass
class Hosts:
    """Two directories that stand for two hosts. `storage` is what the worker's host calls the storage."""

    valkey: Valkey
    config: Config
    target: Path
    worker: Path
    storage: str
    trained: Path  # what the stand-in trainer gives
    start: Callable[..., subprocess.Popen[bytes]]

    @property
    def result(self) -> str:
        """Its version."""
        return checkpoint.version_of(self.trained)

    @asynccontextmanager
    async def tided(self) -> AsyncGenerator[Control]:
        """A tided that leads and hands over."""
        async with leading(self.valkey, self.config) as control, anyio.create_task_group() as group:
            group.start_soon(control.context.exchange.run)
            yield control
            group.cancel_scope.cancel()

    def spec(self, control: Control, draft: Path, **options: Any) -> JobSpec:
        """A training on everything that is in stock."""
        context = control.context
        version = store_draft(control, draft, self.target).version
        return JobSpec(
            kind=JobKind.TRAIN,
            engine="e",
            target=describe(self.target).digest,
            target_dir=str(self.target),
            lineage="tiny",
            draft=version,
            draft_dir=str(context.drafts.path(version)),
            shards=tuple(str(shard.path) for shard in context.samples.shards(Split.TRAIN)),
            held_out=tuple(str(shard.path) for shard in context.samples.shards(Split.HELD_OUT)),
            options={"act": "train", "gives": str(self.trained), "version": self.result} | options,
        )

    def there(self, kind: str = "") -> list[str]:
        return sorted(ObjectStore(self.storage).sizes(kind))

    def change(self, key: str, change: Callable[[bytes], bytes]) -> None:
        """As a disk that rots, or somebody else, does."""
        filesystem, root = fsspec.url_to_fs(self.storage, skip_instance_cache=True)
        filesystem.pipe_file(f"{root}/{key}", change(filesystem.cat_file(f"{root}/{key}")))

    def cached(self, name: str = "w1") -> list[str]:
        return sorted(path.name for path in (self.worker / name / "cache").glob("[!.]*"))


@pytest.fixture
def hosts(request: pytest.FixtureRequest, valkey: Valkey, tmp_path: Path, target: Path, first: Path) -> Iterator[Hosts]:
    started: list[subprocess.Popen[bytes]] = []
    worker = tmp_path / "worker"
    worker.mkdir()
    (tmp_path / "mnt-tided").mkdir()
    (worker / "mnt").symlink_to(tmp_path / "mnt-tided")
    shutil.copytree(target, worker / "target")
    storage, storage_at_tided = f"file://{worker}/mnt/storage", f"file://{tmp_path}/mnt-tided/storage"
    if getattr(request, "param", "file") == "s3":
        storage = storage_at_tided = request.getfixturevalue("s3_url")
    config = settings(tmp_path / "tided", target, storage={"url": storage_at_tided})
    store_samples(config, target, "e", 6, 3, 1)

    def start(
        name: str = "w1", failpoint: str = "", lease_s: float = 15.0, url: str = storage
    ) -> subprocess.Popen[bytes]:
        arguments = [valkey.url, name, worker, url, ROOT / "tests" / "fake_trainer.py", lease_s]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            cwd=worker,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TIDED_FAILPOINT": failpoint},
        )
        started.append(process)
        return process

    yield Hosts(valkey, config, target, worker, storage, variant(first, tmp_path / "trained", 1), start)
    for process in started:
        process.kill()
        process.wait()


async def ended(control: Control, job: Job) -> Job:
    async def there() -> Job | None:
        await control.context.jobs.reap(control.context.leadership.require())
        found = await control.context.jobs.get(job.id)
        return found if found is not None and found.state.final else None

    found = await eventually(there, timeout_s=120)
    assert found is not None
    return found


async def taken(control: Control, job: Job) -> Path:
    result = job.result
    assert result is not None
    return await eventually(lambda: control.context.exchange.taken(result))


@either_storage
async def test_a_worker_with_no_shared_path_does_a_job(
    hosts: Hosts, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts.tided() as control:
        spec = hosts.spec(control, first, gate=str(tmp_path / "gate"))
        job = await control.context.submit(spec, 3, "job-1")
        hosts.start()
        written = hosts.worker / "w1" / job.id / "attempt-1" / "spec.json"
        read = json.loads(await eventually(lambda: written.read_text() if written.exists() else ""))
        paths = [read["target_dir"], read["draft_dir"], *read["shards"], *read["held_out"]]
        assert len(paths) == 4
        assert all(Path(path).is_relative_to(hosts.worker) for path in paths), paths
        assert len(hosts.cached()) == 3
        (tmp_path / "gate").touch()
        done = await ended(control, job)
        assert done.state is JobState.SUCCEEDED, done.error
        staged = await taken(control, done)
        assert staged.is_relative_to(hosts.config.cache_dir)
        assert checkpoint.verify(staged) == hosts.result
        await eventually(lambda: not written.parent.exists())  # uploaded: no need to keep it
        # What was trained on is consumed: it leaves the storage, and the worker, while the draft may be named again.
        control.context.samples.consume(spec.shards)
        control.context.samples.purge()
        control.context.exchange.look()
        await eventually(lambda: hosts.there(Kind.SAMPLES) == [])
        assert hosts.there() == sorted(f"drafts/{version}" for version in (spec.draft, hosts.result))
        await eventually(lambda: hosts.cached() == [f"d-{spec.draft[:62]}"])


async def test_samples_stay_a_while_for_the_next_job_and_nothing_for_ever(
    hosts: Hosts, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts.tided() as control:
        job = await control.context.submit(hosts.spec(control, first), 3, "job-1")
        hosts.start()
        done = await ended(control, job)
        step = control.context.exchange.step
        await step()
        assert len(hosts.there()) == 4
        monkeypatch.setattr(exchange, "SAMPLES_KEPT_S", 0.0)
        await step()
        assert hosts.there() == hosts.there(Kind.DRAFTS)
        monkeypatch.setattr(exchange, "OTHERS_KEPT_S", 0.0)
        await step()
        assert hosts.there() == [f"drafts/{hosts.result}"]  # which tided has not taken yet
        control.context.drafts.add(
            await taken(control, done),
            lineage="tiny",
            parent="",
            origin=DraftOrigin.TRAINED,
            target=describe(hosts.target),
            now_ms=1,
        )
        await step()
        assert hosts.there() == []


@either_storage
@pytest.mark.parametrize("failpoint", ["objects.writing", "objects.written"])
async def test_a_worker_killed_during_its_upload_leaves_nothing_that_counts(
    hosts: Hosts, first: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    async with hosts.tided() as control:
        job = await control.context.submit(hosts.spec(control, first), 3, "job-1")
        doomed = hosts.start("w1", failpoint=failpoint, lease_s=3.0)
        await eventually(lambda: doomed.poll() is not None)
        assert len(hosts.there("tmp")) == (1 if hosts.storage.startswith("file:") else 0)
        assert f"drafts/{hosts.result}" not in hosts.there()
        hosts.start("w2")
        done = await ended(control, job)
        assert (done.state, done.worker) == (JobState.SUCCEEDED, "w2")
        assert checkpoint.verify(await taken(control, done)) == hosts.result
        monkeypatch.setattr(exchange, "OTHERS_KEPT_S", 0.0)
        await control.context.exchange.step()
        await control.context.exchange.step()
        assert hosts.there("tmp") == []


@either_storage
async def test_an_object_that_was_changed_is_refused_and_put_there_again(hosts: Hosts, first: Path) -> None:
    async with hosts.tided() as control:
        job = await control.context.submit(hosts.spec(control, first), 3, "job-1")
        (shard,) = [stored for stored in job.spec.objects if stored.path in job.spec.shards]
        await eventually(lambda: shard.key in hosts.there() and len(hosts.there()) == 3)
        hosts.change(shard.key, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
        hosts.start()

        async def failed() -> Job | None:
            found = await control.context.jobs.get(job.id)
            return found if found is not None and found.error else None

        found = await eventually(failed)
        assert found is not None
        assert f"{shard.key} is not what it should be" in found.error
        assert (await ended(control, job)).state is JobState.SUCCEEDED


async def test_a_tided_that_comes_after_goes_on(hosts: Hosts, first: Path) -> None:
    """The one that submitted the job died before it had put anything into the storage; the next one dies before it has the result."""
    async with leading(hosts.valkey, hosts.config) as control:
        job = await control.context.submit(hosts.spec(control, first), 3, "job-1")
    assert hosts.there() == []
    hosts.start()
    async with hosts.tided() as control:
        done = await ended(control, job)
    async with hosts.tided() as control:
        assert checkpoint.verify(await taken(control, done)) == hosts.result


async def test_purged_samples_leave_while_their_job_is_not_over(hosts: Hosts, first: Path) -> None:
    async with hosts.tided() as control:
        await control.context.submit(hosts.spec(control, first), 3, "job-1")
        await eventually(lambda: len(hosts.there(Kind.SAMPLES)) == 2)
        await control.plane.purge(None, "uid:7")
        await eventually(lambda: hosts.there(Kind.SAMPLES) == [])
        assert len(hosts.there(Kind.DRAFTS)) == 1


async def test_a_result_that_was_changed_fails_the_training_and_nothing_else(hosts: Hosts, first: Path) -> None:
    async with hosts.tided() as control:
        job = await control.context.submit(hosts.spec(control, first), 3, "job-1")
        hosts.start()
        done = await ended(control, job)
        assert done.result is not None
        hosts.change(f"drafts/{hosts.result}", lambda content: content[:-1])

        def refused() -> str:
            assert done.result is not None
            try:
                control.context.exchange.taken(done.result)
            except Refused as exc:
                return str(exc)
            return ""

        assert "drafts/" in await eventually(refused)
        assert not (hosts.config.cache_dir / f"d-{hosts.result[:62]}").exists()


@pytest.mark.parametrize(
    ("lacking", "message"), [("storage", "set storage.url"), ("target", "is not on this worker's host")]
)
async def test_what_a_worker_lacks_is_said(hosts: Hosts, first: Path, lacking: str, message: str) -> None:
    async with hosts.tided() as control:
        job = await control.context.submit(hosts.spec(control, first), 1, "job-1")
        if lacking == "target":
            shutil.rmtree(hosts.worker / "target")
        hosts.start(url="" if lacking == "storage" else hosts.storage)
        done = await ended(control, job)
        assert done.state is JobState.FAILED
        assert message in done.error


async def test_a_job_names_nothing_that_it_does_not_bring(hosts: Hosts, first: Path, tmp_path: Path) -> None:
    staging = Staging(ObjectStore(hosts.storage), Cache(tmp_path / "cache", 1 << 20), (hosts.worker / "target",))
    async with leading(hosts.valkey, hosts.config) as control:
        spec = await control.context.exchange.lend(hosts.spec(control, first))
        stray = replace(spec, objects=(), draft_dir="", held_out=(), shards=("/etc/passwd",))
        with pytest.raises(Refused, match="not in the shared storage"):
            await anyio.to_thread.run_sync(staging.localise, stray)
        with pytest.raises(Unavailable, match="not on this worker's host"):
            await anyio.to_thread.run_sync(staging.localise, replace(stray, shards=(), target="0" * 64))
