"""`make run`: the whole stack in the foreground, one request, Ctrl-C, and nothing left."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.support import eventually
from tests.test_daemon_process import open_to_others
from tests.tiny import make_target

pytestmark = pytest.mark.real


def _processes_with(text: str) -> list[int]:
    """Live processes whose command line holds `text`."""
    found: list[int] = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found


async def test_it_serves_until_ctrl_c_and_leaves_nothing(tmp_path: Path, short_dir: Path) -> None:
    state_dir = short_dir / "state"
    changes = {
        "daemon": {"state_dir": str(state_dir)},
        "target": {"path": str(make_target(tmp_path / "model"))},
        "engine": {"port": free_port(), "dtype": "float32", "max_context": 128},
    }
    config = write_config(tmp_path / "config.toml", changes)
    command = [sys.executable, "-m", "tided.local", "--config", str(tmp_path / "config.toml")]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    output = ""
    try:
        async with asyncio.timeout(300):
            while "Ctrl-C stops everything" not in output:
                line = (await process.stdout.readline()).decode()
                assert line, output
                output += line
        url = re.search(r"Serving on (\S+)", output)
        assert url is not None
        async with httpx.AsyncClient(base_url=url[1], timeout=180) as http:
            answer = await http.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            )
        assert answer.json()["usage"]["completion_tokens"] <= 5
        assert _processes_with(str(short_dir))
        assert open_to_others(state_dir) == []
        process.send_signal(signal.SIGINT)
        rest, _ = await asyncio.wait_for(process.communicate(), 180)
        assert process.returncode == 0, rest.decode()
        assert b"Traceback" not in rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    await eventually(lambda: not _processes_with(str(short_dir)) and not _processes_with(str(tmp_path)))
    assert config.daemon.state_dir == state_dir


async def test_a_missing_model_is_one_clear_error(tmp_path: Path, short_dir: Path) -> None:
    changes = {"daemon": {"state_dir": str(short_dir)}, "target": {"path": str(tmp_path / "nowhere")}}
    write_config(tmp_path / "config.toml", {**changes, "engine": {"port": free_port()}})
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tided.local",
        "--config",
        str(tmp_path / "config.toml"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 1
    assert b"is not a checkpoint directory" in errors
    assert b"Traceback" not in errors
