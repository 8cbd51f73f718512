"""A real vLLM server on a processor with tided in it, as a subject of the backend contract (tests/contract/subject.py)."""

import asyncio
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
from tests.engines.environment import engine_environment
from tests.tiny import make_draft, make_target
from tided.model.records import Capability

GAMMA_MAX = 3
BOOT_S = 600.0
MODEL = "tiny"
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
# One thread: servers of tests share few cores with each other and with the test.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def make_models(root: Path) -> tuple[Path, Path]:
    """A tiny target with heads that vLLM's kernels know, and its version 0."""
    target = make_target(root / "target", heads=4, kv_heads=2, head_dim=32)
    return target, make_draft(target, root / "draft")


class VllmServer:
    """See tests.contract.subject.Subject."""

    kind = "vllm"
    engine = "vllm"
    capabilities = frozenset(Capability)
    tolerance = 1e-4
    prefix_cache = True
    context = 256
    max_batch = 4
    prefill_chunk = 64

    def __init__(self, redis_url: str, target: Path, draft: Path, work: Path) -> None:
        self.target_dir, self.draft_dir, self.log = target, draft, work / "vllm.log"
        self.environment: Mapping[str, str] = {
            "TIDED_ENGINE": self.engine,
            "TIDED_REDIS_URL": redis_url,
            "TIDED_LAST_HIDDEN": "1",
            "TIDED_REPORT_INTERVAL_S": "0.1",
        }
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def arguments(self, port: int) -> list[str]:
        """The server's command line behind the interpreter."""
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self.target_dir)]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
        command += ["--max-model-len", str(self.context), "--max-num-seqs", str(self.max_batch)]
        command += ["--max-num-batched-tokens", str(self.prefill_chunk)]
        command += ["--middleware", "tided.engine.vllm.optout.NoCapture"]
        # One batch size for each number of drafted tokens, so that vLLM knows all of them.
        sizes = [[1 + gamma, 1 + gamma, gamma] for gamma in range(GAMMA_MAX + 1)]
        speculation = {"method": "eagle3", "model": str(self.draft_dir), "num_speculative_tokens": GAMMA_MAX}
        return [
            *command,
            "--speculative-config",
            json.dumps({**speculation, "num_speculative_tokens_per_batch_size": sizes}),
        ]

    def start(self) -> None:
        built, port = engine_environment("vllm"), free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(
                [str(built.python), *self.arguments(port)],
                env={**built.environment, **QUIET, **SMALL, **self.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                start_new_session=True,
            )
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        self.kill()
        raise AssertionError(f"vLLM did not come up: {self.log.read_text()[-6000:]}")

    def kill(self) -> None:
        """SIGKILL to the server, its engine core and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            assert self._process.wait(120) == 0
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
        more: Mapping[str, Any] | None = None,
    ) -> list[int]:
        body = {"model": MODEL, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": temperature}
        body |= {"ignore_eos": ignore_eos, "return_token_ids": True, **(more or {})}
        headers = {"x-tide-no-capture": "1"} if private else {}
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            answer = await http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return [int(token) for token in answer.json()["choices"][0]["token_ids"]]

    async def metric(self, name: str) -> float:
        """The sum of a Prometheus counter over its labels."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            text = (await http.get("/metrics")).text
        rows = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        assert rows, f"vLLM has no metric {name}"
        return sum(float(value) for value in rows)

    async def greedy_many(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """All at once."""
        return list(await asyncio.gather(*(self.complete(prompt, max_tokens) for prompt in prompts)))
