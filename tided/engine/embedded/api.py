"""The engine's HTTP side: OpenAI's completions and chat completions, health, metrics, and the local admin routes."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import anyio
import anyio.to_thread
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tided.engine.embedded.control import EmbeddedControl
from tided.engine.embedded.sampling import SamplingParams
from tided.engine.embedded.scheduler import Output, Request, Scheduler
from tided.engine.embedded.text import StopText, Tokens
from tided.model.engines import RequestStats
from tided.model.errors import Refused, Unavailable
from tided.model.ids import new_id

NO_CAPTURE_HEADER = "x-tide-no-capture"
GAMMA_HEADER = "x-tide-gamma"
"""Drafted tokens a step at most, while the request runs alone: 0 measures the same engine without speculation."""
DEFAULT_MAX_TOKENS = 256
MAX_BODY_BYTES = 1_048_576

Text = Annotated[str, Field(min_length=1)]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Body(BaseModel):
    """What both routes take. Fields that this engine does not know are ignored, as OpenAI's clients expect."""

    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: int = 1
    stream: bool = False
    stream_options: _StreamOptions | None = None
    logprobs: Literal[False] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False  # as vLLM: the answer's ids beside its text

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(_Body):
    prompt: str | list[int]


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: str
    content: str | list[_Part]


class ChatBody(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class _Gammas(BaseModel):
    gammas: tuple[int, ...]


class _Swap(BaseModel):
    path: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class _Shape:
    """How one of the two routes names things."""

    prefix: str
    kind: str
    chunk_kind: str
    whole: Callable[[str], dict[str, Any]]
    delta: Callable[[str, bool], dict[str, Any]]  # text, whether it is the first


COMPLETION = _Shape(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text, _: {"text": text}
)
CHAT = _Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text, first: {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})},
)


class Api:
    """The routes over one scheduler."""

    def __init__(self, scheduler: Scheduler, control: EmbeddedControl, tokens: Tokens, *, admin: bool) -> None:
        self._scheduler, self._control, self._tokens = scheduler, control, tokens
        self._name = scheduler.target.info.name
        self._registry = CollectorRegistry()
        self._registry.register(_Metrics(scheduler))
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        if admin:
            routes += [
                Route("/admin/state", self._state),
                Route("/admin/gammas", self._set_gammas, methods=["POST"]),
                Route("/admin/swap", self._swap, methods=["POST"]),
            ]
        self.app = Starlette(
            routes=routes,
            exception_handlers={
                ValidationError: _invalid,
                Refused: _refused,
                Unavailable: _unavailable,
                ClientDisconnect: _gone,
                404: _no_route,
                405: _no_route,
            },
        )

    async def _chat(self, http: HttpRequest) -> Response:
        body = ChatBody.model_validate(await _json(http))
        messages = [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)}
            for m in body.messages
        ]
        prompt = self._tokens.chat(messages)
        return await self._answer(http, body, prompt, body.max_completion_tokens or body.max_tokens, CHAT)

    async def _completion(self, http: HttpRequest) -> Response:
        body = CompletionBody.model_validate(await _json(http))
        prompt = self._tokens.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await self._answer(http, body, prompt, body.max_tokens, COMPLETION)

    async def _answer(
        self, http: HttpRequest, body: _Body, prompt: list[int], max_tokens: int | None, shape: _Shape
    ) -> Response:
        if body.n != 1:
            raise Refused("n must be 1; send the request several times for several answers")
        run = _Run(self._scheduler, self._tokens, body.stops)
        run.submit(
            Request(
                id=new_id(shape.prefix),
                prompt=tuple(prompt),
                max_tokens=max_tokens or DEFAULT_MAX_TOKENS,
                emit=run.emit,
                params=SamplingParams(body.temperature, body.top_p, body.seed),
                ignore_eos=body.ignore_eos,
                opt_out=http.headers.get(NO_CAPTURE_HEADER, "") == "1",
                gamma_limit=_gamma_limit(http.headers.get(GAMMA_HEADER)),
            )
        )
        head = {"id": run.id, "created": int(time.time()), "model": self._name}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(run, {**head, "object": shape.chunk_kind}, shape, usage, body.return_token_ids)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        text = await _whole(http, run)
        ids = {"token_ids": run.ids} if body.return_token_ids else {}
        choice = {"index": 0, **shape.whole(text), **ids, "logprobs": None, "finish_reason": run.finish}
        return JSONResponse({**head, "object": shape.kind, "choices": [choice], "usage": run.usage()})

    async def _models(self, _: HttpRequest) -> Response:
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "tided"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: HttpRequest) -> Response:
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _state(self, _: HttpRequest) -> Response:
        scheduler = self._scheduler
        state = {
            "gammas": scheduler.gammas,
            "version": scheduler.version,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "totals": asdict(scheduler.totals),
            "profile": None if self._control.profile is None else asdict(self._control.profile),
        }
        return JSONResponse(state)

    async def _set_gammas(self, http: HttpRequest) -> Response:
        self._scheduler.set_gammas(_Gammas.model_validate(await _json(http)).gammas)
        return JSONResponse({"gammas": self._scheduler.gammas})

    async def _swap(self, http: HttpRequest) -> Response:
        body = _Swap.model_validate(await _json(http))
        return JSONResponse(await anyio.to_thread.run_sync(self._control.swap, Path(body.path), body.version))


class _Run:
    """One request on its way: outputs arrive from the step thread, text leaves here."""

    def __init__(self, scheduler: Scheduler, tokens: Tokens, stops: list[str]) -> None:
        self.id = ""
        self.finish = ""
        self.ids: list[int] = []
        self._scheduler = scheduler
        self._text = StopText(tokens, stops)
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._stats: RequestStats | None = None
        self._decode_steps = 0

    def submit(self, request: Request) -> None:
        self.id = request.id
        self._scheduler.submit(request)

    def emit(self, output: Output) -> None:
        """Called on the step thread."""
        # A loop that is closed has no client left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    def cancel(self) -> None:
        """The client is gone. A request that is over is left as it is."""
        if self._stats is None:
            self._scheduler.cancel(self.id)

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text as it comes, up to a stop string."""
        while True:
            output = await self._outputs.get()
            if output.finish:
                self._stats, self._decode_steps = output.stats, output.decode_steps
                self.finish = "stop" if self._text.stopped else output.finish
                if text := self._text.rest():
                    yield text
                return
            if self._text.stopped:
                continue
            self.ids += output.tokens
            if text := self._text.push(output.tokens):
                yield text
            if self._text.stopped:
                self._scheduler.cancel(self.id, "stop")

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts, and in `tide` what speculation did. `accept_length`: tokens a decoding step gave."""
        stats = self._stats or RequestStats(0, 0, 0, 0, 0, "")
        steps = self._decode_steps
        return {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.output_tokens,
            "total_tokens": stats.prompt_tokens + stats.output_tokens,
            "tide": {
                "spec_steps": stats.spec_steps,
                "drafted": stats.drafted,
                "accepted": stats.accepted,
                "accept_length": round((stats.output_tokens - 1) / steps, 4) if steps else 0.0,
                "version": stats.version,
            },
        }


async def _whole(http: HttpRequest, run: _Run) -> str:
    """The whole answer; a client that hangs up cancels it."""
    text: list[str] = []

    async def watch(scope: anyio.CancelScope) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch, group.cancel_scope)
            text = [piece async for piece in run.pieces()]
            group.cancel_scope.cancel()
    finally:
        run.cancel()
    return "".join(text)


async def _events(
    run: _Run, head: dict[str, Any], shape: _Shape, include_usage: bool, include_ids: bool
) -> AsyncIterator[str]:
    """Server-sent events: the text as it comes, the finish reason, the usage if asked for, [DONE]."""
    try:
        first = True
        async for text in run.pieces():
            choice = {"index": 0, **shape.delta(text, first), "finish_reason": None}
            yield _event({**head, "choices": [choice]})
            first = False
        ids = {"token_ids": run.ids} if include_ids else {}
        yield _event({**head, "choices": [{"index": 0, **shape.delta("", first), **ids, "finish_reason": run.finish}]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": run.usage()})
        yield "data: [DONE]\n\n"
    finally:
        run.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _gamma_limit(header: str | None) -> int | None:
    if header is None:
        return None
    if not header.isdecimal():
        raise Refused(f"the header {GAMMA_HEADER} must be a whole number from 0")
    return int(header)


async def _json(http: HttpRequest) -> dict[str, Any]:
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise Refused(f"the body is larger than the {MAX_BODY_BYTES} bytes that are read")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Refused("the body is not JSON") from exc
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    return cast("dict[str, Any]", body)


def _error(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


async def _invalid(_: HttpRequest, exc: Exception) -> Response:
    assert isinstance(exc, ValidationError)
    # The first problem, without the value: it may be somebody's prompt.
    problem = exc.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "body"
    return _error(400, f"{where}: {problem['msg']}", "invalid_request_error")


async def _refused(_: HttpRequest, exc: Exception) -> Response:
    return _error(400, str(exc), "invalid_request_error")


async def _unavailable(_: HttpRequest, exc: Exception) -> Response:
    return _error(503, str(exc), "unavailable_error")


async def _gone(_: HttpRequest, exc: Exception) -> Response:
    return _error(400, "the client went away", "invalid_request_error")


async def _no_route(http: HttpRequest, exc: Exception) -> Response:
    status = getattr(exc, "status_code", 404)
    return _error(status, f"{http.method} {http.url.path} is not served here", "invalid_request_error")


class _Metrics(Collector):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        scheduler, totals = self._scheduler, self._scheduler.totals
        yield GaugeMetricFamily("tide_engine_requests_running", "Requests in the batch.", scheduler.running)
        yield GaugeMetricFamily("tide_engine_requests_waiting", "Requests in the queue.", scheduler.waiting)
        finished = CounterMetricFamily("tide_engine_requests", "Finished requests.", labels=["finish"])
        for reason, count in totals.finished.items():
            finished.add_metric([reason], count)
        yield finished
        for name, what, value in (
            ("prompt_tokens", "Prompt tokens of finished requests.", totals.prompt_tokens),
            ("output_tokens", "Generated tokens of finished requests.", totals.output_tokens),
            ("decode_steps", "Decoding steps.", totals.steps),
            ("decode_seconds", "Seconds spent in decoding steps.", totals.step_s),
            ("drafted_tokens", "Drafted tokens of finished requests.", totals.drafted),
            ("accepted_tokens", "Accepted drafted tokens of finished requests.", totals.accepted),
        ):
            yield CounterMetricFamily(f"tide_engine_{name}", what, value)
        gammas = GaugeMetricFamily("tide_engine_gamma", "Drafted tokens by batch size.", labels=["batch"])
        for index, gamma in enumerate(scheduler.gammas):
            gammas.add_metric([str(index + 1)], gamma)
        yield gammas
