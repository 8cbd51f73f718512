"""Two daemons on one Redis: one sleeps in the middle of a commit, or they lose Redis in turn. One leads, and only one is heard."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from bench.configs import write_config
from tests.conftest import Valkey
from tests.control import store_samples
from tests.daemon_run import TidedProcess, tided
from tests.engine_double import describe_double, running_double
from tests.proxy import proxied
from tests.support import eventually
from tests.test_daemon_failpoints import ENGINE, converged, work
from tided.api.client import Client
from tided.config import Config
from tided.model.status import Status
from tided.store.client import connect
from tided.store.engines import EngineStore
from tided.store.jobs import JobStore
from tided.wire.control import Swap

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
LEASE_S = 3.0
ROUNDS = 2


def configure(root: Path, name: str, url: str, **sections: dict[str, Any]) -> Config:
    """A daemon whose drafts and samples are those of all daemons below `root`."""
    (root / name).mkdir()
    for shared in ("drafts", "samples"):
        (root / shared).mkdir(exist_ok=True)
        (root / name / shared).symlink_to(root / shared)
    daemon = {
        "name": name,
        "state_dir": str(root / name),
        "cycle_s": 0.1,
        "lease_ttl_s": LEASE_S,
        "start_collector": False,
    }
    return write_config(root / f"{name}.toml", {"redis": {"url": url}, "daemon": daemon, **sections}, None)


async def stopped(daemon: TidedProcess) -> None:
    """Wait until it has stopped itself at its failpoint."""

    def look() -> bool:
        assert daemon.process.returncode is None, daemon.log.read_text()
        return Path(f"/proc/{daemon.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"

    await eventually(look, timeout_s=120)


@pytest.mark.parametrize("failpoint", ["dispatcher.submitting", "deployer.sending"])
async def test_a_commit_that_slept_past_its_lease_is_refused(
    failpoint: str, valkey: Valkey, tmp_path: Path, target: Path, first: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "target": {"path": str(target)},
        "self_test": {"enabled": False},
        "training": {"min_rows": 200, "cool_down_s": 0, "draft_vocab": 64},
        "gate": {"min_requests": 4, "min_tokens": 20},
        "deployment": {"swap_deadline_s": 120.0, "watch_requests": 3, "watch_s": 120.0},
    }
    configs = {name: configure(tmp_path, name, valkey.url, **sections) for name in ("a", "b")}
    store_samples(configs["a"], target, ENGINE, train=20, held_out=10, created_ms=1_000)
    client = Client(configs["b"].daemon.socket_path, timeout_s=60)
    stop = asyncio.Event()
    worker = asyncio.create_task(work(valkey.url, first, tmp_path, stop))
    async with running_double(valkey, describe_double(target, first)) as engine:

        async def traffic() -> None:
            while not stop.is_set():
                await engine.report(alpha=0.6, requests=2)
                await asyncio.sleep(0.1)

        serving = asyncio.create_task(traffic())
        try:
            sleeper = {"TIDED_FAILPOINT": f"{failpoint}:pause"}
            async with tided(tmp_path / "a.toml", tmp_path, "a", sleeper) as asleep:
                await stopped(asleep)
                async with tided(tmp_path / "b.toml", tmp_path, "b") as awake:
                    await awake.ready()
                    await eventually(lambda: converged(client), timeout_s=120)
                    asleep.process.send_signal(signal.SIGCONT)
                    await asleep.status("standby")
                    status = await eventually(lambda: converged(client), timeout_s=120)
                    assert (await asyncio.to_thread(client.status)).leader
                    assert [await asleep.stop(), await awake.stop()] == [0, 0]
        finally:
            stop.set()
            await asyncio.gather(serving, worker)
        served = engine.info.version
        taken = [command for command in engine.commands if isinstance(command.body, Swap)]
    redis = connect(valkey.url)
    jobs = await JobStore(redis).list(50)
    replies, _ = await EngineStore(redis).replies(ENGINE, "0", 1000)
    await redis.aclose()
    obeyed = {reply.command for reply in replies if reply.ok}
    epochs = [command.epoch for command in taken if command.id in obeyed]
    assert epochs == sorted(epochs)
    assert status.info.version == served
    assert len(jobs) == status.training.trainings == 1
    assert status.draft == "tiny@1"


async def test_two_daemons_that_lose_each_other_never_lead_at_once(
    valkey: Valkey, tmp_path: Path, short_dir: Path
) -> None:
    names = ("a", "b")
    for name in names:
        (short_dir / name).mkdir()
    with proxied(short_dir / "a", valkey.url) as one, proxied(short_dir / "b", valkey.url) as two:
        proxies = dict(zip(names, (one, two), strict=True))
        configs = {name: configure(tmp_path, name, proxies[name].url) for name in names}
        clients = {name: Client(configs[name].daemon.socket_path) for name in names}
        seen: list[str] = []
        done = asyncio.Event()

        async def status(name: str) -> Status:
            return await asyncio.to_thread(clients[name].status)

        async def watch() -> None:
            """Whoever leads before and after the other was asked led all the time: the other must not have said so too."""
            while not done.is_set():
                before, other, after = await status("a"), await status("b"), await status("a")
                if before.leader and after.leader and before.epoch == after.epoch and other.leader:
                    seen.append(f"a under {after.epoch} and b under {other.epoch}")

        async def leads(name: str) -> bool:
            return (await status(name)).leader

        async with (
            tided(tmp_path / "a.toml", tmp_path, "a") as a,
            tided(tmp_path / "b.toml", tmp_path, "b") as b,
        ):
            await a.ready()
            await b.ready()
            watching = asyncio.create_task(watch())
            epochs: list[int] = []
            for _ in range(ROUNDS):
                for name, other in (names, names[::-1]):
                    proxies[other].mode = "swallow"  # and that other, if it led, finds out by itself
                    await eventually(lambda name=name: leads(name))
                    epochs.append((await status(name)).epoch)
                    proxies[other].mode = "forward"
                    proxies[other].cut()
            done.set()
            await watching
            assert [await a.stop(), await b.stop()] == [0, 0]
    assert seen == []
    assert epochs == sorted(set(epochs))
