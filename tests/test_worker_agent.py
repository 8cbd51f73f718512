"""tide-worker as a real process on a real Valkey. The trainer is a stand-in (tests/fake_trainer.py) except where said otherwise."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Valkey
from tests.support import eventually
from tided.model.errors import Unavailable
from tided.model.jobs import Job, JobKind, JobSpec, JobState, WorkerMark
from tided.store.client import connect
from tided.store.jobs import JobStore
from tided.store.valkey import find_binary
from tided.store.workers import WorkerStore
from tided.wire import keys

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
LEASE_S = 15.0
SHORT_S = 3.0  # for leases that are meant to run out
PROGRAM = """
import sys, anyio
from pathlib import Path
from tided.model.jobs import JobKind
from tided.worker.agent import Agent
from tided.worker.settings import WorkerSettings
url, name, work, fake, drain_s, lease_s, silence_s, jobs, idle_s = sys.argv[1:]
agent = Agent(WorkerSettings(
    redis_url=url, name=name, kinds=tuple(JobKind), work_dir=Path(work), drain_s=float(drain_s), lease_s=float(lease_s),
    keep_s=600.0, heartbeat_ttl_s=4.0, silence_s=float(silence_s), threads=3, nice=4, trainer=(sys.executable, fake),
    jobs=int(jobs), idle_s=float(idle_s)))
anyio.run(agent.run)
sys.exit(6 if agent.cut_off else 5 if agent.replaced else 0)
"""

Start = Callable[..., subprocess.Popen[bytes]]


def state_of(process: subprocess.Popen[bytes]) -> str:
    """As in /proc: "T" for a stopped one."""
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


class Server:
    """A Valkey of the test's own, that may be killed and come back with every acknowledged write."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.url = f"unix://{directory}/valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = ["--port", "0", "--unixsocket", f"{self._directory}/valkey.sock", "--dir", str(self._directory)]
        settings += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--logfile", "valkey.log"]
        self._process = subprocess.Popen([str(find_binary()), *settings])

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with tempfile.TemporaryDirectory(prefix="tided-valkey-") as directory:
        own = Server(Path(directory))
        own.start()
        yield own
        own.kill()


@pytest.fixture
def start(valkey: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Start workers as processes; end what is left of them."""
    started: list[subprocess.Popen[bytes]] = []

    def start_worker(
        name: str = "w1",
        drain_s: float = 5.0,
        lease_s: float = LEASE_S,
        silence_s: float = 60.0,
        url: str = "",
        failpoint: str = "",
        ends: tuple[int, float] = (0, 0.0),
    ) -> subprocess.Popen[bytes]:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        arguments = [
            url or valkey.url,
            name,
            work,
            ROOT / "tests" / "fake_trainer.py",
            drain_s,
            lease_s,
            silence_s,
            *ends,
        ]
        with (tmp_path / f"{name}.log").open("ab") as log:
            environment = {**os.environ, "TIDED_SECRET": "canary", "TIDED_FAILPOINT": failpoint}
            command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        started.append(process)
        return process

    yield start_worker
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


@pytest.fixture
async def jobs(valkey: Valkey) -> AsyncIterator[JobStore]:
    client = connect(valkey.url)
    yield JobStore(client, lease_s=LEASE_S, keep_s=600)
    await client.aclose()


def job_of(kind: JobKind = JobKind.TRAIN, **options: Any) -> JobSpec:
    return JobSpec(kind, "engine-a", "0" * 64, "/target", options=options)


async def until(jobs: JobStore, job_id: str, *states: JobState, reap: bool = False) -> Job:
    """Wait for one of the states, as the leader would: looking for expired leases meanwhile."""

    async def there() -> Job | None:
        if reap:
            await jobs.reap(epoch=1)
        job = await jobs.get(job_id)
        assert job is not None
        assert job.state in states, (job.state, job.error)
        return job

    job = await eventually(there)
    assert job is not None
    return job


async def running(jobs: JobStore, job_id: str) -> Job:
    """Wait until the trainer has said something."""

    async def there() -> Job | None:
        job = await jobs.get(job_id)
        return job if job is not None and job.state is JobState.RUNNING and job.progress is not None else None

    job = await eventually(there)
    assert job is not None
    return job


def trainer_pid(tmp_path: Path, job: Job, name: str = "w1", what: str = "pid") -> int:
    """What the stand-in trainer wrote of itself; an AssertionError until it has."""
    file = tmp_path / name / job.id / f"attempt-{job.attempt}" / what
    text = file.read_text() if file.exists() else ""
    assert text, f"{file} is not written yet"
    return int(text)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def test_a_job_runs_and_its_result_is_committed(start: Start, jobs: JobStore) -> None:
    start()
    job = await jobs.submit(job_of(), epoch=1)
    done = await until(jobs, job.id, JobState.SUCCEEDED)
    assert done.result is not None
    assert done.result.seconds == 1.5
    assert Path(done.result.staged).is_dir()
    assert done.worker == "w1"


async def test_the_trainer_gets_threads_and_niceness_but_no_secrets(start: Start, jobs: JobStore) -> None:
    start()
    job = await jobs.submit(job_of(act="environment"), epoch=1)
    done = await until(jobs, job.id, JobState.SUCCEEDED)
    assert done.result is not None
    environment = json.loads(done.result.staged)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "canary" not in done.result.staged
    assert done.result.metrics["nice"] == 4


@pytest.mark.parametrize("retryable", [True, False])
async def test_a_clean_error_is_reported_as_it_is(
    start: Start, jobs: JobStore, tmp_path: Path, retryable: bool
) -> None:
    start()
    job = await jobs.submit(job_of(act="error", retryable=retryable), epoch=1)

    async def failed() -> Job | None:
        found = await jobs.get(job.id)
        return found if found is not None and found.error else None

    found = await eventually(failed)
    assert found is not None
    assert found.error == "shard 7 is not readable"
    assert found.state is (JobState.QUEUED if retryable else JobState.FAILED)
    await eventually(lambda: not (tmp_path / "w1" / job.id / "attempt-1").exists())


@pytest.mark.parametrize(
    ("act", "message"),
    [("die", "SIGKILL"), ("exit", "status 7"), ("nonsense", "result does not decode"), ("huge", "over the limit")],
)
async def test_a_trainer_that_dies_is_a_failure_that_says_how(
    start: Start, jobs: JobStore, tmp_path: Path, act: str, message: str
) -> None:
    start()
    job = await jobs.submit(job_of(act=act), epoch=1, max_attempts=1)
    assert message in (await until(jobs, job.id, JobState.FAILED)).error
    if act == "die":
        await eventually(lambda: "last words" in (tmp_path / "w1.log").read_text())


async def test_a_cancelled_job_frees_its_worker(start: Start, jobs: JobStore, tmp_path: Path) -> None:
    start()
    job = await jobs.submit(job_of(act="hang"), epoch=1)
    held = await running(jobs, job.id)
    child = await eventually(lambda: trainer_pid(tmp_path, held, what="child"))
    pid = trainer_pid(tmp_path, held)
    await jobs.cancel(job.id, epoch=1)
    await until(jobs, job.id, JobState.CANCELLED)
    assert not alive(pid)
    await eventually(lambda: not alive(child))
    following = await jobs.submit(job_of(), epoch=1)
    await until(jobs, following.id, JobState.SUCCEEDED)


async def test_a_killed_worker_takes_its_trainer_along_and_another_does_the_job(
    start: Start, jobs: JobStore, tmp_path: Path
) -> None:
    first = start("w1", lease_s=SHORT_S)
    gate = tmp_path / "gate"
    job = await jobs.submit(job_of(act="wait", gate=str(gate)), epoch=1)
    held = await running(jobs, job.id)
    pid = trainer_pid(tmp_path, held)
    first.kill()
    await eventually(lambda: not alive(pid))
    start("w2")
    gate.touch()
    done = await until(jobs, job.id, JobState.SUCCEEDED, reap=True)
    assert (done.worker, done.attempt) == ("w2", 2)


@pytest.mark.parametrize("then", ["fail", "killed", "given-back"])
async def test_the_next_attempt_goes_on_from_the_checkpoint(
    start: Start, jobs: JobStore, tmp_path: Path, then: str
) -> None:
    """Also on another worker, whose directory lies beside the first one's; when the job is done no attempt but the last is left."""
    first = start("w1", lease_s=SHORT_S, drain_s=0.0)
    job = await jobs.submit(job_of(act="resume", then=then), epoch=1)
    if then != "fail":
        checkpoint = tmp_path / "w1" / job.id / "attempt-1" / "checkpoint.safetensors"
        await eventually(lambda: checkpoint.exists() and checkpoint.read_text())
        first.send_signal(signal.SIGKILL if then == "killed" else signal.SIGTERM)
        start("w2")
    done = await until(jobs, job.id, JobState.SUCCEEDED, reap=True)
    assert done.attempt == 2
    assert done.result is not None
    assert done.result.metrics == {"steps": 17.0}
    await eventually(lambda: [path.name for path in tmp_path.glob(f"*/{job.id}/attempt-*")] == ["attempt-2"])


async def test_a_job_that_is_over_leaves_no_checkpoint(start: Start, jobs: JobStore, tmp_path: Path) -> None:
    start()
    job = await jobs.submit(job_of(act="resume", then="wait"), epoch=1)
    await eventually(lambda: list(tmp_path.glob(f"w1/{job.id}/attempt-1/checkpoint.safetensors")))
    await jobs.cancel(job.id, epoch=1)
    await until(jobs, job.id, JobState.CANCELLED)
    await eventually(lambda: not (tmp_path / "w1" / job.id).exists())


async def test_a_worker_stopped_past_its_lease_commits_nothing(start: Start, jobs: JobStore, tmp_path: Path) -> None:
    first = start("w1", lease_s=SHORT_S)
    gate = tmp_path / "gate"
    job = await jobs.submit(job_of(act="wait", gate=str(gate)), epoch=1)
    await running(jobs, job.id)
    first.send_signal(signal.SIGSTOP)
    await until(jobs, job.id, JobState.QUEUED, reap=True)
    gate.touch()
    start("w2")
    done = await until(jobs, job.id, JobState.SUCCEEDED)
    assert (done.worker, done.attempt) == ("w2", 2)
    first.send_signal(signal.SIGCONT)
    log = tmp_path / "w1.log"
    await eventually(lambda: "attempt-refused" in log.read_text() or "attempt-lost" in log.read_text())
    assert await jobs.get(job.id) == done
    # It is as good as new afterwards.
    start("w2").kill()
    assert first.poll() is None


async def test_a_worker_stopped_before_its_commit_leaves_the_next_attempt_alone(
    start: Start, jobs: JobStore, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    first = start("w1", lease_s=SHORT_S, failpoint="worker.finishing:pause")
    job = await jobs.submit(job_of(act="wait", gate=str(gate)), epoch=1)
    await eventually(lambda: state_of(first) == "T")
    gate.unlink()
    await until(jobs, job.id, JobState.QUEUED, reap=True)
    start("w2")
    await eventually(lambda: (tmp_path / "w2" / job.id / "attempt-2" / "pid").exists())
    first.send_signal(signal.SIGCONT)
    log = tmp_path / "w1.log"
    await eventually(lambda: "attempt-refused" in log.read_text() or "attempt-lost" in log.read_text())
    first.terminate()
    await eventually(lambda: first.poll() == 0)  # and with that it has tidied up
    gate.touch()
    done = await until(jobs, job.id, JobState.SUCCEEDED)
    assert (done.worker, done.attempt) == ("w2", 2)
    assert done.result is not None
    assert Path(done.result.staged, "spec.json").exists()


async def test_scoring_does_not_wait_behind_training(start: Start, jobs: JobStore, tmp_path: Path) -> None:
    start()
    training = await jobs.submit(job_of(act="wait", gate=str(tmp_path / "gate")), epoch=1)
    await running(jobs, training.id)
    scoring = await jobs.submit(job_of(JobKind.SCORE), epoch=1)
    await until(jobs, scoring.id, JobState.SUCCEEDED)
    assert (await running(jobs, training.id)).state is JobState.RUNNING


async def test_a_silent_trainer_is_ended(start: Start, jobs: JobStore) -> None:
    start(silence_s=1.0)
    job = await jobs.submit(job_of(act="hang"), epoch=1, max_attempts=1)
    assert "said nothing for 1 s" in (await until(jobs, job.id, JobState.FAILED)).error


async def test_one_that_is_started_for_a_job_does_one_of_any_kind_and_ends(
    start: Start, jobs: JobStore, tmp_path: Path, valkey: Valkey
) -> None:
    """A training and a score wait, and it has a slot for each: it takes one, and lets it take its time."""
    gate = tmp_path / "gate"
    both = [
        await jobs.submit(job_of(kind, act="wait", gate=str(gate)), epoch=1) for kind in (JobKind.TRAIN, JobKind.SCORE)
    ]
    worker = start(drain_s=0, ends=(1, 0.5))

    async def states() -> list[JobState]:
        found = [await jobs.get(job.id) for job in both]
        return sorted(job.state for job in found if job is not None)

    async def one_runs() -> bool:
        return await states() == [JobState.QUEUED, JobState.RUNNING] and bool(list(tmp_path.glob("w1/*/attempt-1/pid")))

    await eventually(one_runs)
    with pytest.raises(subprocess.TimeoutExpired):  # longer than it would idle
        worker.wait(1.5)
    gate.touch()
    await eventually(lambda: worker.poll() == 0)
    assert await states() == [JobState.QUEUED, JobState.SUCCEEDED]
    assert not valkey.client.exists(keys.worker("w1"))


async def test_one_that_finds_no_job_ends(start: Start, jobs: JobStore, valkey: Valkey) -> None:
    idle, cut_off = (
        start("w1", ends=(1, 0.5)),
        start("w2", lease_s=SHORT_S, ends=(1, 0.5), url="unix:///nowhere/valkey.sock"),
    )
    await eventually(lambda: (idle.poll(), cut_off.poll()) == (0, 6))
    assert not valkey.client.exists(keys.worker("w1"))


async def test_sigterm_lets_an_attempt_finish(start: Start, jobs: JobStore, tmp_path: Path, valkey: Valkey) -> None:
    worker = start(drain_s=300)
    gate = tmp_path / "gate"
    job = await jobs.submit(job_of(act="wait", gate=str(gate)), epoch=1)
    await running(jobs, job.id)
    worker.terminate()
    waiting = await jobs.submit(job_of(), epoch=1)
    gate.touch()
    await until(jobs, job.id, JobState.SUCCEEDED)
    await eventually(lambda: worker.poll() == 0)
    left = await jobs.get(waiting.id)
    assert left is not None
    assert left.state is JobState.QUEUED
    assert not valkey.client.exists(keys.worker("w1"))


async def test_sigterm_gives_back_what_does_not_finish_and_leaves_no_process(
    start: Start, jobs: JobStore, tmp_path: Path
) -> None:
    worker = start(drain_s=0.2, lease_s=30)
    job = await jobs.submit(job_of(act="hang"), epoch=1, max_attempts=1)
    held = await running(jobs, job.id)
    pid = trainer_pid(tmp_path, held)
    child = await eventually(lambda: trainer_pid(tmp_path, held, what="child"))
    worker.terminate()
    await eventually(lambda: worker.poll() == 0)
    assert not alive(pid)
    await eventually(lambda: not alive(child))
    back = await jobs.get(job.id)
    assert back is not None
    assert (back.state, back.max_attempts - back.attempt) == (JobState.QUEUED, 1)


async def test_a_worker_registers_and_claims_nothing_while_it_is_cordoned(
    start: Start, jobs: JobStore, valkey: Valkey
) -> None:
    async with connect(valkey.url) as client:
        workers = WorkerStore(client)
        start()

        [info] = await eventually(workers.list)
        assert (info.worker, info.kinds) == ("w1", tuple(JobKind))
        await workers.mark("w1", WorkerMark.CORDON, epoch=1)

        async def cordoned() -> bool:
            return [(info.cordoned, info.draining) for info in await workers.list()] == [(True, False)]

        await eventually(cordoned)
        job = await jobs.submit(job_of(), epoch=1)
        await workers.mark("w1", WorkerMark.NONE, epoch=1)
        await until(jobs, job.id, JobState.SUCCEEDED)


async def test_a_drained_worker_gives_back_what_does_not_end_in_time_and_works_again_when_uncordoned(
    start: Start, jobs: JobStore, tmp_path: Path, valkey: Valkey
) -> None:
    async with connect(valkey.url) as client:
        workers = WorkerStore(client)
        start(drain_s=0.5)
        gate = tmp_path / "gate"
        job = await jobs.submit(job_of(act="wait", gate=str(gate)), epoch=1, max_attempts=1)
        pid = trainer_pid(tmp_path, await running(jobs, job.id))
        await workers.mark("w1", WorkerMark.DRAIN, epoch=1)
        await until(jobs, job.id, JobState.QUEUED)
        assert not alive(pid)
        await workers.mark("w1", WorkerMark.NONE, epoch=1)
        gate.touch()
        assert (await until(jobs, job.id, JobState.SUCCEEDED)).attempt == 2


async def test_a_second_worker_of_the_same_name_replaces_the_first(start: Start, valkey: Valkey) -> None:
    first = start("w1")
    await eventually(lambda: valkey.client.exists(keys.worker("w1")))
    second = start("w1")
    await eventually(lambda: first.poll() == 5)
    assert second.poll() is None


async def submitted(jobs: JobStore, spec: JobSpec) -> Job:
    """Submit to a server that may still be starting."""

    async def attempt() -> Job | None:
        try:
            return await jobs.submit(spec, epoch=1, job_id="job-1")
        except Unavailable:
            return None

    job = await eventually(attempt)
    assert job is not None
    return job


async def test_redis_may_be_away_for_less_than_a_lease(start: Start, server: Server, tmp_path: Path) -> None:
    async with connect(server.url) as client:
        jobs = JobStore(client, lease_s=60, keep_s=600)
        start(url=server.url, lease_s=60)
        gate = tmp_path / "gate"
        job = await submitted(jobs, job_of(act="wait", gate=str(gate)))
        held = await running(jobs, job.id)
        server.kill()
        await eventually(lambda: "lease-not-renewed" in (tmp_path / "w1.log").read_text())
        assert alive(trainer_pid(tmp_path, held))
        gate.touch()
        await eventually(lambda: "attempt-not-reported" in (tmp_path / "w1.log").read_text())
        server.start()
        await submitted(jobs, job.spec)
        done = await until(jobs, job.id, JobState.SUCCEEDED)
        assert done.attempt == 1


async def test_an_attempt_stops_before_its_lease_can_be_lost(start: Start, server: Server, tmp_path: Path) -> None:
    async with connect(server.url) as client:
        start(url=server.url, lease_s=2)
        job = await submitted(JobStore(client, lease_s=2, keep_s=600), job_of(act="wait", gate=str(tmp_path / "gate")))
        pid = trainer_pid(tmp_path, await running(JobStore(client, lease_s=2, keep_s=600), job.id))
        server.kill()
        # Nobody is left to tell it: it ends by its own clock.
        await eventually(lambda: not alive(pid))
        await eventually(lambda: "attempt-lost" in (tmp_path / "w1.log").read_text())


async def test_a_worker_waits_for_a_redis_that_is_not_there_yet(start: Start, server: Server, tmp_path: Path) -> None:
    server.kill()
    worker = start(url=server.url)
    await eventually(lambda: "cannot be reached" in (tmp_path / "w1.log").read_text())
    assert worker.poll() is None
    server.start()
    async with connect(server.url) as client:
        jobs = JobStore(client, keep_s=600)
        job = await submitted(jobs, job_of())
        await until(jobs, job.id, JobState.SUCCEEDED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "w1"], "give --config FILE, or --redis URL"),
        (["--redis", "http://x", "--name", "w1"], "expected unix://, redis:// or rediss://"),
        (["--redis", "unix:///x", "--name", "No Name"], "is not a name"),
        (["--redis", "unix:///x", "--kinds", "train,bake"], "bake"),
        (["--redis", "unix:///x", "--threads", "0"], "--threads must be at least 1"),
        (["--redis", "unix:///x", "--cpus", "9999"], "Invalid argument"),
        (["--config", "/nowhere.toml"], "there is no such file"),
    ],
)
def test_wrong_flags_are_one_clear_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "tided.worker.agent", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == (1 if "--cpus" in arguments else 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


async def test_the_program_runs_from_the_default_configuration(valkey: Valkey, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    command = [
        sys.executable,
        "-m",
        "tided.worker.agent",
        "--config",
        "config.toml",
        "--redis",
        valkey.url,
        "--cpus",
        str(core),
    ]
    worker = subprocess.Popen([*command, "--work-dir", str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        await eventually(lambda: valkey.client.exists(keys.worker("worker")))
        assert os.sched_getaffinity(worker.pid) == {core}
        worker.terminate()
        await eventually(lambda: worker.poll() == 0)
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("failpoint", ["worker.claimed", "worker.finishing", "worker.finished"])
@pytest.mark.parametrize("action", ["kill", "error"])
async def test_whatever_fails_around_an_attempt_the_job_takes_effect_once(
    start: Start, jobs: JobStore, tmp_path: Path, failpoint: str, action: str
) -> None:
    """`error` stands for a claim or a commit whose answer is lost: at `finished` the result is in, and nobody knows it."""
    first = start("w1", lease_s=SHORT_S, failpoint=f"{failpoint}:{action}")
    job = await jobs.submit(job_of(), epoch=1)
    if action == "kill":
        await eventually(lambda: first.poll() == -signal.SIGKILL)
    else:
        said = "cannot-claim" if failpoint == "worker.claimed" else "attempt-lost"
        await eventually(lambda: said in (tmp_path / "w1.log").read_text())
        first.kill()
    start("w2")
    done = await until(jobs, job.id, JobState.SUCCEEDED, reap=True)
    assert (done.worker, done.attempt) == (("w1", 1) if failpoint == "worker.finished" else ("w2", 2))


async def test_only_the_newest_staged_results_are_kept(start: Start, jobs: JobStore, tmp_path: Path) -> None:
    start()
    finished = [await jobs.submit(job_of(), epoch=1, job_id=f"job-{n}") for n in range(10)]
    await until(jobs, finished[-1].id, JobState.SUCCEEDED)
    await eventually(lambda: len(list((tmp_path / "w1").iterdir())) == 8)
    assert (tmp_path / "w1" / finished[-1].id).is_dir()
