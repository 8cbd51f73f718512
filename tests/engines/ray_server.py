"""A real Ray head with its jobs API, of the test's own: one processor, little memory, free ports, gone with the test."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import httpx

from bench.configs import free_port
from tests.engines.environment import engine_environment

STARTED_S = 180.0
STORE_BYTES = 80_000_000
"""The least that Ray takes is 75 MB."""


@contextlib.contextmanager
def ray_head(directory: Path) -> Generator[str]:
    """The URL of its dashboard. `directory` has a short path: Ray has sockets there."""
    ray = engine_environment("ray")
    port = free_port()
    ports = {"port": free_port(), "dashboard-port": port, "dashboard-agent-listen-port": free_port()}
    ports |= {"ray-client-server-port": free_port(), "min-worker-port": 0, "max-worker-port": 0}  # 0: any
    command = [str(ray.python.parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=1"]
    command += [f"--{name}={number}" for name, number in ports.items()]
    command += [f"--object-store-memory={STORE_BYTES}", f"--temp-dir={directory}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    environment = {**ray.environment, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    del environment["PYTHONPATH"]  # Ray runs without tided
    log = directory / "start.log"
    with log.open("wb") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, cwd=directory, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(head, url, log)
        yield url
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        _kill_rest(directory)
        head.wait()


def _wait(head: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTED_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/api/jobs/", trust_env=False).is_success:
                return
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _kill_rest(directory: Path) -> None:
    """What of this head is left: all its processes name its directory."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if int(path.parent.name) != os.getpid() and os.fsencode(directory) in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
