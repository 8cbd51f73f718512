"""LocalStack with small programs: readiness, cores, failures and that nothing is left behind."""

import asyncio
import os
import textwrap
from pathlib import Path

import pytest

from tests.support import eventually
from tided.local import LocalStack, Service
from tided.model.errors import Unavailable

READY = """
    import os, signal, socket, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("child", "w").write(str(child.pid))
    open("cores", "w").write(str(sorted(os.sched_getaffinity(0))))
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.sendto(b"STATUS=loading", os.environ["NOTIFY_SOCKET"])
    sender.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    time.sleep(60)
"""
ENDS = "print('error: no such model'); raise SystemExit(3)"
CHILD_SPEAKS = """
    import subprocess, sys, time
    subprocess.run([sys.executable, "-c", "from tided.wire.notify import notify; notify('READY=1')"])
    time.sleep(60)
"""


def _program(directory: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> Service:
    (directory / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(directory)
    root = str(Path(__file__).parent.parent)
    return Service(name, name, cores=frozenset({min(os.sched_getaffinity(0))}), environment={"PYTHONPATH": root})


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_start_waits_for_ready_and_stop_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = _program(tmp_path, "prog_ready", READY, monkeypatch)
    said: list[str] = []
    async with LocalStack(tmp_path / "logs", said.append) as stack:
        running = await stack.start(service)
        child = int((tmp_path / "child").read_text())
        assert _alive(running.pid)
        assert _alive(child)
        assert (tmp_path / "cores").read_text() == str(sorted(service.cores or ()))
    assert "prog_ready: loading" in said
    await eventually(lambda: not _alive(running.pid) and not _alive(child))


async def test_everything_stops_when_the_body_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = _program(tmp_path, "prog_cancelled", READY, monkeypatch)
    started: asyncio.Queue[int] = asyncio.Queue()

    async def body() -> None:
        async with LocalStack(tmp_path / "logs") as stack:
            started.put_nowait((await stack.start(service)).pid)
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    pid = await started.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _alive(pid)


async def test_a_program_that_ends_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = _program(tmp_path, "prog_ends", ENDS, monkeypatch)
    async with LocalStack(tmp_path / "logs") as stack:
        with pytest.raises(Unavailable, match=r"ended with status 3(.|\n)*error: no such model"):
            await stack.start(service)


async def test_a_child_cannot_say_ready_for_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = _program(tmp_path, "prog_child", CHILD_SPEAKS, monkeypatch)
    impatient = Service(service.name, service.module, ready_s=1.0, environment=service.environment)
    async with LocalStack(tmp_path / "logs") as stack:
        with pytest.raises(Unavailable, match="was not ready within 1 s"):
            await stack.start(impatient)


async def test_ended_names_the_service_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = _program(tmp_path, "prog_killed", READY, monkeypatch)
    async with LocalStack(tmp_path / "logs") as stack:
        running = await stack.start(service)
        running.process.kill()
        assert "prog_killed ended with status -9" in await stack.ended()
