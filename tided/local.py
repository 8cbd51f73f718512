"""The processes of one host as a stack: tided (which starts Valkey and a collector), engines and a worker.

`make run`, the demo, the benches and the end-to-end test use it. Every process gets a session of its own, its cores, a log file and
a notification socket; it counts as started when it says READY=1 there. Whatever happens, all are stopped: in reverse order, each
with a deadline, and none outlives this process.
"""

import argparse
import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console

from tided.config import Config, load
from tided.model.errors import TideError, Unavailable

PR_SET_PDEATHSIG = 1
UCRED = struct.Struct("3i")  # pid, uid, gid
CREDENTIALS = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
STOP_S = 30.0
LOG_TAIL_LINES = 5

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """A process to run: `python -m MODULE ARGUMENTS`. `threads` bounds what torch and BLAS start in it."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    cores: frozenset[int] | None = None  # None: those of this process
    threads: int = 1
    ready_s: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Running:
    """A started service. `ready_s` is how long it took to become ready."""

    service: Service
    process: asyncio.subprocess.Process
    log: Path
    ready_s: float

    @property
    def pid(self) -> int:
        return self.process.pid


class LocalStack:
    """Runs services under `directory`, where their logs are. An async context manager: leaving it stops all of them."""

    def __init__(self, directory: Path, progress: Progress | None = None) -> None:
        self.directory = directory
        self.running: dict[str, Running] = {}
        self._say: Progress = progress or _silent
        self._sockets = Path(tempfile.mkdtemp(prefix="tided-"))

    async def __aenter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *failure: object) -> None:
        stopping = asyncio.ensure_future(self.stop_all())
        interrupted = False
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError:
                # A second Ctrl-C must not leave processes behind: stop_all has deadlines of its own.
                interrupted = True
        shutil.rmtree(self._sockets, ignore_errors=True)
        stopping.result()
        if interrupted:
            raise asyncio.CancelledError

    async def start(self, service: Service) -> Running:
        """Start `service` and wait until it is ready.

        Raises:
            Unavailable: it ended, or was not ready within `ready_s`; the message holds the end of its log.
        """
        self._say(f"{service.name}: starting")
        started = time.monotonic()
        log = self.directory / f"{service.name}.log"
        with contextlib.ExitStack() as resources:
            notify = resources.enter_context(_notify_socket(self._sockets / service.name))
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    service.module,
                    *service.arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=_environment(service, self._sockets / service.name),
                    start_new_session=True,
                    preexec_fn=_prepare(service.cores),
                )
            self.running[service.name] = Running(service, process, log, 0.0)
            try:
                async with asyncio.timeout(service.ready_s):
                    await self._ready(service, process, notify)
            except TimeoutError as exc:
                raise Unavailable(_failure(service, f"was not ready within {service.ready_s:.0f} s", log)) from exc
            except _Ended as exc:
                raise Unavailable(_failure(service, f"ended with status {process.returncode}", log)) from exc
        running = Running(service, process, log, time.monotonic() - started)
        self.running[service.name] = running
        self._say(f"{service.name}: ready after {running.ready_s:.1f} s")
        return running

    async def stop(self, name: str, deadline_s: float = STOP_S) -> None:
        """SIGTERM, and SIGKILL to its whole session after `deadline_s`. Nothing when it is not running."""
        running = self.running.pop(name, None)
        if running is None:
            return
        process = running.process
        if process.returncode is None:
            self._say(f"{name}: stopping")
            process.terminate()
            try:
                async with asyncio.timeout(deadline_s):
                    await process.wait()
            except TimeoutError:
                self._say(f"{name}: did not stop within {deadline_s:.0f} s, killed")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def stop_all(self) -> None:
        """`stop` for all, in reverse order of their start."""
        for name in reversed(list(self.running)):
            await self.stop(name)

    async def ended(self) -> str:
        """Wait until one of the services ends by itself, and return what to tell the user."""
        waits = {asyncio.create_task(item.process.wait()): item for item in self.running.values()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        item = waits[done.pop()]
        return _failure(item.service, f"ended with status {item.process.returncode}", item.log)

    async def _ready(self, service: Service, process: asyncio.subprocess.Process, notify: socket.socket) -> None:
        exited = asyncio.create_task(process.wait())
        try:
            while not exited.done():
                readable = asyncio.create_task(_readable(notify))
                await asyncio.wait((readable, exited), return_when=asyncio.FIRST_COMPLETED)
                readable.cancel()
                for line in _said(notify, process.pid):
                    if line == "READY=1":
                        return
                    if line.startswith("STATUS="):
                        self._say(f"{service.name}: {line.removeprefix('STATUS=')}")
            raise _Ended
        finally:
            exited.cancel()


class _Ended(Exception):
    """The process ended before it was ready."""


def split_cores(engine_threads: int) -> tuple[frozenset[int], frozenset[int]]:
    """The engine's cores and the others', where the worker and tided run. One core: both share it."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return frozenset(cores), frozenset(cores)
    first = min(engine_threads, len(cores) - 1)
    return frozenset(cores[:first]), frozenset(cores[first:])


def services(config_file: Path, config: Config) -> Sequence[Service]:
    """tided, one engine and one worker, from one configuration file, in the order of their start."""
    engine_cores, other_cores = split_cores(config.engine.threads)
    arguments = ("--config", str(config_file))
    return (
        Service("tided", "tided.daemon", arguments, other_cores, ready_s=30),
        Service("engine", "tided.engine.embedded.server", arguments, engine_cores, config.engine.threads),
        Service("worker", "tided.worker.agent", arguments, other_cores, config.worker.threads, ready_s=60),
    )


def _environment(service: Service, notify: Path) -> dict[str, str]:
    threads = {name: str(service.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **threads, "NOTIFY_SOCKET": str(notify), "PYTHONUNBUFFERED": "1", **service.environment}


def _prepare(cores: frozenset[int] | None) -> Callable[[], None]:
    """Runs in the child before the program: it dies with us, and has its cores before it starts a thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return prepare


@contextlib.contextmanager
def _notify_socket(path: Path) -> Generator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        opened.bind(str(path))
        yield opened


async def _readable(source: socket.socket) -> None:
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(source, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(source)


def _said(notify: socket.socket, pid: int) -> Generator[str]:
    """The lines that process `pid` itself has sent; its children inherit the socket's address and are not heard."""
    while True:
        try:
            data, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(UCRED.size))
        except BlockingIOError:
            return
        senders = [UCRED.unpack(item)[0] for level, kind, item in ancillary if (level, kind) == CREDENTIALS]
        if senders == [pid]:
            yield from data.decode(errors="replace").splitlines()


def _failure(service: Service, what: str, log: Path) -> str:
    tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"{service.name} {what}; its log is {log}, which ends with:", *("  " + line for line in tail)])


def _print(text: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def _silent(_: str) -> None:
    return


async def serve_until_told(config_file: Path) -> None:
    """`make run`: the whole stack, until SIGINT or SIGTERM, or until one of its processes ends.

    Raises:
        TideError: what is wrong and what to do.
    """
    config = load(config_file)
    os.umask(0o077)  # logs and state, of this process and of all that it starts, are for this user alone
    directory = config.daemon.state_dir / "logs"
    async with LocalStack(directory, _print) as stack:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        starting = asyncio.create_task(_start_all(stack, services(config_file, config)))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return
        starting.result()
        _print(_welcome(config_file, config, directory))
        ended = asyncio.create_task(stack.ended())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        stopped.cancel()
        if not stop.is_set():
            raise Unavailable(ended.result())
        _print("stopping")


async def _start_all(stack: LocalStack, wanted: Sequence[Service]) -> None:
    for service in wanted:
        await stack.start(service)


def _welcome(config_file: Path, config: Config, logs: Path) -> str:
    url = f"http://{config.engine.host}:{config.engine.port}"
    return f"""
Serving on {url} (OpenAI-compatible). Try:

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Write a Python function that adds two numbers."}}], "max_tokens": 80}}'

Watch: tidectl --config {config_file} status    (or: events --follow, drafts list, jobs list)
Logs:  {logs}
Ctrl-C stops everything.
"""


def main() -> None:
    """`python -m tided.local --config config.toml`."""
    parser = argparse.ArgumentParser(
        prog="python -m tided.local", description="Run tided, an engine and a worker here."
    )
    parser.add_argument("--config", type=Path, default=Path("config.toml"))
    try:
        asyncio.run(serve_until_told(parser.parse_args().config))
    except TideError as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
