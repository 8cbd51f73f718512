"""Workers launched by a real Ray, for a real tided: a contract that the double of tests/launcher_double.py keeps too, and the whole way."""

import asyncio
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.configs import free_port, write_config
from tests.conftest import Valkey
from tests.daemon_run import tided
from tests.engines.ray_server import ray_head
from tests.launcher_double import LauncherDouble
from tests.support import eventually
from tests.tiny import make_target
from tided.api.client import Client, api_path
from tided.config import Config, LauncherConfig
from tided.draft.target import describe
from tided.launchers.base import Launcher
from tided.launchers.ray import RayLauncher
from tided.model.errors import Refused, Unavailable
from tided.model.jobs import Job, JobKind, JobSpec, JobState
from tided.model.launch import Launch, LaunchState
from tided.model.status import LauncherStatus
from tided.store.client import connect
from tided.store.jobs import JobStore
from tided.store.workers import WorkerStore

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
SLOW_S = 180.0
TOO_MANY = 64.0
"""Processors that the head will never have."""


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tided-ray-") as directory, ray_head(Path(directory)) as url:
        yield url


# --- the contract ---


@dataclass
class Subject:
    """A scheduler: `launcher`, and `never`, on which nothing gets what it asks for. `ends`: what becomes of a launch by its command, where
    nobody runs it."""

    launcher: Launcher
    never: Launcher
    ends: dict[str, Launch] = field(default_factory=dict[str, Launch])

    async def ended(self, launch_id: str) -> Launch:
        if isinstance(self.launcher, LauncherDouble):
            end = self.ends[self.launcher.commands[launch_id]]
            self.launcher.end(launch_id, end.state, end.message)

        async def there() -> Launch | None:
            launch = (await self.launcher.states())[launch_id]
            return None if launch.state.live else launch

        return await eventually(there, SLOW_S, 0.2)


@pytest.fixture(params=["double", "ray"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    if request.param == "double":
        failed = Launch(LaunchState.FAILED, "Job entrypoint command failed with exit code 3: all is lost")
        double = LauncherDouble()
        yield Subject(double, LauncherDouble(0), {"true": Launch(LaunchState.SUCCEEDED), LOST: failed})
        return
    url = request.getfixturevalue("ray")
    subject = Subject(RayLauncher(launcher_config(url)), RayLauncher(launcher_config(url, cpus=TOO_MANY)))
    yield subject
    await subject.launcher.aclose()
    await subject.never.aclose()


LOST = "echo all is lost; exit 3"


def launcher_config(url: str, **values: Any) -> LauncherConfig:
    return LauncherConfig.model_validate({"kind": "ray", "url": url, **values})


async def test_a_launch_runs_once_and_its_end_is_known(subject: Subject) -> None:
    launcher = subject.launcher
    await launcher.submit("contract-1.1", "true")
    await launcher.submit("contract-1.1", LOST)  # the same again: nothing
    assert (await subject.ended("contract-1.1")).state is LaunchState.SUCCEEDED
    await launcher.submit("contract-1.2", LOST)
    failed = await subject.ended("contract-1.2")
    assert failed.state is LaunchState.FAILED
    assert "failed with exit code 3" in failed.message  # what follows are the log's last lines, if Ray has them already
    assert failed.ended_ms > (await launcher.states())["contract-1.1"].ended_ms > 0
    await launcher.cancel("contract-1.2")
    for launch_id in ("contract-1.1", "contract-1.2", "contract-1.2", "never-was"):
        await launcher.forget(launch_id)
    assert not [key for key in await launcher.states() if key.startswith("contract-1.")]


async def test_what_gets_no_devices_is_pending_and_cancelled_it_never_begins(subject: Subject) -> None:
    never = subject.never
    await never.submit("contract-2.1", "true")
    pending = (await never.states())["contract-2.1"]
    assert pending.state is LaunchState.PENDING
    assert pending.message
    for launch_id in ("contract-2.1", "contract-2.1", "never-was"):
        await never.cancel(launch_id)
    assert (await never.states())["contract-2.1"].state in (LaunchState.PENDING, LaunchState.STOPPED)


async def test_what_ray_will_not_take_and_what_is_no_ray_is_said(ray: str) -> None:
    launcher = RayLauncher(launcher_config(ray, options={"entrypoint_num_tpus": 1}))
    with pytest.raises(Refused, match=r"would not submit: TypeError: .*entrypoint_num_tpus"):
        await launcher.submit("contract-3.1", "true")
    await launcher.aclose()
    launcher = RayLauncher(launcher_config(f"{ray}/elsewhere"))
    with pytest.raises(Refused, match="answers no list of jobs"):
        await launcher.states()
    await launcher.aclose()


# --- the whole way ---


@dataclass
class Scene:
    config: Config
    client: Client
    jobs: JobStore
    workers: WorkerStore
    ray: RayLauncher

    async def submit(self, kind: JobKind, target: Path, **fields: Any) -> Job:
        epoch = (await self.status_of()).epoch
        spec = JobSpec(kind, "engine-a", describe(target).digest, str(target), **fields)
        return await self.jobs.submit(spec, epoch)

    async def status_of(self) -> Any:
        return await asyncio.to_thread(self.client.status)

    async def launcher(self) -> LauncherStatus:
        found = (await self.status_of()).launcher
        assert found is not None
        return found

    async def done(self, job: Job) -> Job:
        async def there() -> Job | None:
            found = await self.jobs.get(job.id)
            assert found is not None
            assert not found.error, found.error
            return found if found.state is JobState.SUCCEEDED else None

        return await eventually(there, SLOW_S, 0.1)


@asynccontextmanager
async def running(valkey: Valkey, root: Path, target: Path, url: str, **launcher: Any) -> AsyncGenerator[Scene]:
    """A real tided whose workers a Ray launches, with the worker's real command."""
    worker = shlex.join(
        [sys.executable, "-m", "tided.worker.agent", "--config", str(root / "config.toml"), "--drain-s", "0"]
    )
    path = ":".join(filter(None, [str(ROOT), *sys.path]))
    config = write_config(
        root / "config.toml",
        {
            "redis": {"url": valkey.url},
            "daemon": {"state_dir": str(root / "s"), "cycle_s": 0.2, "start_collector": False},
            "target": {"path": str(target)},
            "launcher": {
                "kind": "ray",
                "url": url,
                "command": f"env PYTHONPATH={shlex.quote(path)} {worker}",
                **launcher,
            },
        },
        None,
    )
    async with connect(valkey.url) as redis, tided(root / "config.toml", root) as daemon:
        await daemon.ready()
        ray = RayLauncher(config.launcher)
        scene = Scene(config, Client(config.daemon.socket_path), JobStore(redis), WorkerStore(redis), ray)

        async def leads() -> bool:
            return (await scene.status_of()).leader

        await eventually(leads)
        yield scene
        await ray.aclose()
        assert await daemon.stop() == 0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("ray") / "tiny")


async def test_a_worker_that_ray_starts_does_the_job_and_is_gone(
    valkey: Valkey, short_dir: Path, target: Path, ray: str
) -> None:
    async with running(valkey, short_dir, target, ray, name="whole") as scene:
        ids = (3, 4, 5, 6)
        job = await scene.submit(JobKind.REFERENCE, target, token_ids=ids, options={"lengths": [len(ids)]})

        async def launched() -> bool:
            return [launch.id for launch in (await scene.launcher()).launches] == ["whole-1.1"]

        await eventually(launched)
        done = await scene.done(job)
        assert (done.worker, done.attempt) == ("whole-1", 1)
        assert done.result is not None
        assert Path(done.result.staged).is_relative_to((scene.config.daemon.state_dir / "work" / "whole-1").absolute())

        async def gone() -> bool:
            launch = (await scene.ray.states())["whole-1.1"]
            return launch.state is LaunchState.SUCCEEDED and not await scene.workers.list()

        await eventually(gone, SLOW_S, 0.1)
        await eventually(lambda: unlaunched(scene))
        assert list(await scene.ray.states()).count("whole-1.2") == 0
        status = await scene.status_of()
        assert status.problems == ()


async def unlaunched(scene: Scene) -> bool:
    return (await scene.launcher()).launches == ()


async def test_a_job_that_is_cancelled_before_its_worker_began_withdraws_it(
    valkey: Valkey, short_dir: Path, target: Path, ray: str
) -> None:
    async with running(valkey, short_dir, target, ray, name="waits", cpus=TOO_MANY) as scene:
        job = await scene.submit(JobKind.TRAIN, target)

        async def waits(message: str) -> bool:
            return [
                (launch.id, launch.state) for launch in (await scene.launcher()).launches if message in launch.message
            ] == [("waits-1.1", LaunchState.PENDING)]

        await eventually(lambda: waits("waiting for resources"))
        await asyncio.to_thread(scene.client.post, api_path("jobs", job.id, "cancel"))
        await eventually(lambda: waits("withdrawn"))
        events = await asyncio.to_thread(scene.client.events)
        assert [event.subject for event in events if event.kind == "launch-withdrawn"] == ["waits-1.1"]


async def test_without_ray_a_job_waits_and_a_worker_that_registers_takes_it(
    valkey: Valkey, short_dir: Path, target: Path
) -> None:
    async with running(valkey, short_dir, target, f"http://127.0.0.1:{free_port()}") as scene:
        ids = (3, 4, 5)
        job = await scene.submit(JobKind.REFERENCE, target, token_ids=ids, options={"lengths": [len(ids)]})

        async def said() -> bool:
            return any("cannot be reached" in problem for problem in (await scene.status_of()).problems)

        await eventually(said)
        with pytest.raises(Unavailable):
            await scene.ray.states()
        command = [sys.executable, "-m", "tided.worker.agent", "--config", str(short_dir / "config.toml")]
        worker = subprocess.Popen([*command, "--name", "host"], cwd=ROOT)
        try:
            assert (await scene.done(job)).worker == "host"
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait()
