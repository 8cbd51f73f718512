"""The launching service on a real Valkey, with a scheduler in memory: what it asks for, what it says, and that nobody waits for it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings
from tests.launcher_double import LauncherDouble
from tests.support import cut_at, eventually
from tests.tiny import make_target
from tided.model.errors import Unavailable
from tided.model.jobs import JobKind, JobSpec, Needs, WorkerInfo
from tided.model.launch import Launch, LaunchState
from tided.model.verification import CheckOutcome
from tided.services import launching
from tided.services.launching import Launching, command

pytestmark = pytest.mark.real


@dataclass
class Scene:
    control: Control
    scheduler: LauncherDouble

    @property
    def launching(self) -> Launching:
        return self.control.controller.launching

    async def look(self) -> None:
        await self.launching.look()

    async def submit(self, kind: JobKind = JobKind.TRAIN, device: str = "") -> str:
        context = self.control.context
        spec = JobSpec(kind, "e", "0" * 64, "/target", needs=Needs(device))
        return (await context.jobs.submit(spec, context.leadership.require())).id

    async def worker(self, name: str) -> WorkerInfo:
        info = WorkerInfo(name, f"{name}-1", "host", tuple(JobKind), "cpu", 1)
        await self.control.context.workers.register(info)
        return info

    async def problems(self) -> tuple[str, ...]:
        return (await self.control.plane.status()).problems


@pytest.fixture
async def scene(valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    scheduler = LauncherDouble()
    monkeypatch.setattr(launching, "launcher_for", lambda _: scheduler)
    config = settings(
        tmp_path, make_target(tmp_path / "tiny"), launcher={"kind": "ray", "max_workers": 2, "name": "gpu"}
    )
    async with AsyncExitStack() as stack:
        yield Scene(await stack.enter_async_context(leading(valkey, config)), scheduler)


async def test_a_job_that_nobody_could_take_has_a_worker_launched_and_people_see_it(scene: Scene) -> None:
    await scene.look()
    assert scene.scheduler.launches == {}
    await scene.submit()
    await scene.look()
    await scene.look()
    assert list(scene.scheduler.launches) == ["gpu-1.1"]
    assert "--name gpu-1 --kinds train,score,reference --jobs 1 --idle-s 60" in scene.scheduler.commands["gpu-1.1"]
    status = await scene.control.plane.status()
    assert status.launcher is not None
    assert [(launch.id, launch.state) for launch in status.launcher.launches] == [("gpu-1.1", LaunchState.RUNNING)]
    assert status.problems == ()
    [event] = await scene.control.events("worker-launched")
    assert (event.subject, event.message) == ("gpu-1", "asked of ray as gpu-1.1")
    [checks] = [finding.checks for finding in await scene.control.plane.doctor(None) if finding.subject == "workers"]
    assert {check.name: check.outcome for check in checks} == dict.fromkeys(
        ("launcher", "train jobs", "reference jobs"), CheckOutcome.OK
    )


async def test_a_job_that_a_registered_worker_could_take_is_left_to_it(scene: Scene) -> None:
    await scene.worker("host")
    await scene.submit()
    await scene.look()
    assert scene.scheduler.launches == {}


async def test_what_is_not_wanted_any_more_is_withdrawn(scene: Scene) -> None:
    scene.scheduler.room = 0
    job = await scene.submit()
    await scene.look()
    await scene.control.plane.cancel(job, "test")
    await scene.look()
    assert scene.scheduler.launches["gpu-1.1"].state is LaunchState.STOPPED
    assert [event.subject for event in await scene.control.events("launch-withdrawn")] == ["gpu-1.1"]


async def test_a_failed_launch_says_why_and_is_tried_again(scene: Scene) -> None:
    await scene.submit()
    await scene.look()
    scene.scheduler.end("gpu-1.1", LaunchState.FAILED, "tide-worker: not found")
    await scene.look()
    assert list(scene.scheduler.launches) == ["gpu-1.1"]
    assert await scene.problems() == ("launcher: the newest launch failed (1 in a row): tide-worker: not found",)
    [event] = await scene.control.events("launch-failed")
    assert (event.subject, event.message) == ("gpu-1.1", "tide-worker: not found")

    async def again() -> bool:
        await scene.look()
        return "gpu-1.2" in scene.scheduler.launches

    await eventually(again)
    scene.scheduler.end("gpu-1.2", LaunchState.SUCCEEDED)
    await scene.look()
    assert await scene.problems() == ()


async def test_a_refusal_says_why(scene: Scene) -> None:
    scene.scheduler.refuses = "no such partition"
    await scene.submit()
    await scene.look()
    assert await scene.problems() == ("launcher: the newest launch failed (1 in a row): no such partition",)


async def test_a_job_that_needs_more_than_a_launched_worker_has_is_named(scene: Scene) -> None:
    job = await scene.submit(device="cuda")
    await scene.look()
    assert scene.scheduler.launches == {}
    [problem] = await scene.problems()
    assert problem.startswith(f"launcher: job {job} needs more than [launcher] says")


async def test_while_it_is_away_ordinary_workers_take_jobs_and_status_says_why(scene: Scene) -> None:
    scene.scheduler.away = "Ray cannot be reached"
    job = await scene.submit()
    with pytest.raises(Unavailable):
        await scene.look()
    async with anyio.create_task_group() as group:
        group.start_soon(scene.launching.run)
        await eventually(lambda: scene.launching.status)
        assert await scene.problems() == (
            "launcher: Ray cannot be reached; jobs wait for a worker that registers by itself",
        )
        await scene.worker("host")
        claim = await scene.control.context.jobs.claim("host", [JobKind.TRAIN])
        assert claim is not None
        assert claim.job.id == job
        group.cancel_scope.cancel()
    assert scene.scheduler.closed


async def nothing_yet() -> dict[str, Launch]:
    return {}


async def test_a_new_leader_and_an_old_one_ask_for_nothing_twice(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that acts on what it saw before the other acted."""
    scene.scheduler.room = 0
    await scene.submit()
    await scene.look()
    await Launching(scene.control.context).look()
    monkeypatch.setattr(scene.scheduler, "states", nothing_yet)
    await Launching(scene.control.context).look()
    assert list(scene.scheduler.launches) == ["gpu-1.1"]


async def test_a_leader_that_dies_before_it_has_asked_is_made_up_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.submit()
    with monkeypatch.context() as patch:
        hit = cut_at(patch, "launching.submitting")
        with pytest.raises(Unavailable):
            await scene.look()
        assert hit
    await Launching(scene.control.context).look()
    assert list(scene.scheduler.launches) == ["gpu-1.1"]


async def test_in_standby_it_asks_for_nothing(scene: Scene) -> None:
    await scene.submit()
    await scene.control.lease.release()
    with pytest.raises(Unavailable):
        await scene.look()
    assert scene.scheduler.launches == {}


async def test_a_cordoned_slot_stays_empty(scene: Scene) -> None:
    await scene.worker("gpu-1")
    await scene.control.plane.cordon("gpu-1", False, "test")
    await scene.submit()
    await scene.look()
    assert list(scene.scheduler.launches) == ["gpu-2.1"]


def test_the_command_is_the_sites_with_what_makes_it_a_launched_worker(tmp_path: Path) -> None:
    values: dict[str, object] = {
        "command": "srun tide-worker",
        "device": "cuda",
        "devices": 4,
        "memory_bytes": 1024,
        "idle_s": 5,
    }
    config = settings(tmp_path, tmp_path, launcher=values).launcher
    assert command(config, "launched-1") == (
        "srun tide-worker --name launched-1 --kinds train,score,reference --jobs 1 --idle-s 5 "
        "--device cuda --devices 4 --memory-bytes 1024"
    )
