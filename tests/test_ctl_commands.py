"""tidectl against a running API: every command, JSON, exit codes, width, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import typer

from tests.api_server import running
from tests.ctl_run import Outcome, tidectl, tidectl_at
from tests.fake_plane import DIGESTS, FAULTS, JOB
from tests.support import eventually
from tided.config import Config
from tided.ctl.locate import LOCAL_SOCKET, SYSTEM_SOCKET, socket_path
from tided.ctl.main import app, exit_code
from tided.model.errors import ConfigError, TideError
from tided.model.launch import LaunchState
from tided.model.policy import SpeculationMode
from tided.model.status import LauncherStatus, LaunchStatus

ACTOR = f"uid:{os.getuid()}"
QUERIES = {
    ("status",): "/v1/status",
    ("engines",): "/v1/engines",
    ("workers", "list"): "/v1/workers",
    ("pool",): "/v1/pools",
    ("drafts", "list"): "/v1/drafts",
    ("drafts", "show", "smollm2@1"): "/v1/drafts/smollm2%401",
    ("jobs", "list"): "/v1/jobs",
    ("jobs", "list", "--state", "failed"): "/v1/jobs?state=failed",
    ("jobs", "show", JOB.id): f"/v1/jobs/{JOB.id}",
    ("policy", "show"): "/v1/policy",
    ("policy", "explain"): "/v1/policy/decisions",
    ("policy", "explain", "local"): "/v1/policy/decisions?engine=local",
    ("doctor",): "/v1/doctor",
}
CHANGES = {
    ("drafts", "deploy", "smollm2@1", "--engine", "local"): ("deploy", "smollm2@1", "local", ACTOR),
    ("drafts", "deploy", DIGESTS[0][:12]): ("deploy", DIGESTS[0][:12], None, ACTOR),
    ("drafts", "rollback", "local"): ("rollback", "local", ACTOR),
    ("drafts", "init", "/models/SmolLM2", "--name", "first"): ("init_draft", "/models/SmolLM2", "first", ACTOR),
    ("drafts", "init", "/models/SmolLM2"): ("init_draft", "/models/SmolLM2", "smollm2", ACTOR),
    ("jobs", "cancel", JOB.id): ("cancel", JOB.id, ACTOR),
    ("jobs", "retry", JOB.id): ("retry", JOB.id, ACTOR),
    ("workers", "cordon", "w1"): ("cordon", "w1", False, ACTOR),
    ("workers", "drain", "w1"): ("cordon", "w1", True, ACTOR),
    ("workers", "uncordon", "w1"): ("uncordon", "w1", ACTOR),
    ("policy", "set", "auto"): ("set_policy", SpeculationMode.AUTO, 0, ACTOR),
    ("policy", "set", "off"): ("set_policy", SpeculationMode.OFF, 0, ACTOR),
    ("policy", "set", "gamma=2"): ("set_policy", SpeculationMode.FIXED, 2, ACTOR),
    ("train", "now"): ("train_now", None, ACTOR),
    ("train", "now", "--engine", "local"): ("train_now", "local", ACTOR),
    ("purge", "--yes"): ("purge", None, ACTOR),
    ("purge", "--yes", "--engine", "local"): ("purge", "local", ACTOR),
}


async def test_every_query_prints_a_table_or_the_answer_as_it_is() -> None:
    async with running() as api:
        for command, path in QUERIES.items():
            human = await tidectl_at(api.socket, *command)
            assert (human.code, human.err) == (0, ""), command
            assert human.out.strip()
            assert max(len(line) for line in human.out.splitlines()) <= 80, human.out
            machine = await tidectl_at(api.socket, *command, "--json")
            assert json.loads(machine.out) == await anyio.to_thread.run_sync(api.client.get, path)


async def test_every_change_reaches_the_control_plane_once() -> None:
    async with running() as api:
        for command, call in CHANGES.items():
            api.plane.calls.clear()
            human = await tidectl_at(api.socket, *command)
            assert (human.code, human.err) == (0, ""), human
            assert human.out.strip()
            assert api.plane.calls == [call]
            machine = await tidectl_at(api.socket, *command, "--json")
            assert json.loads(machine.out)


async def test_status_says_what_and_why() -> None:
    async with running() as api:
        api.plane.problems = ("engine local taps nothing: set capture on",)
        out = (await tidectl_at(api.socket, "status")).out
        for part in (
            "tided 0.1.0 leads (epoch 1700000000000), up 2 h 3 min, Redis connected",
            "speculating with 3 tokens at batch 1-2, off above: predicted 1.31x",
            "alpha 0.62 pays up to batch 2",
            "smollm2@1",
            "collecting, 12,000 of 20,000 rows",
            "1,000 tapped = 900 stored",
            "43%, 1 min 20 s left",
            "PROBLEM",
        ):
            assert part in out, out
        api.plane.workers_now, api.plane.engines_now = (), ()
        out = (await tidectl_at(api.socket, "status")).out
        assert "no engine is connected" in out
        assert "nothing can be trained" in out
        api.plane.launcher = LauncherStatus("ray", "", (LaunchStatus("launched-1.4", LaunchState.PENDING, "no GPU"),))
        out = (await tidectl_at(api.socket, "status")).out
        assert "launched-1.4: pending: no GPU" in out
        assert "one is asked of ray when a job waits" in out


async def test_policy_explain_shows_the_figures() -> None:
    async with running() as api:
        out = (await tidectl_at(api.socket, "policy", "explain", "local")).out
        for part in (
            "engine local: threshold, 2 running",
            "3 tokens at batch 1-2, off above",
            "is predicted to give 1.12x",
            "by position 0.700, 0.600, 0.500",
            "alpha, newest steps",
            "1.41*",
        ):
            assert part in out, out
        other = await tidectl_at(api.socket, "policy", "explain", "other")
        assert (other.code, other.err) == (1, "tidectl: there is no engine 'other'\n")


async def test_drafts_list_marks_what_is_served() -> None:
    async with running() as api:
        lines = (await tidectl_at(api.socket, "drafts", "list")).out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["smollm2@0", "smollm2@1"]
        assert "served by local" in lines[2]
        assert "served" not in lines[1]


async def test_events_once_and_followed() -> None:
    async with running() as api:
        assert (await tidectl_at(api.socket, "events")).out == ""
        for number in range(3):
            api.plane.happened("swapped", f"number {number}")
        shown = (await tidectl_at(api.socket, "events", "--limit", "2")).out
        assert [line.rpartition("  ")[2] for line in shown.splitlines()] == ["number 1", "number 2"]
        command = [sys.executable, "-m", "tided.ctl.main", "--socket", str(api.socket), "events", "--follow", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
            assert follower.stdout is not None
            lines = follower.stdout
            try:
                first = [json.loads(await anyio.to_thread.run_sync(lines.readline)) for _ in range(3)]
                api.plane.happened("swapped", "number 3")
                last = json.loads(await anyio.to_thread.run_sync(lines.readline))
            finally:
                follower.terminate()
        assert [event["message"] for event in [*first, last]] == [f"number {n}" for n in range(4)]


async def test_purge_asks_first() -> None:
    async with running() as api:
        refused = await tidectl_at(api.socket, "purge", stdin="n\n")
        assert (refused.code, api.plane.calls) == (1, [])
        await tidectl_at(api.socket, "purge", stdin="y\n")
        assert api.plane.calls == [("purge", None, ACTOR)]


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_exit_codes(kind: type[TideError]) -> None:
    assert exit_code(kind("x")) == FAULTS[kind][2]
    assert exit_code(ConfigError("x")) == 2


async def test_errors_are_one_line() -> None:
    async with running() as api:
        outcome = await tidectl_at(api.socket, "jobs", "show", "nothing")
        assert outcome == Outcome(1, "", "tidectl: there is no job 'nothing'\n")
        outcome = await tidectl_at(api.socket, "policy", "set", "gamma=9")
        assert (outcome.code, outcome.out) == (1, "")
        assert "above what the engine can draft" in outcome.err


@pytest.mark.parametrize("mode", ["fast", "gamma=", "gamma=-1", "gamma=x", "fixed"])
def test_a_wrong_policy_is_wrong_usage(mode: str) -> None:
    outcome = tidectl("--socket", "/nonexistent/socket", "policy", "set", mode)
    assert outcome.code == 2
    assert "auto, off or gamma=N" in outcome.err


def test_no_daemon_is_unavailable(tmp_path: Path) -> None:
    outcome = tidectl("--socket", str(tmp_path / "none.sock"), "status")
    assert outcome.code == 3
    assert outcome.err.startswith("tidectl: tided is not running, or its socket is elsewhere: ")


def test_config_check(tmp_path: Path) -> None:
    assert tidectl("config", "check", "config.toml") == Outcome(0, "config.toml: ok\n", "")
    bad = tmp_path / "bad.toml"
    bad.write_text("[engine]\nmax_bach = 3\n")
    outcome = tidectl("config", "check", str(bad))
    assert outcome.code == 2
    assert "max_batch" in outcome.err
    assert "Traceback" not in outcome.err


def test_where_the_socket_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config().daemon.socket_path == LOCAL_SOCKET
    assert Config().daemon.socket_path != SYSTEM_SOCKET
    config = tmp_path / "config.toml"
    config.write_text('[daemon]\nstate_dir = "/srv/tided"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIDED_SOCKET", raising=False)
    assert socket_path(None, None) == LOCAL_SOCKET
    monkeypatch.setenv("TIDED_SOCKET", "/run/other.sock")
    assert socket_path(None, None) == Path("/run/other.sock")
    assert socket_path(None, config) == Path("/srv/tided/tided.sock")
    assert socket_path(Path("x.sock"), config) == Path("x.sock")


def test_every_command_has_help() -> None:
    commands = [command for name in command_names() for command in [name.split()]]
    assert len(commands) >= 17
    for command in commands:
        outcome = tidectl(*command, "--help")
        assert outcome.code == 0
        assert len(outcome.out.splitlines()) > 4


def command_names() -> list[str]:
    """Every command of tidectl, groups resolved: "status", "drafts list", ..."""
    root = typer.main.get_command(app)
    found: list[str] = []
    for name, command in getattr(root, "commands", {}).items():
        below = getattr(command, "commands", None)
        found += [f"{name} {inner}" for inner in below] if below else [name]
    return found


async def test_status_is_quick_enough() -> None:
    """bench/ measures the budget of 400 ms; here CPU time is compared with that of starting typer alone, on any machine."""
    async with running() as api:
        status = ["-m", "tided.ctl.main", "--socket", str(api.socket), "status"]

        def cpu_s(arguments: list[str]) -> float:
            before = os.times()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = os.times()
            return after.children_user + after.children_system - before.children_user - before.children_system

        async def quick() -> bool:
            bare, whole = [
                await anyio.to_thread.run_sync(cpu_s, run) for run in (["-c", "import typer.rich_utils"], status)
            ]
            return whole <= 3 * bare

        await eventually(quick)
