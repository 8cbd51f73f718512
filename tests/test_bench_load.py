"""The load generator against a small OpenAI-compatible server."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.load import Traffic, accept_length, each
from bench.traffic import DOMAINS
from tests.support import eventually

TIDE = {"spec_steps": 4, "drafted": 12, "accepted": 6}


class Server:
    """Streams two pieces; fails every prompt whose number is in `failing`. Nothing is answered before `meet` requests run at once."""

    def __init__(self, *, tide: bool = True, failing: frozenset[int] = frozenset(), meet: int = 1) -> None:
        self.tide, self.failing, self.meet = tide, failing, meet
        self._met = asyncio.Event()
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most = 0
        self.url = ""

    async def chat(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if len(self.bodies) - 1 in self.failing:
            return JSONResponse({"error": {"message": "no"}}, 500)
        return StreamingResponse(self._stream())

    async def _stream(self) -> AsyncIterator[str]:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running >= self.meet:
            self._met.set()
        await self._met.wait()
        for number, text in enumerate(("a", "b")):
            choice = {"index": 0, "delta": {"content": text}, "token_ids": [number]}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0.01)
        usage = {"completion_tokens": 10, **({"tide": TIDE} if self.tide else {})}
        self.running -= 1
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator["Server"]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(server.serve([listener]))
        await eventually(lambda: server.started)
        try:
            yield self
        finally:
            server.should_exit = True
            with suppress(asyncio.CancelledError):
                await task
            listener.close()


async def test_each_prompt_is_asked_once_at_the_given_concurrency() -> None:
    prompts = DOMAINS["code"].prompts("measure")[:12]
    async with Server(meet=4).serving() as server:
        load = await each(server.url, prompts, 4, token_ids=True)
    assert len(load.answers) == len(server.bodies) == 12
    assert server.most == 4
    assert {answer.prompt for answer in load.answers} == set(prompts)
    answer = load.answers[0]
    assert (answer.text, answer.token_ids, answer.tokens, answer.error) == ("ab", (0, 1), 10, "")
    assert 0 < answer.ttft_s < answer.seconds
    assert answer.accept_length == 2.5
    assert accept_length(load.answers) == 2.5
    assert load.tokens == 120
    assert all(body["temperature"] == 0 and body["stream"] for body in server.bodies)


async def test_a_server_without_our_counts_is_measured_too() -> None:
    async with Server(tide=False).serving() as server:
        load = await each(server.url, DOMAINS["code"].prompts("measure")[:2], 1)
    assert [answer.accept_length for answer in load.answers] == [None, None]
    assert accept_length(load.answers) == 1.0


async def test_failures_are_counted_and_the_others_go_on() -> None:
    async with Server(failing=frozenset({1})).serving() as server:
        load = await each(server.url, DOMAINS["code"].prompts("measure")[:4], 1)
    assert load.errors == 1
    assert [answer.error for answer in load.answers] == ["", "HTTP 500", "", ""]
    gone = await each(server.url, DOMAINS["code"].prompts("measure")[:1], 1)
    assert gone.answers[0].error == "ConnectError"


async def test_traffic_can_be_paused_and_resumed() -> None:
    async with Server().serving() as server:
        async with Traffic(server.url, DOMAINS["code"].endless("train"), 3) as traffic:
            await eventually(lambda: len(traffic.load.answers) >= 6)
            await traffic.pause()
            asked, seconds = len(server.bodies), traffic.load.seconds
            assert server.running == 0
            assert asked == len(traffic.load.answers)
            assert seconds > 0
            traffic.resume()
            await eventually(lambda: len(traffic.load.answers) >= asked + 3)
        assert traffic.load.errors == 0
        assert traffic.load.seconds > seconds
