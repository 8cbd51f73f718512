"""tide-engine as its users meet it: a process, HTTP, Redis beside it."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Valkey
from tests.support import eventually
from tests.tiny import make_draft, make_target
from tided.draft import checkpoint
from tided.engine.embedded.server import main
from tided.model.engines import EngineInfo, Observation
from tided.wire import keys
from tided.wire.control import Command, SetCapture, SetSchedule, decode, encode_command
from tided.wire.samples import decode_header

pytestmark = pytest.mark.real


@dataclass
class Process:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@dataclass
class Directories:
    target: Path
    draft: Path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    target = make_target(tmp_path_factory.mktemp("target"))
    return Directories(target, make_draft(target, tmp_path_factory.mktemp("draft")))


def launch(log: Path, *arguments: str) -> Process:
    """Start tide-engine on a free port and wait until it says that it is ready."""
    command = [sys.executable, "-m", "tided.engine.embedded.server", "--port", "0", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        ready = re.search(r"ready on (\S+)", log.read_text())
        if ready is not None:
            return Process(process, ready[1], log)
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise AssertionError(f"the engine is not ready: {log.read_text()}")


def arguments(where: Directories, *more: str) -> list[str]:
    size = ["--dtype", "float32", "--max-batch", "4", "--max-context", "128", "--no-profile"]
    return ["--model", str(where.target), "--draft", str(where.draft), *size, *more]


@pytest.fixture(scope="module")
def server(directories: Directories, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = launch(log, *arguments(directories, "--gammas", "2"))
    yield running
    assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def client(server: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=180) as http:
        yield http


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's events; the last line must be [DONE]."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def test_completion_is_the_same_streamed_and_whole(client: httpx.Client) -> None:
    body = {"prompt": "hello world", "temperature": 0, "max_tokens": 20}
    whole = client.post("/v1/completions", json=body).json()
    assert whole["object"] == "text_completion"
    assert whole["usage"]["prompt_tokens"] == 11
    assert whole["usage"]["completion_tokens"] <= 20
    tide = whole["usage"]["tide"]
    assert tide["drafted"] == 2 * tide["spec_steps"]
    assert tide["accept_length"] >= 1
    chunks = events(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]


def test_chat_applies_the_template(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["object"] == "chat.completion"
    assert whole["usage"]["prompt_tokens"] == len("u:hi~")
    assert whole["choices"][0]["finish_reason"] == "length"
    parts = client.post(
        "/v1/chat/completions",
        json={**body, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    ).json()
    assert parts["choices"] == whole["choices"]
    chunks = events(client, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


def test_a_stop_string_ends_the_answer_before_it(client: httpx.Client) -> None:
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = text[8:11]
    want = text[: text.index(stop)]
    choice = client.post("/v1/completions", json={**body, "stop": [stop, "never said"]}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want, "stop")
    chunks = events(client, "/v1/completions", {**body, "stop": stop})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want


def test_a_seed_makes_samples_repeatable(client: httpx.Client) -> None:
    body = {"prompt": "abc", "temperature": 1.5, "top_p": 0.95, "max_tokens": 20, "ignore_eos": True}
    texts = [client.post("/v1/completions", json={**body, "seed": s}).json()["choices"][0]["text"] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


BAD: list[tuple[str, Any, str]] = [
    ("/v1/completions", b"{", "not JSON"),
    ("/v1/completions", b"[" * 100_000, "not JSON"),
    ("/v1/completions", [], "JSON object"),
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": ""}, "0 tokens"),
    ("/v1/completions", {"prompt": "x" * 500}, "500 tokens"),
    ("/v1/completions", {"prompt": [1, 4096]}, "vocabulary"),
    ("/v1/completions", {"prompt": [1, -1]}, "vocabulary"),
    ("/v1/completions", {"prompt": "a", "n": 2}, "n must be 1"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, "top_p"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, "stop"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, "seed"),
    ("/v1/completions", {"prompt": "a", "logprobs": True}, "logprobs"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "content"),
    ("/admin/gammas", {"gammas": [9]}, "0..4"),
    ("/admin/swap", {"path": "/nowhere"}, "no such file"),
]


def test_the_gamma_header_turns_drafting_off_and_changes_no_token(client: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    drafting = client.post("/v1/completions", json=body).json()
    plain = client.post("/v1/completions", json=body, headers={"x-tide-gamma": "0"}).json()
    assert drafting["usage"]["tide"]["drafted"] > 0
    assert plain["usage"]["tide"]["drafted"] == 0
    assert plain["choices"][0]["token_ids"] == drafting["choices"][0]["token_ids"]
    assert len(plain["choices"][0]["token_ids"]) == 12
    assert client.post("/v1/completions", json=body, headers={"x-tide-gamma": "no"}).status_code == 400


@pytest.mark.parametrize(("path", "body", "says"), BAD)
def test_bad_requests_get_an_error_in_openais_form(client: httpx.Client, path: str, body: Any, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content)
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "x" * 100 not in response.text


def test_the_other_routes(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert len(client.get("/v1/models").json()["data"]) == 1
    metrics = client.get("/metrics").text
    assert "tide_engine_decode_steps_total" in metrics
    assert 'tide_engine_gamma{batch="1"} 2.0' in metrics
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/completions").status_code == 405


def test_admin_sets_gammas_and_swaps(client: httpx.Client, directories: Directories) -> None:
    assert client.post("/admin/gammas", json={"gammas": [0]}).json() == {"gammas": [0]}
    plain = client.post("/v1/completions", json={"prompt": "hey", "temperature": 0}).json()
    assert plain["usage"]["tide"]["spec_steps"] == 0
    assert plain["usage"]["tide"]["accept_length"] == 1
    client.post("/admin/gammas", json={"gammas": [2]})
    drafted = client.post("/v1/completions", json={"prompt": "hey", "temperature": 0}).json()
    assert drafted["usage"]["tide"]["spec_steps"] > 0
    assert drafted["choices"] == plain["choices"]
    version = checkpoint.version_of(directories.draft)
    assert client.post("/admin/swap", json={"path": str(directories.draft)}).json()["version"] == version
    assert client.get("/admin/state").json()["version"] == version


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_request(server: Process, stream: bool) -> None:
    body = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True, "stream": stream}
    async with httpx.AsyncClient(base_url=server.url, timeout=180) as http:

        async def state() -> dict[str, Any]:
            return (await http.get("/admin/state")).json()

        async def leaves_in_time() -> bool:
            """A request may end before its client has left: then the next client tries."""
            async with httpx.AsyncClient(base_url=server.url, timeout=180) as leaving:
                asked = asyncio.create_task(leaving.post("/v1/completions", json=body))
                while not asked.done() and not (await state())["running"]:
                    pass
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
            await eventually(idle)
            return (await state())["totals"]["finished"]["abort"] > before

        async def idle() -> bool:
            return (await state())["running"] == 0

        before = (await state())["totals"]["finished"]["abort"]
        await eventually(leaves_in_time, 180)


def test_what_cannot_start_says_why_in_one_line(
    server: Process, directories: Directories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(directories.target), "--max-context", "64", "--no-profile", "--port", "0"]
    other = make_draft(make_target(tmp_path / "other", vocab=80), tmp_path / "draft")
    config = tmp_path / "config.toml"
    config.write_text("[engine]\nmax_batchh = 3\n")
    for says, arguments in (
        ("no config.json", ["--model", str(tmp_path / "nowhere"), "--port", "0"]),
        ("cannot listen", [*model, "--port", server.url.rsplit(":", 1)[1]]),
        ("another target", [*model, "--draft", str(other)]),
        ("redis://", [*model, "--redis", "http://nowhere"]),
        ("--max-batch", [*model, "--max-batch", "0"]),
        ("--gammas", [*model, "--gammas", "three"]),
        ("0..4", [*model, "--gammas", "5"]),
        ("max_batch", ["--config", str(config)]),
        ("is not a name", [*model, "--engine-id", "../x"]),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("tide-engine: ")
        assert says in lines[0]


async def test_connected_to_redis_it_taps_obeys_and_leaves_in_order(
    directories: Directories, valkey: Valkey, tmp_path: Path
) -> None:
    running = launch(tmp_path / "log", *arguments(directories, "--redis", valkey.url, "--engine-id", "e1"))
    try:
        assert httpx.get(f"{running.url}/admin/state", timeout=180).status_code == 404
        info = decode(EngineInfo, await eventually(lambda: bytes(valkey.client.get(keys.info("e1")) or b"")))  # pyright: ignore
        assert info.url == running.url
        assert info.version == checkpoint.version_of(directories.draft)
        for i, body in enumerate((SetCapture(True, 1 << 26), SetSchedule((3,)))):
            command = Command(f"c{i}", 1, 2**60, body)
            valkey.client.xadd(keys.commands("e1"), {"m": encode_command(command)})
            await eventually(lambda wanted=i + 1: valkey.client.xlen(keys.replies("e1")) == wanted)
        valkey.client.expire(keys.commands("e1"), 60)
        body = {"prompt": "hello world", "temperature": 0, "max_tokens": 30, "ignore_eos": True}
        tokens = httpx.post(f"{running.url}/v1/completions", json=body, timeout=180).json()["usage"][
            "completion_tokens"
        ]
        private = httpx.post(
            f"{running.url}/v1/completions", json=body, headers={"x-tide-no-capture": "1"}, timeout=180
        ).json()
        assert private["usage"]["completion_tokens"] == tokens == 30
        assert running.stop() == 0
        entries: list[dict[bytes, bytes]] = [fields for _, fields in valkey.client.xrange(keys.samples("e1"))]  # pyright: ignore
        headers = [decode_header(fields[b"h"]) for fields in entries]
        assert sum(header.rows for header in headers) == 11 + tokens - 1
        assert len({ref.request for header in headers for ref in header.requests}) == 1
        assert {header.states for header in headers} == {4}
        assert headers[-1].totals.skipped == 11 + tokens - 1
        assert [end.finish for header in headers for end in header.ends] == ["length"]
        assert not valkey.client.exists(keys.info("e1"))
        reports = [decode(Observation, fields[b"m"]) for _, fields in valkey.client.xrange(keys.observations("e1"))]  # pyright: ignore
        assert {counts.gamma for report in reports for counts in report.steps} == {3}
    finally:
        running.process.kill()
        running.process.wait()
