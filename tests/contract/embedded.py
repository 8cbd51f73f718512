"""The embedded engine as a subject of the contract: tide-engine in a process, asked over HTTP."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from tided.model.engines import Capability

BOOT_S = 300.0


class EmbeddedSubject:
    """See tests.contract.subject.Subject."""

    kind = "transformers"
    engine = "embedded"
    capabilities = frozenset(Capability)
    tolerance = 1e-4
    temperatures = (0.0, 0.7)
    prefix_cache = False
    context = 400

    def __init__(self, redis_url: str, target: Path, draft: Path, work: Path) -> None:
        self.target_dir, self.draft_dir = target, draft
        self._redis_url, self._log, self._cache = redis_url, work / "engine.log", work / "cache"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        command = [sys.executable, "-m", "tided.engine.embedded.server", "--port", "0", "--redis", self._redis_url]
        command += ["--model", str(self.target_dir), "--draft", str(self.draft_dir), "--engine-id", self.engine]
        command += ["--dtype", "float32", "--max-batch", "4", "--max-context", str(self.context), "--no-profile"]
        with self._log.open("wb") as log:
            environment = {**os.environ, "TIDED_CACHE_DIR": str(self._cache)}
            self._process = subprocess.Popen(command, stderr=log, env=environment)
        self.url = self._ready(self._process)

    def _ready(self, process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and process.poll() is None:
            said = re.search(r"ready on (\S+)", self._log.read_text())
            if said is not None:
                return said[1]
            time.sleep(0.05)
        raise AssertionError(f"the engine is not ready: {self._log.read_text()}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(120) == 0
        assert "Traceback" not in self._log.read_text()

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> list[int]:
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
        headers = {"x-tide-no-capture": "1"} if private else {}
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            answer = await http.post("/v1/completions", json={**body, "return_token_ids": True}, headers=headers)
        assert answer.status_code == 200, answer.text
        return [int(token) for token in answer.json()["choices"][0]["token_ids"]]
