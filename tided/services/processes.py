"""The processes that tided itself starts: the embedded Valkey and a collector. Kept running, and never left behind."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import structlog
from anyio.abc import TaskStatus

from tided.config import Config
from tided.model.errors import Unavailable
from tided.store.valkey import EmbeddedValkey

POLL_S = 0.5
BACKOFF_S = (0.5, 10.0)
STOP_S = 10.0

# The collector ends with us even when we are killed: it would hold the writer's lock against the next tided's.
_WITH_PARENT = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,15);"
    "os.getppid()==int(sys.argv[1]) or sys.exit(0);os.execv(sys.executable,[sys.executable,*sys.argv[2:]])"
)

_log = structlog.get_logger()


async def keep_valkey(config: Config, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
    """Run the embedded Valkey until cancelled, and start it again when it dies. Calls `started` after the first attempt.

    Raises `ConfigError` for what a person must change. A server that will not start now is tried again: tided is degraded meanwhile.
    """
    server: EmbeddedValkey | None = None
    wait_s = BACKOFF_S[0]
    try:
        while True:
            server = EmbeddedValkey(config.daemon.state_dir / "valkey", config.redis.maxmemory_bytes)
            try:
                await server.start()
                _log.info("valkey-started", pid=server.pid, adopted=server.adopted)
                wait_s = BACKOFF_S[0]
            except Unavailable as exc:
                _log.warning("valkey-not-started", why=str(exc), retry_s=wait_s)
            task_status.started()
            task_status = anyio.TASK_STATUS_IGNORED
            while server.alive:  # noqa: ASYNC110 - an adopted server is not our child: there is nothing to wait on
                await anyio.sleep(POLL_S)
            await anyio.sleep(wait_s)
            wait_s = min(wait_s * 2, BACKOFF_S[1])
    finally:
        if server is not None:
            with anyio.CancelScope(shield=True):
                await server.stop()


async def keep_collector(config_file: Path | None) -> None:
    """Run a collector as a process of its own until cancelled, and start it again when it ends."""
    arguments = ["-m", "tided.services.collector", *(["--config", str(config_file)] if config_file else [])]
    wait_s = BACKOFF_S[0]
    while True:
        started_s = anyio.current_time()
        code = await _run(arguments)
        if anyio.current_time() - started_s > BACKOFF_S[1]:
            wait_s = BACKOFF_S[0]
        _log.warning("collector-ended", code=code, retry_s=wait_s)
        await anyio.sleep(wait_s)
        wait_s = min(wait_s * 2, BACKOFF_S[1])


async def _run(arguments: Sequence[str]) -> int:
    """One life of a Python child, to its exit code. Cancelled: SIGTERM, and SIGKILL after `STOP_S`."""
    inherited = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET" and "WATCHDOG" not in key}
    process = await anyio.open_process(
        [sys.executable, "-c", _WITH_PARENT, str(os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=None,
        env={**inherited, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    _log.info("collector-started", pid=process.pid)
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            with anyio.CancelScope(shield=True):
                process.terminate()
                with anyio.move_on_after(STOP_S):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
