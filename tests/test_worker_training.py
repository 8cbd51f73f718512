"""tide-worker with the real trainer on a tiny random Llama: the contract between the agent and `python -m tided.training`."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.shards import train_spec
from tests.support import eventually
from tided.draft import checkpoint
from tided.model.jobs import CHECKPOINT_FILE, Job, JobKind, JobSpec, JobState, Needs
from tided.store.client import connect
from tided.store.jobs import JobStore

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return train_spec(tmp_path_factory.mktemp("job"), passes=2)


@pytest.fixture
async def jobs(valkey: Valkey) -> AsyncIterator[JobStore]:
    async with connect(valkey.url) as client:
        yield JobStore(client, keep_s=600)


@contextmanager
def started(valkey: Valkey, work_dir: Path, *more: str) -> Generator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tided.worker.agent", "--redis", valkey.url, "--name", "w1"]
    process = subprocess.Popen([*command, "--work-dir", str(work_dir), "--drain-s", "0", *more], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def worker(valkey: Valkey, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with started(valkey, tmp_path) as process:
        yield process


@pytest.fixture
def two_devices(valkey: Valkey, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with started(valkey, tmp_path, "--devices", "2") as process:
        yield process


async def ended(jobs: JobStore, job: Job) -> Job:
    async def there() -> Job | None:
        found = await jobs.get(job.id)
        return found if found is not None and found.state.final else None

    found = await eventually(there, timeout_s=180)
    assert found is not None
    return found


def trainers(job: Job) -> list[int]:
    """The processes that train for it."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if b"tided.training" in command and job.id.encode() in command and state != "Z":
                found.append(int(entry.name))
    return found


async def test_train_score_and_a_clean_error(jobs: JobStore, spec: JobSpec, worker: subprocess.Popen[bytes]) -> None:
    trained = await ended(jobs, await jobs.submit(spec, epoch=1))
    assert trained.state is JobState.SUCCEEDED, trained.error
    assert trained.result is not None
    assert checkpoint.verify(Path(trained.result.staged)) == trained.result.version
    assert trained.result.candidate is not None
    assert trained.result.trained_tokens > 0

    question = JobSpec(
        JobKind.SCORE, "e", "t", spec.target_dir, draft_dir=trained.result.staged, held_out=spec.held_out, gamma=3
    )
    scored = await ended(jobs, await jobs.submit(question, epoch=1))
    assert scored.state is JobState.SUCCEEDED, scored.error

    bad = JobSpec(
        JobKind.TRAIN, "e", "t", spec.target_dir, draft_dir="/nowhere", shards=spec.shards, held_out=spec.held_out
    )
    failed = await ended(jobs, await jobs.submit(bad, epoch=1))
    assert (failed.state, failed.attempt) == (JobState.FAILED, 1)
    assert "/nowhere" in failed.error


async def test_the_trainer_dies_with_a_worker_that_is_killed(
    jobs: JobStore, spec: JobSpec, worker: subprocess.Popen[bytes]
) -> None:
    long = replace(spec, budget_s=600.0, options={**spec.options, "passes": 10_000})
    job = await jobs.submit(long, epoch=1)

    await eventually(lambda: trainers(job))

    async def at_work() -> bool:
        found = await jobs.get(job.id)
        return found is not None and found.progress is not None

    await eventually(at_work)
    os.kill(worker.pid, signal.SIGKILL)
    await eventually(lambda: trainers(job) == [])


async def test_on_two_devices_two_processes_train_and_a_cancellation_ends_them_all(
    jobs: JobStore, spec: JobSpec, two_devices: subprocess.Popen[bytes]
) -> None:
    """torchrun gives each of them a session of its own; over gloo here."""
    needs = Needs(devices=2)
    long = replace(spec, budget_s=600.0, needs=needs, options={**spec.options, "passes": 10_000})
    job = await jobs.submit(long, epoch=1)

    async def trains() -> bool:
        found = await jobs.get(job.id)
        assert found is not None
        assert not found.error, found.error
        return found.progress is not None and (found.progress.tokens_per_s or 0) > 0

    await eventually(trains, timeout_s=180)
    pids = trainers(job)
    assert len(pids) == 3, "torchrun and its two"
    assert len({os.getsid(pid) for pid in pids}) == 3
    await jobs.cancel(job.id, epoch=1)
    assert (await ended(jobs, job)).state is JobState.CANCELLED
    assert trainers(job) == []
    trained = await ended(jobs, await jobs.submit(replace(spec, needs=needs), epoch=1))
    assert trained.state is JobState.SUCCEEDED, trained.error
    assert trained.result is not None
    assert checkpoint.verify(Path(trained.result.staged)) == trained.result.version


async def test_processes_of_torchrun_die_with_a_worker_that_is_killed(
    jobs: JobStore, spec: JobSpec, two_devices: subprocess.Popen[bytes]
) -> None:
    job = await jobs.submit(replace(spec, budget_s=600.0, options={**spec.options, "passes": 10_000}), epoch=1)
    await eventually(lambda: len(trainers(job)) == 3, timeout_s=60)
    two_devices.kill()
    await eventually(lambda: trainers(job) == [], timeout_s=60)


async def test_a_killed_trainer_is_followed_by_one_that_goes_on(
    jobs: JobStore, spec: JobSpec, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """kill -9 of the trainer, not of its worker: the job's next attempt begins at the checkpoint, and its draft is whole."""
    options = spec.options | {
        "passes": 40,
        "batch_tokens": 16,
        "checkpoint_interval_s": 0,
        "validation_interval_s": 1e6,
    }
    job = await jobs.submit(replace(spec, budget_s=1e6, options=options), epoch=1)
    checkpoints = f"{job.id}/attempt-1/{CHECKPOINT_FILE}"
    await eventually(lambda: list(tmp_path.glob(checkpoints)), timeout_s=60)
    for pid in trainers(job):
        os.kill(pid, signal.SIGKILL)
    done = await ended(jobs, job)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2), done.error
    assert done.result is not None
    assert 0 < done.result.metrics["resumed_at"] < done.result.metrics["steps"]
    assert checkpoint.verify(Path(done.result.staged)) == done.result.version
    await eventually(lambda: not list(tmp_path.glob(f"{job.id}/attempt-1")))
    assert not list(tmp_path.rglob(CHECKPOINT_FILE))
