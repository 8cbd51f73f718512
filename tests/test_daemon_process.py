"""tided as a process: start, budgets, children, reload, signals, Redis coming and going, wrong configurations."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.configs import write_config
from tests.conftest import Valkey
from tests.daemon_run import alive, children, tided
from tests.support import eventually
from tided.api.client import Client
from tided.model.policy import PolicySetting
from tided.model.status import Status
from tided.store.valkey import find_binary

pytestmark = pytest.mark.real
IDLE_CYCLES = 12


def configure(root: Path, **sections: dict[str, Any]) -> Path:
    daemon = {"state_dir": str(root / "s"), "cycle_s": 0.2, "lease_ttl_s": 15.0, **sections.pop("daemon", {})}
    write_config(root / "config.toml", {"daemon": daemon, "target": {"path": str(root / "none")}, **sections}, None)
    return root / "config.toml"


async def two_children(pid: int) -> list[int]:
    """Valkey and a collector, once both run."""

    def both() -> list[int]:
        found = children(pid)
        return found if len(found) == 2 else []

    return await eventually(both)


def open_to_others(directory: Path) -> list[Path]:
    """What of the directory, itself included, anybody but its owner could read."""
    return [path for path in (directory, *directory.rglob("*")) if path.lstat().st_mode & 0o077]


async def test_it_starts_everything_and_leaves_nothing(tmp_path: Path) -> None:
    config = configure(tmp_path)
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()
        await daemon.status("leading")
        family = await two_children(daemon.pid)
        assert (await asyncio.to_thread(Client(tmp_path / "s" / "tided.sock").status)).leader
        assert open_to_others(tmp_path / "s") == []
        assert await daemon.stop() == 0
        assert "STOPPING=1" in daemon.heard()
    await eventually(lambda: not any(map(alive, family)))
    assert not (tmp_path / "s" / "tided.sock").exists()


async def test_kill_9_leaves_valkey_to_be_adopted_and_ends_the_collector(tmp_path: Path) -> None:
    config = configure(tmp_path, daemon={"lease_ttl_s": 3.0})
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()
        family = await two_children(daemon.pid)
        await daemon.stop(signal.SIGKILL)
    [valkey] = await eventually(lambda: [pid for pid in family if alive(pid)] if sum(map(alive, family)) == 1 else None)
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()
        await daemon.status("leading")
        assert '"adopted": true' in daemon.log.read_text()
        assert alive(valkey)
        assert await daemon.stop() == 0
    await eventually(lambda: not alive(valkey))


async def test_the_embedded_valkey_is_started_again_when_it_dies(tmp_path: Path) -> None:
    config = configure(tmp_path, daemon={"start_collector": False})
    client = Client(tmp_path / "s" / "tided.sock")
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()
        await daemon.status("leading")
        await asyncio.to_thread(client.post, "/v1/policy", {"mode": "off"})
        [valkey] = children(daemon.pid)
        log = tmp_path / "s" / "valkey" / "appendonlydir"
        await eventually(lambda: any(b":policy" in file.read_bytes() for file in log.glob("*.aof")))
        os.kill(valkey, signal.SIGKILL)
        await eventually(lambda: [pid for pid in children(daemon.pid) if pid != valkey])

        async def back() -> Status | None:
            status = await asyncio.to_thread(client.status)
            return status if status.leader and status.redis == "connected" else None

        # The operator's setting came back from the append-only file.
        assert (await eventually(back)).policy.mode.value == "off"
        assert await daemon.stop() == 0


async def test_redis_absent_at_start_is_degraded_and_not_a_crash(tmp_path: Path, tmp_path_factory: Any) -> None:
    sock = Path("/tmp") / f"tided-absent-{os.getpid()}.sock"
    config = configure(tmp_path, redis={"url": f"unix://{sock}"}, daemon={"start_collector": False})
    client = Client(tmp_path / "s" / "tided.sock")
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()
        await daemon.status("degraded")
        status = await asyncio.to_thread(client.status)
        assert not status.leader
        assert "cannot be reached" in status.redis
        assert status.policy == PolicySetting()
        server = subprocess.Popen([str(find_binary()), "--port", "0", "--unixsocket", str(sock), "--save", ""])
        try:
            await daemon.status("leading")
            server.kill()
            server.wait()
            await daemon.status("degraded")
            assert daemon.process.returncode is None
            assert await daemon.stop() == 0
        finally:
            server.kill()
            server.wait()
            sock.unlink(missing_ok=True)


async def test_the_holder_that_sleeps_past_its_lease_is_superseded(valkey: Valkey, tmp_path: Path) -> None:
    common: dict[str, Any] = {"redis": {"url": valkey.url}}
    first = configure(tmp_path / "a", **common, daemon={"name": "first", "start_collector": False, "lease_ttl_s": 5.0})
    second = configure(
        tmp_path / "b", **common, daemon={"name": "second", "start_collector": False, "lease_ttl_s": 5.0}
    )
    async with tided(first, tmp_path, "first") as holder:
        await holder.ready()
        await holder.status("leading")
        async with tided(second, tmp_path, "second") as other:
            await other.ready()
            await other.status("standby")
            holder.process.send_signal(signal.SIGSTOP)
            await other.status("leading")
            epoch = int(valkey.client.get("tided:{ctl}:epoch") or 0)  # pyright: ignore[reportArgumentType]
            holder.process.send_signal(signal.SIGCONT)
            await holder.status("standby")
            status = await asyncio.to_thread(Client(tmp_path / "a" / "s" / "tided.sock").status)
            assert not status.leader
            # It has written nothing since, and the other leads on under its own epoch.
            assert int(valkey.client.get("tided:{ctl}:epoch") or 0) == epoch  # pyright: ignore[reportArgumentType]
            assert (await asyncio.to_thread(Client(tmp_path / "b" / "s" / "tided.sock").status)).epoch == epoch
            assert await other.stop() == 0
            # The lease was given up, so the first takes over at once, under a higher epoch.
            await holder.status("leading")
            assert int(valkey.client.get("tided:{ctl}:epoch") or 0) > epoch  # pyright: ignore[reportArgumentType]
            assert await holder.stop() == 0


async def test_reload_is_all_or_nothing(tmp_path: Path) -> None:
    config = configure(tmp_path, daemon={"start_collector": False})
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()

        async def reload(text: str, **sections: dict[str, Any]) -> None:
            configure(tmp_path, **sections, daemon={"start_collector": False})
            await told(text)

        async def told(text: str) -> None:
            """Other lines may follow: what counts is that this one came after the signal."""
            before = len(daemon.log.read_text())
            daemon.process.send_signal(signal.SIGHUP)
            await eventually(lambda: text in daemon.log.read_text()[before:])

        await reload("config-reloaded", speculation={"margin": 0.1})
        await reload("[engine] cannot change while tided runs", engine={"port": 1234}, speculation={"margin": 0.2})
        (tmp_path / "config.toml").write_text("[speculation]\nmargin = -1\n")
        await told("speculation.margin")
        assert await daemon.stop() == 0


async def test_a_second_tided_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    config = configure(tmp_path, daemon={"start_collector": False})
    async with tided(config, tmp_path) as daemon:
        await daemon.ready()
        code, output = await asyncio.to_thread(run, "--config", str(config))
        assert code == 2
        assert "another tided runs on" in output
        await daemon.status("leading")
        assert await daemon.stop() == 0


async def test_the_watchdog_is_fed_while_cycles_go_on(tmp_path: Path) -> None:
    config = configure(tmp_path, daemon={"start_collector": False})
    async with tided(config, tmp_path, environment={"WATCHDOG_USEC": "400000"}) as daemon:
        await daemon.ready()
        await eventually(lambda: daemon.heard().count("WATCHDOG=1") >= 3)
        assert await daemon.stop() == 0


async def test_it_is_small_and_idle(tmp_path: Path) -> None:
    """bench/ measures the promise of 1.5 s to READY, 120 MB and 2%; here idling is compared with starting, on any machine."""
    config = configure(tmp_path)
    # Its watchdog is fed once a cycle at most: that counts cycles, for as long as they take here.
    async with tided(config, tmp_path, environment={"WATCHDOG_USEC": "400000"}) as daemon:
        await daemon.ready()
        await daemon.status("leading")
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        rss_kb = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        assert rss_kb < 120_000
        starting = cpu_s(daemon.pid)
        fed = daemon.heard().count("WATCHDOG=1")
        await eventually(lambda: daemon.heard().count("WATCHDOG=1") >= fed + IDLE_CYCLES)
        assert cpu_s(daemon.pid) - starting < starting / 2
        assert await daemon.stop() == 0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tided.daemon", *arguments], capture_output=True, text=True, timeout=180, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_check_prints_what_is_in_force() -> None:
    code, output = run("--check", "--config", "config.toml")
    assert code == 0
    assert json.loads(output)["training"]["min_rows"] > 0


def test_check_names_every_problem_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[speculation]\nmargn = 0.1\ngamma_max = "four"\n[daemon]\nlease_ttl_s = -1\n')
    code, output = run("--check", "--config", str(path))
    assert code == 2
    lines = output.splitlines()
    assert len(lines) == 3
    assert any("did you mean 'margin'" in line for line in lines)
    assert "Traceback" not in output
    assert run("--config", str(tmp_path / "missing.toml"))[0] == 2


def test_no_torch_and_no_engine_is_ever_imported() -> None:
    code = (
        "import sys, tided.daemon, tided.services.collector, tided.ctl.main; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
