"""The server process of a real engine with tided in it, started by the very command that `tidectl engine-args` prints."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import httpx

from bench.configs import free_port
from tests.engines.environment import engine_environment
from tided.config import Config, parse
from tided.ctl.engine_args import EngineCommand, boot_draft, command
from tided.model.engines import Capability

BOOT_S = 600.0
STOP_S = 120.0
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def configure(engine: str, redis_url: str, target: Path, state_dir: Path) -> Config:
    """For an engine that is started without a tided around it."""
    return parse(
        {
            "redis": {"url": redis_url},
            "daemon": {"state_dir": str(state_dir)},
            "target": {"path": str(target)},
            "engine": {
                "id": engine,
                "port": free_port(),
                "dtype": "float32",
                "max_batch": 4,
                "max_context": 256,
                "gamma_max": 3,
                "report_interval_s": 0.1,
            },
            "speculation": {"gamma_max": 3},
        },
        engine,
    )


class EngineServer:
    """One engine with a tiny target, at the port of its configuration; also what tests.contract.subject.Subject asks for, but requests.

    `kind` is engine-args', and that of the pinned environment.
    """

    kind: ClassVar[str]
    capabilities = frozenset(Capability)
    tolerance = 1e-4
    temperatures = (0.0, 0.7)
    prefix_cache = True
    prefill_chunk = 64

    def __init__(self, config: Config, draft: Path | None, log: Path) -> None:
        """Without `draft` it boots on version 0."""
        self.config, self.log = config, log
        self.engine, self.context, self.max_batch = config.engine.id, config.engine.max_context, config.engine.max_batch
        self.target_dir, self.draft_dir = config.engine_target.path, draft or boot_draft(config)
        self.url = f"http://{config.engine.host}:{config.engine.port}"
        self._draft = draft
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> EngineCommand:
        """What is run. Each engine adds what its tiny target on a small machine needs."""
        return command(self.kind, self.config, self._draft, str(engine_environment(self.kind).python))

    def start(self) -> None:
        """Returns once requests are served."""
        run, built = self.command(), engine_environment(self.kind)
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(
                run.arguments,
                env={
                    **built.environment,
                    **QUIET,
                    **run.environment,
                    "TIDED_CACHE_DIR": str(self.log.parent / "drafts"),
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                start_new_session=True,
            )
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self.running:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        self.kill()
        raise AssertionError(f"{self.kind} did not come up: {self.log.read_text()[-6000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and all its processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM. Raises when it does not end well."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            assert self._process.wait(STOP_S) == 0
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def post(self, path: str, body: Mapping[str, Any], *, private: bool = False) -> Any:
        """The JSON answer to a request; `private`: it opts out of capture."""
        headers = {"x-tide-no-capture": "1"} if private else {}
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            answer = await http.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            answer = await http.get(path)
        assert answer.status_code == 200, answer.text
        return answer
