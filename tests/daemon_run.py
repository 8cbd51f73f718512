"""tided as a real process for tests: started, watched over its notification socket, killed and started again."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import eventually


@dataclass
class TidedProcess:
    process: asyncio.subprocess.Process
    log: Path
    notify: socket.socket
    said: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def heard(self) -> str:
        """All that it has told its manager so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.said += self.notify.recv(4096).decode() + "\n"
        return self.said

    async def ready(self) -> None:
        def check() -> bool:
            assert self.process.returncode is None, self.log.read_text()
            return "READY=1" in self.heard()

        await eventually(check)

    async def status(self, text: str) -> None:
        """Wait until the newest STATUS holds `text`. Only for states that last: tided looks at its own once a second."""

        def check() -> bool:
            lines = [line for line in self.heard().splitlines() if line.startswith("STATUS=")]
            return bool(lines) and text in lines[-1]

        await eventually(check)

    async def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 90.0) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def tided(
    config: Path, directory: Path, name: str = "tided", environment: Mapping[str, str] | None = None
) -> AsyncGenerator[TidedProcess]:
    """A tided that is killed at the end if the body has not stopped it."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{name}.log"
    # Abstract, so that its length does not matter.
    address = f"\0tided-test-{os.getpid()}-{name}-{id(log)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log.open("ab") as output:
        notify.setblocking(False)
        notify.bind(address)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tided.daemon",
            "--config",
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "NOTIFY_SOCKET": "@" + address[1:], **(environment or {})},
        )
        running = TidedProcess(process, log, notify)
        try:
            yield running
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.kill()
                await process.wait()


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
