"""A stack of one's own, built on tided.client, keeps the backend contract."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Valkey
from tests.contract.suite import BackendContract, RestartContract
from tests.tiny import make_draft, make_target
from tided.model.engines import Capability
from tided.model.ids import new_id

pytest_plugins = ("tests.contract.fixtures",)
pytestmark = pytest.mark.real


class SdkSubject:
    """See tests.contract.subject.Subject. Talks to tests/contract/sdk_stack.py over its standard streams."""

    kind = "redis"
    engine = "sdk"
    capabilities = frozenset(Capability) - {Capability.SWAP_VOCABULARY}
    tolerance = 1e-4
    temperatures = (0.0,)
    prefix_cache = False
    context = 400

    def __init__(self, redis_url: str, target: Path, draft: Path, drafts_dir: Path) -> None:
        self.target_dir, self.draft_dir, self._drafts_dir = target, draft, drafts_dir
        self._redis_url = redis_url
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._answers: dict[str, Future[list[int]]] = {}
        self._ready: Future[bool] = Future()
        self._errors: Future[int] = Future()

    def start(self) -> None:
        self._ready, self._errors = Future(), Future()
        command = [
            sys.executable,
            "-m",
            "tests.contract.sdk_stack",
            "--redis",
            self._redis_url,
            "--engine",
            self.engine,
        ]
        command += ["--target", str(self.target_dir), "--draft", str(self.draft_dir)]
        command += ["--drafts-dir", str(self._drafts_dir)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        assert self._ready.result(300)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                self._hear(json.loads(line))
        for ended in (self._ready, self._errors):
            if not ended.done():
                ended.set_exception(RuntimeError("the stack has ended"))

    def _hear(self, answer: dict[str, Any]) -> None:
        if "ready" in answer:
            self._ready.set_result(True)
        elif "errors" in answer:
            self._errors.set_result(answer["errors"])
        else:
            with self._lock:
                waiting = self._answers.pop(answer["id"], None)
            if waiting is not None and waiting.set_running_or_notify_cancel():
                waiting.set_result(answer["tokens"])

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def stop(self) -> None:
        assert self._process is not None
        self._say({"close": True})
        assert self._process.wait(120) == 0
        assert self._errors.result(10) == 0

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> list[int]:
        assert temperature == 0, "this stack is greedy"
        name, answer = new_id("req"), Future[list[int]]()
        with self._lock:
            self._answers[name] = answer
        asked = {"id": name, "prompt": list(prompt), "max_tokens": max_tokens}
        self._say({**asked, "private": private, "ignore_eos": ignore_eos})
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._say({"cancel": name})
            raise


@pytest.fixture(scope="module")
def subject(contract_redis: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SdkSubject]:
    work = tmp_path_factory.mktemp("sdk")
    target = make_target(work / "target")
    running = SdkSubject(contract_redis.url, target, make_draft(target, work / "draft"), work / "drafts")
    running.start()
    try:
        yield running
        running.stop()
    finally:
        running.kill()


class TestSdk(BackendContract):
    """One stack for all of it."""


class TestSdkRestart(RestartContract):
    """After the others: it kills the stack."""
