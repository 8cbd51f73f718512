"""A real SGLang server with tided in it, as a subject of the backend contract: real scheduler, worker and HTTP; stand-in CPU kernels."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.configs import free_port
from tests.engines.environment import CHECKOUT, engine_environment
from tided.model.records import Capability

GAMMA_MAX = 3
BOOT_S = 600.0
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


class SglangServer:
    """See tests.contract.subject.Subject."""

    kind = "sglang"
    engine = "sglang"
    capabilities = frozenset(Capability)
    tolerance = 1e-4
    prefix_cache = True
    context = 256
    max_batch = 4
    prefill_chunk = 64

    def __init__(self, redis_url: str, target: Path, draft: Path, work: Path) -> None:
        self.target_dir, self.draft_dir, self.work = target, draft, work
        self.environment: Mapping[str, str] = {
            "TIDED_ENGINE": self.engine,
            "TIDED_REDIS_URL": redis_url,
            "TIDED_LAST_HIDDEN": "1",
            "TIDED_REPORT_INTERVAL_S": "0.1",
            "TIDED_PROFILE": "0",
        }
        self.log = work / "sglang.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def arguments(self, port: int) -> list[str]:
        """The server's command line behind the interpreter."""
        steps = self.work / "steps.json"
        steps.write_text(json.dumps({"1": {"candidate_steps": list(range(GAMMA_MAX + 1))}}))
        options = {
            "model-path": self.target_dir,
            "device": "cpu",
            "dtype": "float32",
            "attention-backend": "intel_amx",
            "cuda-graph-backend-decode": "disabled",
            "speculative-algorithm": "EAGLE3",
            "speculative-draft-model-path": self.draft_dir,
            "speculative-num-steps": GAMMA_MAX,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": GAMMA_MAX + 1,
            "speculative-adaptive-config": steps,
            "context-length": self.context,
            "max-running-requests": self.max_batch,
            "max-total-tokens": 4096,
            "chunked-prefill-size": self.prefill_chunk,
            "host": "127.0.0.1",
            "port": port,
        }
        switches = ["--speculative-adaptive", "--skip-server-warmup", "--sleep-on-idle"]
        command = [str(CHECKOUT / "tests" / "standin" / "serve.py"), *switches]
        return command + [part for name, value in options.items() for part in (f"--{name}", str(value))]

    def start(self) -> None:
        built, port = engine_environment("sglang"), free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(
                [str(built.python), *self.arguments(port)],
                env={**built.environment, **QUIET, **self.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                start_new_session=True,
            )
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        self.kill()
        raise AssertionError(f"SGLang did not come up: {self.log.read_text()[-6000:]}")

    def kill(self) -> None:
        """SIGKILL to the server, its scheduler and its detokenizer."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> list[int]:
        parameters = {"temperature": temperature, "max_new_tokens": max_tokens, "ignore_eos": ignore_eos}
        headers = {"x-tide-no-capture": "1"} if private else {}
        answer = await self.post(
            "/generate", {"input_ids": list(prompt), "sampling_params": parameters}, headers=headers
        )
        return [int(token) for token in answer["output_ids"]]

    async def post(self, path: str, body: Mapping[str, Any], *, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON answer to a request."""
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            answer = await http.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def get(self, path: str) -> Any:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            answer = await http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()
