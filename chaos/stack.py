"""The processes that faults befall: a whole tided on one host, each process with a proxy between it and Valkey, and kept as systemd would.

clients -> engine one, two ----+
           tided-a, tided-b ---+-- a proxy each -- Valkey (append-only file, as the embedded one)
           collector ----------+
           worker-a, worker-b -+
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from bench.configs import free_port, write_config
from chaos.plan import DAEMONS, ENGINES, SERVICES, TRAINER, VALKEY, WORKERS
from tests.daemon_run import children
from tests.loop import make_cyclic_target, sections
from tests.proxy import Proxy
from tided.api.client import Client
from tided.config import Config
from tided.local import LocalStack, Service
from tided.model.errors import Unavailable
from tided.services.processes import keep_valkey

LEASE_S = 5.0
CYCLE_S = 0.25
RESTART_S = 1.0
"""Between the end of a process and its next start; the units say 2."""
READY_S = 240.0
UNIT_STOP_S: Mapping[str, float] = {"tided": 30.0, "collector": 30.0, "worker": 60.0}
"""TimeoutStopSec of each role's unit; engines' is 60."""
LONGEST_STOP_S = 60.0


@dataclass
class Life:
    """One life of a process. `meant`: a fault has ended it, or was to; `ended_s`: from when on it may not have been there."""

    started_s: float
    ready_s: float | None = None
    ended_s: float | None = None
    code: int | None = None
    meant: bool = False


@dataclass
class Kept:
    """A service and its lives. `armed`: the failpoint that its next life begins with."""

    service: Service
    lives: list[Life] = field(default_factory=list[Life])
    armed: str = ""
    pid: int = 0

    @property
    def up(self) -> bool:
        return bool(self.lives) and self.lives[-1].ready_s is not None and self.lives[-1].ended_s is None

    def down(self, start_s: float, end_s: float) -> bool:
        """Whether it was not there to serve in some part of this time."""
        edge_s = self.lives[0].ready_s or 0.0
        for life in self.lives[1:]:
            if edge_s > end_s:
                return False
            back_s = life.ready_s if life.ready_s is not None else float("inf")
            if start_s <= back_s and end_s >= (self._ended_before(life) or edge_s):
                return True
            edge_s = back_s
        last = self.lives[-1]
        return last.ended_s is not None and end_s >= last.ended_s

    def _ended_before(self, life: Life) -> float | None:
        return self.lives[self.lives.index(life) - 1].ended_s


class Stack:
    """All processes below `root`. Sockets are in `sockets`, whose path is short."""

    def __init__(self, root: Path, sockets: Path, group: anyio.abc.TaskGroup, local: LocalStack) -> None:
        self.root, self.sockets = root, sockets
        self.target = make_cyclic_target(root / "tiny")
        self.ports = {name: free_port() for name in ENGINES}
        self.proxies: dict[str, Proxy] = {}
        self.kept: dict[str, Kept] = {}
        self.configs: dict[str, Config] = {}
        self._group = group
        self._local = local
        self._quiet = False
        self.valkey_url = valkey_url(sockets)

    @property
    def work(self) -> Path:
        """Where workers have their directories."""
        return self.root / "shared" / "work"

    @property
    def config(self) -> Config:
        return self.configs[DAEMONS[0]]

    def client(self, daemon: str) -> Client:
        """Of one daemon's admin API."""
        return Client(self.configs[daemon].daemon.socket_path, timeout_s=20.0)

    async def leader(self) -> Client | None:
        """The client of the daemon that leads now."""
        for daemon in DAEMONS:
            client = self.client(daemon)
            with contextlib.suppress(Unavailable):
                if (await asyncio.to_thread(client.status)).leader:
                    return client
        return None

    async def start(self) -> None:
        """Valkey, then everything else at once; returns when all are ready."""
        config = write_config(self.sockets / "valkey.toml", {"daemon": {"state_dir": str(self.sockets)}}, None)
        await self._group.start(keep_valkey, config)
        for name in SERVICES:
            self.proxies[name] = Proxy(self.sockets / f"{name}.sock", self.valkey_url.removeprefix("unix://"))
        for name in DAEMONS:
            self.configs[name] = self._configure(name)
        for name in SERVICES:
            self.kept[name] = Kept(self._service(name))
            self._group.start_soon(self._keep, self.kept[name])
        await self.all_up()

    async def all_up(self) -> None:
        """Wait until every process is ready."""
        async with asyncio.timeout(READY_S):
            while not all(kept.up for kept in self.kept.values()):  # noqa: ASYNC110 - lives end and begin at any time
                await asyncio.sleep(0.1)

    def pid_of(self, victim: str) -> int | None:
        """The process of a service, of Valkey, or of an attempt that runs; None when there is none now."""
        if victim == VALKEY:
            with contextlib.suppress(OSError, ValueError):
                return int((self.sockets / "valkey" / "valkey.pid").read_text())
            return None
        if victim == TRAINER:
            attempts = [child for name in WORKERS if self.kept[name].up for child in children(self.kept[name].pid)]
            return attempts[0] if attempts else None
        return self.kept[victim].pid if self.kept[victim].up else None

    def signal(self, victim: str, number: signal.Signals) -> bool:
        """Send it; False when there was nobody."""
        pid = self.pid_of(victim)
        if pid is None:
            return False
        if number is signal.SIGKILL and victim in self.kept:
            life = self.kept[victim].lives[-1]
            life.meant, life.ended_s = True, time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    async def stop_all(self) -> dict[str, tuple[int | None, float]]:
        """SIGTERM to all at once, as a host that shuts down does: exit status (None: it had to be killed) and seconds of each."""
        self._quiet = True
        return dict(await asyncio.gather(*(self._stop(name) for name in reversed(SERVICES))))

    async def _stop(self, name: str) -> tuple[str, tuple[int | None, float]]:
        running = self._local.running[name]
        limit_s = UNIT_STOP_S.get(name.partition("-")[0], LONGEST_STOP_S)
        started_s = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            running.process.terminate()
        code: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                code = await running.process.wait()
        return name, (code, time.monotonic() - started_s)

    async def close(self) -> None:
        """Whatever happened before: nothing but Valkey is left."""
        self._quiet = True
        for kept in self.kept.values():
            with contextlib.suppress(ProcessLookupError):
                if kept.pid and kept.lives[-1].ended_s is None:
                    os.kill(kept.pid, signal.SIGCONT)
        pid = self.pid_of(VALKEY)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        with anyio.CancelScope(shield=True):
            await self._local.stop_all()
        for proxy in self.proxies.values():
            proxy.close()

    async def _keep(self, kept: Kept) -> None:
        """As systemd does with Restart=always, but without a limit of starts."""
        name = kept.service.name
        while not self._quiet:
            life = Life(time.monotonic(), meant=bool(kept.armed))
            kept.lives.append(life)
            environment = {"TIDED_FAILPOINT": kept.armed} if kept.armed else {}
            kept.armed = ""
            try:
                running = await self._local.start(_with(kept.service, environment))
            except Unavailable:
                running = self._local.running[name]
            else:
                kept.pid, life.ready_s = running.pid, time.monotonic()
            life.code = await running.process.wait()
            life.ended_s = life.ended_s or time.monotonic()
            if not self._quiet:
                await self._local.stop(name)  # its session: nothing of an earlier life may be there
                await asyncio.sleep(RESTART_S)

    def _configure(self, name: str) -> Config:
        """A daemon's configuration: a state directory of its own in which the samples, drafts and references are the shared ones."""
        own = self.root / name
        own.mkdir()
        for shared in ("samples", "drafts", "references", "work"):
            directory = self.root / "shared" / shared
            directory.mkdir(parents=True, exist_ok=True)
            (own / shared).symlink_to(directory)
        changes: dict[str, dict[str, Any]] = {
            "redis": {"url": self.proxies[name].url},
            "daemon": {
                "name": name,
                "state_dir": str(own),
                "socket": str(self.sockets / f"{name}.admin"),
                "cycle_s": CYCLE_S,
                "lease_ttl_s": LEASE_S,
                "start_collector": False,
            },
            "target": {"path": str(self.target), "name": "tiny"},
            "self_test": {"retry_s": 5.0, "reference_wait_s": 30.0},
            "training": {"min_rows": 1500, "budget_s": 20.0, "plateau_gain": 0.0, "fault_check_s": 20.0},
            "deployment": {"watch_requests": 4, "watch_s": 10.0, "swap_deadline_s": 15.0},
            "jobs": {"lease_s": LEASE_S},
        }
        return write_config(self.root / f"{name}.toml", sections(self.root, **changes), None)

    def _service(self, name: str) -> Service:
        config = ("--config", str(self.root / f"{DAEMONS[0]}.toml"), "--redis", f"unix://{self.sockets}/{name}.sock")
        if name in DAEMONS:
            return Service(name, "tided.daemon", ("--config", str(self.root / f"{name}.toml")), ready_s=READY_S)
        if name in ENGINES:
            arguments = (*config, "--engine-id", name, "--port", str(self.ports[name]))
            return Service(name, "tided.engine.embedded.server", arguments, ready_s=READY_S)
        if name in WORKERS:
            arguments = (*config, "--name", name, "--work-dir", str(self.work / name))
            return Service(name, "tided.worker.agent", arguments, ready_s=READY_S)
        return Service(name, "tided.services.collector", config, ready_s=READY_S)


def valkey_url(sockets: Path) -> str:
    """Valkey itself, past all proxies."""
    return f"unix://{sockets}/valkey/valkey.sock"


def _with(service: Service, environment: Mapping[str, str]) -> Service:
    return Service(
        service.name, service.module, service.arguments, service.cores, service.threads, service.ready_s, environment
    )


@asynccontextmanager
async def stack(root: Path, sockets: Path) -> AsyncGenerator[Stack]:
    """A stack that has started, and of which nothing is left afterwards."""
    async with LocalStack(root / "logs") as local, anyio.create_task_group() as group:
        running = Stack(root, sockets, group, local)
        try:
            await running.start()
            yield running
        finally:
            await running.close()
            group.cancel_scope.cancel()
