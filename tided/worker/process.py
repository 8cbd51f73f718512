"""A trainer as a subprocess, or several by torchrun: one attempt, that never outlives its agent.

The agent holds the write end of the trainer's stdin, which all its processes inherit; a trainer whose stdin ends knows that its agent is
gone and exits (`--with-parent` of tided.training; any other trainer must do the same). torchrun gives each of its processes a session of
its own, where no signal to a group reaches it: so every process of an attempt carries a mark in its environment, and is found by it.
"""

import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import structlog
from anyio.abc import ByteReceiveStream, Process

from tided.model.errors import Unavailable

MAX_LINE_BYTES = 16 << 20
STDERR_LINES = 40
TERM_GRACE_S = 3.0
KILL_POLL_S = 0.02
MARK = "TIDED_ATTEMPT"

_log = structlog.get_logger()


class TrainerProcess:
    """Started by `start`; `kill` must be awaited in every case, shielded: afterwards none of its processes runs."""

    def __init__(self, process: Process, mark: str) -> None:
        self._process = process
        self._mark = f"{MARK}={mark}".encode()
        self._born = _born(process.pid)
        self.stderr_tail: deque[str] = deque(maxlen=STDERR_LINES)

    @classmethod
    async def start(cls, argv: Sequence[str], env: dict[str, str], nice: int) -> "TrainerProcess":
        """Raises `Unavailable` if the program cannot be started."""
        mark = os.urandom(16).hex()
        try:
            process = await anyio.open_process(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env | {MARK: mark},
                start_new_session=True,
            )
        except OSError as exc:
            raise Unavailable(f"cannot start {argv[0]}: {exc.strerror}") from exc
        if nice:
            with suppress(OSError):  # it may have ended already; and below the agent's own niceness only root may go
                os.setpriority(os.PRIO_PROCESS, process.pid, nice)
        return cls(process, mark)

    @property
    def pid(self) -> int:
        return self._process.pid

    def lines(self) -> AsyncIterator[bytes]:
        """Lines of its stdout. Raises `ValueError` for one over `MAX_LINE_BYTES`."""
        assert self._process.stdout is not None
        return _lines(self._process.stdout)

    async def watch_stderr(self) -> None:
        """Keep the last lines of its stderr, for the log."""
        assert self._process.stderr is not None
        async for line in _lines(self._process.stderr):
            self.stderr_tail.append(line.decode(errors="replace")[:500])

    async def wait(self) -> int:
        return await self._process.wait()

    async def kill(self) -> None:
        """End the process group, and all that carry the mark: SIGTERM, and SIGKILL after `TERM_GRACE_S`."""
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            with anyio.move_on_after(TERM_GRACE_S):
                await self._process.wait()
        self._signal(signal.SIGKILL)  # also for children of its own that it left behind
        while marked := await anyio.to_thread.run_sync(_carrying, self._mark, self._born):
            for pid in marked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await anyio.sleep(KILL_POLL_S)
        await self._process.wait()
        await self._process.aclose()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _carrying(mark: bytes, since: int) -> list[int]:
    """Processes of ours that were started with this in their environment. Dead ones that wait for their parent have none.

    Older ones are not asked: to read a process's environment may wait for its memory map, which a large server can hold for long.
    """
    found: list[int] = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal() and _born(int(directory.name)) >= since:
            with suppress(OSError):  # it has ended, or is another user's
                if mark in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
    return found


def _born(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 if it has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def describe_exit(status: int) -> str:
    """An exit status in words, with what to look for."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory, or killed by hand)" if -status == signal.SIGKILL else ""
        return f"the trainer was ended by {name}{hint}"
    return f"the trainer exited with status {status} and no result"


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[bytes]:
    buffered = bytearray()
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        while True:
            received = await stream.receive()
            buffered += received
            if b"\n" in received:
                *whole, buffered = buffered.split(b"\n")
                for line in whole:
                    yield bytes(line)
            if len(buffered) > MAX_LINE_BYTES:
                raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
