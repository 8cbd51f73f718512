"""Load on an OpenAI-compatible server: streamed chat requests, what each took, and what speculation did for it.

Our engine adds `usage.tide` with the counts of speculation; a server without it (vLLM) gives answers without these.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.traffic import Prompt

NO_DRAFT = {"x-tide-gamma": "0"}
"""Header: no drafting while this request runs alone; the same engine's speed without speculation."""
NO_CAPTURE = {"x-tide-no-capture": "1"}
"""Header: this request's states are not tapped. Measurement prompts are never trained on."""


@dataclass(frozen=True)
class Answer:
    """One finished request; `error` is "" when it succeeded. `seconds` run from sending to the last byte."""

    prompt: Prompt
    started_s: float  # time.monotonic()
    seconds: float
    ttft_s: float
    tokens: int
    text: str
    token_ids: tuple[int, ...] = ()
    spec_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    error: str = ""
    arrived_s: tuple[float, ...] = ()  # time.monotonic() of each piece of text
    prompt_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens over the whole request, prefill included."""
        return self.tokens / self.seconds

    @property
    def accept_length(self) -> float | None:
        """Tokens a step with drafting, the bonus token included; None without such steps."""
        return 1 + self.accepted / self.spec_steps if self.spec_steps else None


def longest_gap(answers: Iterable[Answer], start_s: float, end_s: float) -> float:
    """The longest silence of a stream that overlaps an interval of time.monotonic(), between two of its pieces; 0.0 without any."""
    pairs = (pair for answer in answers for pair in itertools.pairwise(answer.arrived_s))
    return max((after - before for before, after in pairs if after >= start_s and before <= end_s), default=0.0)


def accept_length(answers: Iterable[Answer]) -> float:
    """Acceptance length over all steps of `answers` that drafted; 1.0, what no speculation gives, without any."""
    steps = accepted = 0
    for answer in answers:
        steps += answer.spec_steps
        accepted += answer.accepted
    return 1 + accepted / steps if steps else 1.0


@asynccontextmanager
async def client(url: str, timeout_s: float = 120.0) -> AsyncGenerator[httpx.AsyncClient]:
    """A client for one server, without a limit on connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits, trust_env=False) as opened:
        yield opened


async def ask(
    http: httpx.AsyncClient,
    prompt: Prompt,
    *,
    model: str = "",
    headers: Mapping[str, str] | None = None,
    ignore_eos: bool = False,
    token_ids: bool = False,
    temperature: float = 0.0,
) -> Answer:
    """One streamed request, greedy without a `temperature`. Never raises for what server or network did: it is in `Answer.error`.

    `token_ids` asks for the ids of the answer's tokens, which vLLM and our engine give as `choices[0].token_ids`.
    """
    body: dict[str, Any] = {
        "messages": prompt.messages,
        "max_tokens": prompt.max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model:
        body["model"] = model
    if ignore_eos:
        body["ignore_eos"] = True
    if token_ids:
        body["return_token_ids"] = True
    started = time.monotonic()
    usage, text, ids, arrived = dict[str, Any](), list[str](), list[int](), list[float]()
    error = ""
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=dict(headers or {})) as response:
            if response.status_code != 200:
                await response.aread()
                raise _Failed(f"HTTP {response.status_code}")
            async for event in _events(response):
                if "error" in event:
                    raise _Failed("the server reported an error in the stream")
                for choice in event.get("choices", ()):
                    piece = choice.get("delta", {}).get("content") or ""
                    if piece:
                        arrived.append(time.monotonic())
                    text.append(piece)
                    ids.extend(choice.get("token_ids") or ())
                usage = event.get("usage") or usage
            if not usage:
                raise _Failed("the stream ended without usage")
    except (httpx.HTTPError, _Failed, json.JSONDecodeError) as exc:
        error = str(exc) if isinstance(exc, _Failed) else type(exc).__name__
    tide = usage.get("tide") or {}
    return Answer(
        prompt,
        started,
        time.monotonic() - started,
        arrived[0] - started if arrived else 0.0,
        usage.get("completion_tokens", 0),
        "".join(text),
        tuple(ids),
        tide.get("spec_steps", 0),
        tide.get("drafted", 0),
        tide.get("accepted", 0),
        error,
        tuple(arrived),
        usage.get("prompt_tokens", 0),
    )


class _Failed(Exception):
    """What went wrong with one request."""


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


@dataclass
class Load:
    """What a stretch of load gave."""

    answers: list[Answer] = field(default_factory=list[Answer])
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def errors(self) -> int:
        return sum(bool(answer.error) for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


async def each(
    url: str,
    prompts: Iterable[Prompt],
    concurrency: int,
    *,
    on_answer: Callable[[Answer], None] | None = None,
    **how: Any,
) -> Load:
    """Asks every prompt once, `concurrency` at a time; `how` goes to `ask`."""
    load, source, started = Load(), iter(prompts), time.monotonic()
    async with client(url) as http, asyncio.TaskGroup() as group:

        async def one() -> None:
            for prompt in source:
                answer = await ask(http, prompt, **how)
                load.answers.append(answer)
                if on_answer is not None:
                    on_answer(answer)

        for _ in range(concurrency):
            group.create_task(one())
    load.seconds = time.monotonic() - started
    return load


class Traffic:
    """Steady traffic in the background: `concurrency` requests in flight, which can be paused, and change domain.

    Use as an async context manager; leaving it ends the requests in flight.
    """

    def __init__(self, url: str, prompts: Iterator[Prompt], concurrency: int, **how: Any) -> None:
        self.prompts = prompts
        self.load = Load()
        self._url, self._concurrency, self._how = url, concurrency, how
        self._go, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._in_flight = 0
        self._resumed_s: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Traffic":
        self._http_context = client(self._url)
        self._http = await self._http_context.__aenter__()
        self._tasks = [asyncio.create_task(self._serve()) for _ in range(self._concurrency)]
        self.resume()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        self._stop_clock()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http_context.__aexit__(*failure)

    def resume(self) -> None:
        """Go on sending."""
        if self._resumed_s is None:
            self._resumed_s = time.monotonic()
        self._go.set()

    async def pause(self) -> None:
        """Send no more, and return when the requests in flight are done."""
        self._go.clear()
        await self._idle.wait()
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._resumed_s is not None:
            self.load.seconds += time.monotonic() - self._resumed_s
            self._resumed_s = None

    async def _serve(self) -> None:
        while True:
            await self._go.wait()
            self._in_flight += 1
            self._idle.clear()
            try:
                answer = await ask(self._http, next(self.prompts), **self._how)
            finally:
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
            self.load.answers.append(answer)
            if answer.error:
                await asyncio.sleep(0.5)
