"""What tided itself costs: time to READY, memory, CPU while idle, and how long `tidectl status` takes.

`python -m bench.daemon` writes build/bench/daemon.json. Idle means: an engine and a worker are connected, nobody asks for anything.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.configs import free_port, write_config
from bench.control import Control
from bench.model import DEFAULT
from bench.report import Claim, at_most, publish
from tided.local import LocalStack, services

STARTS = 7
STATUS_CALLS = 15
IDLE_S = 30.0


async def measure(model: Path, starts: int, calls: int, idle_s: float) -> list[Claim]:
    """The claims."""
    with tempfile.TemporaryDirectory(prefix="tided-daemon-") as directory:
        work = Path(directory)
        config_file = work / "config.toml"
        config = write_config(
            config_file,
            {
                "daemon": {"state_dir": str(work / "state")},
                "target": {"path": str(model)},
                "engine": {"port": free_port()},
            },
        )
        tided, engine, worker = services(config_file, config)
        ready: list[float] = []
        for _ in range(starts):
            async with LocalStack(work / "logs") as stack:
                ready.append((await stack.start(tided)).ready_s)
        async with LocalStack(work / "logs", lambda line: print(line, flush=True)) as stack:
            pid = (await stack.start(tided)).pid
            await stack.start(engine)
            await stack.start(worker)
            control = Control(config.daemon.socket_path)
            await control.has_draft()
            await control.wait_for(lambda status: bool(status.workers), 30)
            await asyncio.sleep(5)
            before_s, began_s = cpu_s(pid), time.monotonic()
            await asyncio.sleep(idle_s)
            idle = 100 * (cpu_s(pid) - before_s) / (time.monotonic() - began_s)
            took = [await _status_ms(config.daemon.socket_path) for _ in range(calls)]
            rss = rss_mb(pid)
    return [
        at_most("tided.ready", "tided until READY, median", statistics.median(ready), 1.5, "s", ready),
        at_most("tided.rss", "tided resident memory", rss, 120, "MB"),
        at_most("tided.idle", "tided CPU while idle", idle, 2, "%"),
        at_most("tidectl.status", "tidectl status, median", statistics.median(took), 400, "ms", took),
    ]


async def _status_ms(socket: Path) -> float:
    began_s = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tided.ctl.main",
        "status",
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, "TIDED_SOCKET": str(socket)},
    )
    if await process.wait() != 0:
        raise RuntimeError(f"tidectl status ended with status {process.returncode}")
    return 1000 * (time.monotonic() - began_s)


def cpu_s(pid: int) -> float:
    """User and system time of one process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of one process, in MB of 10^6 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(prog="python -m bench.daemon", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT)
    publish("daemon", asyncio.run(measure(parser.parse_args(arguments).model, STARTS, STATUS_CALLS, IDLE_S)))


if __name__ == "__main__":
    main()
