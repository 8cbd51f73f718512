"""tidectl against the real daemon, with its real Valkey and collector; no engine is connected."""

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.ctl_run import Outcome, tidectl
from tests.support import eventually
from tests.tiny import make_target
from tided.config import Config
from tided.local import LocalStack, Service

pytestmark = pytest.mark.real

ACTOR = f"uid:{os.getuid()}"


@dataclass(frozen=True)
class Running:
    config_file: Path
    config: Config
    stack: LocalStack

    async def ctl(self, *arguments: str) -> Outcome:
        return await asyncio.to_thread(tidectl, "--config", str(self.config_file), *arguments)

    async def audit(self) -> list[tuple[str, str]]:
        """(action, result) of every audited change, oldest first."""
        lines = (await self.ctl("events", "--json", "--limit", "1000")).out.splitlines()
        events = [json.loads(line) for line in lines]
        records = [event["data"] for event in events if event["kind"] == "audit"]
        assert all(record["actor"] == ACTOR for record in records)
        return [(record["action"], record["result"]) for record in records]


@pytest.fixture
async def tided(tmp_path: Path) -> AsyncIterator[Running]:
    target = make_target(tmp_path / "tiny")
    config_file = tmp_path / "config.toml"
    config = write_config(
        config_file,
        {
            "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.1, "lease_ttl_s": 30.0, "http_port": free_port()},
            "target": {"path": str(target)},
            "training": {"draft_vocab": 64},
        },
    )
    async with LocalStack(tmp_path / "logs") as stack:
        await stack.start(Service("tided", "tided.daemon", ("--config", str(config_file)), ready_s=180))
        yield Running(config_file, config, stack)


async def leading(tided: Running) -> None:
    async def leads() -> bool:
        outcome = await tided.ctl("status", "--json")
        assert outcome.code == 0, outcome
        return json.loads(outcome.out)["leader"]

    await eventually(leads, poll_s=0.05)


async def test_every_change_is_done_and_audited_once(tided: Running, tmp_path: Path) -> None:
    await leading(tided)
    socket = tided.config.daemon.socket_path
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert (await tided.ctl("policy", "set", "gamma=2")).code == 0
    assert json.loads((await tided.ctl("policy", "show", "--json")).out) == {"mode": "fixed", "gamma": 2}
    assert (await tided.ctl("policy", "set", "gamma=99")).code == 1
    made = await tided.ctl("drafts", "init", str(tmp_path / "tiny"), "--name", "first", "--json")
    version = json.loads(made.out)["version"]
    for reference in ("first@0", version, version[:8]):
        shown = await tided.ctl("drafts", "show", reference, "--json")
        assert json.loads(shown.out)["version"] == version
    refused = {
        ("drafts", "show", "first@7"): None,
        ("drafts", "deploy", "first@0"): "deploy",
        ("drafts", "rollback", "local"): "rollback",
        ("train", "now"): "train",
        ("jobs", "cancel", "job-1"): "cancel",
        ("drafts", "init", str(tmp_path / "nothing"), "--name", "x"): "init-draft",
    }
    for command in refused:
        outcome = await tided.ctl(*command)
        assert (outcome.code, outcome.out) == (1, ""), (command, outcome)
        assert outcome.err.startswith("tidectl: ")
        assert len(outcome.err.splitlines()) == 1
    assert (await tided.ctl("purge", "--yes")).code == 0
    audit = await tided.audit()
    done = [action for action, result in audit if result == "done"]
    assert done == ["set-policy", "init-draft", "purge"]
    assert [action for action, result in audit if result != "done"] == [
        "set-policy",
        *(action for action in refused.values() if action),
    ]


async def test_the_tcp_listener_shows_and_changes_nothing(tided: Running) -> None:
    await leading(tided)
    base = f"http://127.0.0.1:{tided.config.daemon.http_port}"
    async with httpx.AsyncClient(base_url=base) as client:
        assert (await client.get("/v1/status")).json()["redis"] == "connected"
        assert "tided_leader 1.0" in (await client.get("/metrics")).text
        assert (await client.post("/v1/policy", json={"mode": "off"})).status_code == 405
        assert (await client.get("/v1/events")).status_code == 403
    assert await tided.audit() == []


async def test_a_second_daemon_is_refused_and_the_first_goes_on(tided: Running) -> None:
    await leading(tided)
    command = [sys.executable, "-m", "tided.daemon", "--config", str(tided.config_file)]
    second = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=180, check=False)
    assert second.returncode == 2
    assert "another tided" in second.stderr
    assert "Traceback" not in second.stderr
    assert (await tided.ctl("status")).code == 0
    await tided.stack.stop("tided")
    gone = await tided.ctl("status")
    assert gone.code == 3
    assert "not running" in gone.err
