"""tided's side of the protocol for the contract: sends commands, reads heartbeats, replies and reports, and takes the samples."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import redis

from tests.support import eventually
from tided.draft import bundle
from tided.draft.identity import version_of
from tided.model.engines import EngineInfo, Observation, TapTotals
from tided.model.ids import prompt_group
from tided.wire import fetch, keys
from tided.wire.control import Body, Command, Deliver, Reply, SetCapture, decode, encode_command
from tided.wire.samples import SampleHeader, check_payload, decode_header

CREDIT_BYTES = 256 << 20
EPOCH = 100
PATIENCE_S = 120.0
"""How long an engine may take for what should be quick: it only says when to give up."""

Array = npt.NDArray[np.float32]


@dataclass
class Tapped:
    """What arrived of one request. `rows`: states [states, hidden] in float32 by position."""

    prompt_tokens: int
    ids: dict[int, int] = field(default_factory=dict[int, int])
    rows: dict[int, Array] = field(default_factory=dict[int, Array])
    finish: str = ""
    tail: tuple[int, ...] = ()

    def tokens(self) -> list[int]:
        """From the first tapped position to the end of the request; raises where a position is missing."""
        first = min(self.ids)
        return [self.ids[position] for position in range(first, first + len(self.ids))] + list(self.tail)


class Peer:
    """Talks to one engine as a leader would. Chunks are taken off the stream, and their credit with them, as the collector does."""

    def __init__(self, client: redis.Redis, engine: str) -> None:
        self.client, self.engine = client, engine
        self.headers: list[SampleHeader] = []
        self._requests: dict[tuple[str, str], tuple[bytes, Tapped]] = {}
        self._numbers = itertools.count()

    # --- heartbeat and commands ---

    def info(self) -> EngineInfo | None:
        """The heartbeat, or None without one."""
        data = cast("bytes | None", self.client.get(keys.info(self.engine)))
        return None if data is None else decode(EngineInfo, data)

    async def here(self, *, not_incarnation: str = "") -> EngineInfo:
        """The heartbeat once there is one, of another life than `not_incarnation`."""

        def check() -> EngineInfo | None:
            info = self.info()
            return info if info is not None and info.incarnation != not_incarnation else None

        return await eventually(check, PATIENCE_S)

    def send(self, body: Body, *, epoch: int = EPOCH, command: str = "", expires_in_ms: int = 600_000) -> str:
        """Send a command and give its id."""
        name = command or f"contract-{next(self._numbers)}"
        now_ms = cast("Any", self.client.time())[0] * 1000
        stream = keys.commands(self.engine)
        self.client.xadd(stream, {"m": encode_command(Command(name, epoch, now_ms + expires_in_ms, body))})
        self.client.expire(stream, 3600)
        return name

    def replies(self, command: str) -> list[Reply]:
        entries = cast("list[Any]", self.client.xrange(keys.replies(self.engine)))
        decoded = [decode(Reply, fields[b"m"]) for _, fields in entries]
        return [reply for reply in decoded if reply.command == command]

    async def ask(self, body: Body, *, epoch: int = EPOCH, expires_in_ms: int = 600_000) -> Reply:
        """Send a command and wait for its reply."""
        command = self.send(body, epoch=epoch, expires_in_ms=expires_in_ms)
        return (await eventually(lambda: self.replies(command), PATIENCE_S))[0]

    async def deliver(self, draft: Path) -> Reply:
        """Send a draft over Redis, answering what the engine asks for, and wait for its reply."""
        version = version_of(draft)
        command = self.send(Deliver(version, bundle.size_of(draft)))
        parts = keys.parts(self.engine, command)

        def check() -> Reply | None:
            asked = cast("bytes | None", self.client.lpop(keys.fetches(self.engine)))
            if asked is not None:
                request = fetch.check(decode(fetch.FetchRequest, asked))
                assert (request.command, request.version) == (command, version)
                data = bundle.read(draft, request.offset, request.bytes)
                self.client.rpush(parts, *fetch.parts(request.offset, data))
                self.client.expire(parts, fetch.TTL_S)
            return next(iter(self.replies(command)), None)

        return await eventually(check, PATIENCE_S)

    async def capture(self, on: bool = True) -> None:
        reply = await self.ask(SetCapture(on, CREDIT_BYTES))
        assert reply.ok, reply.error

    def observations(self) -> list[Observation]:
        entries = cast("list[Any]", self.client.xrange(keys.observations(self.engine)))
        return [decode(Observation, fields[b"m"]) for _, fields in entries]

    # --- samples ---

    @property
    def totals(self) -> TapTotals:
        """The newest that a header or a report of this life told."""
        info = self.info()
        told = [report.tap for report in self.observations() if info and report.incarnation == info.incarnation]
        return told[-1] if told else TapTotals()

    def tapped(self, prompt: Sequence[int]) -> list[Tapped]:
        """What arrived so far of the requests with this prompt, in the order of their first chunks."""
        self.drain()
        group = prompt_group(np.array(prompt, dtype="<i4").tobytes())
        return [request for known, request in self._requests.values() if known == group]

    async def ended(self, prompt: Sequence[int], requests: int = 1) -> list[Tapped]:
        """The same, once so many of them have ended."""

        def check() -> list[Tapped] | None:
            found = self.tapped(prompt)
            return found if len([request for request in found if request.finish]) >= requests else None

        return await eventually(check, PATIENCE_S)

    def drain(self) -> None:
        """Take what waits off the stream."""
        stream, credit = keys.samples(self.engine), keys.credit(self.engine)
        for entry, fields in cast("list[Any]", self.client.xrange(stream)):
            header, payload = decode_header(fields[b"h"]), fields[b"p"]
            check_payload(header, payload)
            self._take(header, payload)
            pipeline = self.client.pipeline(transaction=True)
            pipeline.xdel(stream, entry)
            pipeline.decrby(credit, len(fields[b"h"]) + len(payload))
            pipeline.execute()

    def _take(self, header: SampleHeader, payload: bytes) -> None:
        self.headers.append(header)
        states = _float32(header, payload)
        ids = np.frombuffer(header.ids, dtype="<i4")
        requests: list[Tapped] = []
        for ref in header.requests:
            name = (header.incarnation, ref.request)
            requests.append(self._requests.setdefault(name, (ref.group, Tapped(ref.prompt_tokens)))[1])
        at = 0
        for segment in header.segments:
            request = requests[segment.request]
            for i in range(segment.rows):
                position = segment.position + i
                assert not request.ids or position > max(request.ids), "positions of a request must grow"
                request.ids[position], request.rows[position] = int(ids[at + i]), states[at + i]
            at += segment.rows
        for end in header.ends:
            assert not requests[end.request].finish, "a request must end once"
            requests[end.request].finish, requests[end.request].tail = end.finish, end.tail


def _float32(header: SampleHeader, payload: bytes) -> Array:
    """The payload as [rows, states, hidden]."""
    if header.dtype == "bfloat16":
        bits = np.frombuffer(payload, dtype="<u2").astype(np.uint32) << 16
        values = bits.view(np.float32)
    else:
        values = np.frombuffer(payload, dtype={"float16": "<f2", "float32": "<f4"}[header.dtype]).astype(np.float32)
    return values.reshape(header.rows, header.states, header.hidden)
