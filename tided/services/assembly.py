"""From chunks to runs: which rows belong together, which of them are due to be written, and what may then be acknowledged.

No IO. A request's rows are held until it has ended, so that a run is not cut where a shard happens to end; age and bytes bound
that. A chunk mentions several requests: each is a *part* of it, and parts of one chunk may be written at different times.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tided.draft.tensors import to_bf16
from tided.store.aside import Aside
from tided.store.ledger import SEQ_WINDOW, Seen, StoredChunk, totals_of
from tided.store.purge import is_through
from tided.store.samples import Run, Source
from tided.wire.samples import End, RequestRef, SampleHeader

_DTYPES = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}
_Key = tuple[str, str, Source]  # incarnation, request id
_LABELS = 2
"""A run's ids go on this far beyond its last row: row i predicts token i + 2."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When rows are due: so many rows of ended requests, or the oldest of them so old, `pressed_age_s` while a question waits for
    them; a request that has not ended after `hold_s`; everything when `hold_bytes` of payloads are held."""

    shard_rows: int
    shard_age_s: float
    hold_s: float = 60.0
    hold_bytes: int = 32 * 1024 * 1024
    pressed_age_s: float = 1.0


@dataclass(slots=True, eq=False)
class Chunk:
    """A stream entry that is held: `waiting` are its parts that are not durable yet."""

    entry: str
    incarnation: str
    seq: int
    bytes: int
    parts: int
    totals: dict[str, int]
    waiting: set[int]


@dataclass(slots=True)
class _Piece:
    position: int
    ids: NDArray[np.int32]
    states: NDArray[np.uint16]


@dataclass(slots=True, eq=False)
class _Part:
    chunk: Chunk
    index: int
    pieces: list[_Piece] = field(default_factory=list)
    rows: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    source: Source
    ref: RequestRef
    since_s: float
    parts: list[_Part] = field(default_factory=list)
    rows: int = 0
    tail: tuple[int, ...] = ()
    ended_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write, and what to acknowledge once that is durable. Nothing changes before `Assembly.written(plan)`.

    `aside`: runs for the self-test, which never train. `since_s`: when the first of the requests ended, or began where one has not.
    """

    runs: dict[Source, list[Run]]
    aside: dict[Source, list[Run]]
    acknowledgements: dict[str, list[StoredChunk]]  # by incarnation
    keys: tuple[_Key, ...]
    since_s: float


class SeenChunks:
    """Which chunks of one incarnation need not be taken again. Mirrors the rule of the ledger's script."""

    def __init__(self, seen: Seen) -> None:
        self._watermark = seen.watermark
        self._above = set(seen.above)
        self.partial = seen.partial

    def __contains__(self, seq: int) -> bool:
        return seq < self._watermark or seq in self._above

    def add(self, seq: int) -> None:
        self._above.add(seq)
        while self._watermark in self._above:
            self._above.remove(self._watermark)
            self._watermark += 1
        if seq - SEQ_WINDOW > self._watermark:
            self._watermark = seq - SEQ_WINDOW
            self._above = {item for item in self._above if item >= self._watermark}


class Assembly:
    """The rows of one engine that are on their way to disk."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests: dict[_Key, _Request] = {}
        self._chunks: dict[tuple[str, int], Chunk] = {}
        self._entries: set[str] = set()
        self._bytes = 0
        self.aside = Aside()
        self.pressed = False
        """Whether a question waits for rows."""

    @property
    def held_bytes(self) -> int:
        """Payload bytes of the chunks that are held."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether no more should be read before something was written."""
        return self._bytes >= self._limits.hold_bytes

    def holds_entry(self, entry: str) -> bool:
        return entry in self._entries

    def holds_chunk(self, incarnation: str, seq: int) -> bool:
        return (incarnation, seq) in self._chunks

    def incarnations(self) -> set[str]:
        return {incarnation for incarnation, _ in self._chunks}

    def add(
        self,
        entry: str,
        size: int,
        header: SampleHeader,
        payload: bytes,
        now_s: float,
        done: frozenset[int] = frozenset(),
    ) -> None:
        """Take a checked chunk. `size`: its bytes of credit; `done`: parts of it that an earlier collector stored."""
        waiting = set(range(len(header.requests))) - done
        chunk = Chunk(entry, header.incarnation, header.seq, size, len(header.requests), totals_of(header), waiting)
        self._chunks[header.incarnation, header.seq] = chunk
        self._entries.add(entry)
        self._bytes += size
        source = Source(header.engine, header.target, header.states, header.hidden, header.has_last)
        parts = {
            index: self._part(chunk, index, ref, source, now_s)
            for index, ref in enumerate(header.requests)
            if index in waiting
        }
        states, ids = _states(header, payload), np.frombuffer(header.ids, "<i4")
        at = 0
        for segment in header.segments:
            found = parts.get(segment.request)
            if found is not None:
                request, part = found
                rows = slice(at, at + segment.rows)
                part.pieces.append(_Piece(segment.position, ids[rows], states[rows]))
                part.rows += segment.rows
                request.rows += segment.rows
            at += segment.rows
        self._end(header.ends, parts, now_s)

    def _part(self, chunk: Chunk, index: int, ref: RequestRef, source: Source, now_s: float) -> tuple[_Request, _Part]:
        request = self._requests.setdefault((chunk.incarnation, ref.request, source), _Request(source, ref, now_s))
        part = _Part(chunk, index)
        request.parts.append(part)
        return request, part

    def _end(self, ends: Iterable[End], parts: dict[int, tuple[_Request, _Part]], now_s: float) -> None:
        for end in ends:
            if end.request in parts:
                request = parts[end.request][0]
                request.ended_s, request.tail = now_s, end.tail

    def end_incarnation(self, incarnation: str, now_s: float) -> None:
        """The producer is gone: no request of it will go on."""
        for key, request in self._requests.items():
            if key[0] == incarnation and request.ended_s is None:
                request.ended_s = now_s

    def due(self, now_s: float, *, everything: bool = False) -> Plan | None:
        """What should be written now, or None."""
        limits = self._limits
        if everything or self.full:
            chosen = list(self._requests)
        else:
            ended = [key for key, request in self._requests.items() if request.ended_s is not None]
            overdue = [
                key
                for key, request in self._requests.items()
                if request.ended_s is None and now_s - request.since_s >= limits.hold_s
            ]
            rows = sum(self._requests[key].rows for key in ended)
            oldest_s = min((self._requests[key].ended_s or 0.0 for key in ended), default=now_s)
            age_s = min(limits.shard_age_s, limits.pressed_age_s) if self.pressed else limits.shard_age_s
            now = rows >= limits.shard_rows or now_s - oldest_s >= age_s or overdue
            # A self-test waits for its probes.
            chosen = (
                ended + overdue if now else [key for key in ended if self._requests[key].ref.group in self.aside.groups]
            )
        # Chunks that carry totals alone wait for nothing.
        bare = [chunk for chunk in self._chunks.values() if not chunk.waiting]
        return self._plan(chosen, bare, now_s) if chosen or bare else None

    def purge(self, through: str) -> dict[str, list[StoredChunk]]:
        """Forget all rows of entries up to `through`; what must be acknowledged as purged, by incarnation.

        A request that goes on beyond has its later rows kept: they begin with a gap.
        """
        gone = {key: chunk for key, chunk in self._chunks.items() if is_through(chunk.entry, through)}
        rows: dict[Chunk, list[tuple[int, int]]] = {chunk: [] for chunk in gone.values()}
        for key, request in list(self._requests.items()):
            for part in [part for part in request.parts if part.chunk in rows]:
                rows[part.chunk].append((part.index, part.rows))
                request.parts.remove(part)
                request.rows -= part.rows
            if not request.parts:
                del self._requests[key]
        acknowledgements: dict[str, list[StoredChunk]] = {}
        for (incarnation, _), chunk in sorted(gone.items(), key=lambda item: item[0]):
            parts = tuple(rows[chunk])
            stored = StoredChunk(chunk.entry, chunk.seq, chunk.bytes, chunk.parts, parts, chunk.totals)
            acknowledgements.setdefault(incarnation, []).append(stored)
            self._forget(chunk)
        return acknowledgements

    def _forget(self, chunk: Chunk) -> None:
        del self._chunks[chunk.incarnation, chunk.seq]
        self._entries.discard(chunk.entry)
        self._bytes -= chunk.bytes

    def _plan(self, chosen: list[_Key], bare: list[Chunk], now_s: float) -> Plan:
        runs: dict[Source, list[Run]] = {}
        aside: dict[Source, list[Run]] = {}
        stored: dict[tuple[str, int], list[tuple[int, int]]] = {(chunk.incarnation, chunk.seq): [] for chunk in bare}
        for key in chosen:
            request = self._requests[key]
            is_aside = key[0] in self.aside.incarnations or request.ref.group in self.aside.groups
            (aside if is_aside else runs).setdefault(request.source, []).extend(_runs(request))
            for part in request.parts:
                stored.setdefault((part.chunk.incarnation, part.chunk.seq), []).append((part.index, part.rows))
        acknowledgements: dict[str, list[StoredChunk]] = {}
        for (incarnation, seq), parts in sorted(stored.items()):
            chunk = self._chunks[incarnation, seq]
            acknowledgements.setdefault(incarnation, []).append(
                StoredChunk(chunk.entry, chunk.seq, chunk.bytes, chunk.parts, tuple(parts), chunk.totals)
            )
        requests = [self._requests[key] for key in chosen]
        since_s = min((r.since_s if r.ended_s is None else r.ended_s for r in requests), default=now_s)
        return Plan(_some(runs), _some(aside), acknowledgements, tuple(chosen), since_s)

    def written(self, plan: Plan) -> list[tuple[str, int]]:
        """The plan is durable: forget it. Gives the chunks (incarnation, seq) that are whole now."""
        for key in plan.keys:
            del self._requests[key]
        whole: list[tuple[str, int]] = []
        for incarnation, chunks in plan.acknowledgements.items():
            for stored in chunks:
                chunk = self._chunks[incarnation, stored.seq]
                chunk.waiting.difference_update(index for index, _ in stored.stored)
                if not chunk.waiting:
                    self._forget(chunk)
                    whole.append((incarnation, stored.seq))
        return whole


def _states(header: SampleHeader, payload: bytes) -> NDArray[np.uint16]:
    rows: NDArray[Any] = np.frombuffer(payload, _DTYPES[header.dtype])
    return to_bf16(rows).reshape(header.rows, header.states, header.hidden)


def _some(runs: dict[Source, list[Run]]) -> dict[Source, list[Run]]:
    return {source: found for source, found in runs.items() if found}


def _runs(request: _Request) -> list[Run]:
    """The request's rows cut at each gap. Only the last run is followed by the tail."""
    groups: list[list[_Piece]] = []
    end = -1
    for part in sorted(request.parts, key=lambda part: part.chunk.seq):
        for piece in part.pieces:
            if piece.position != end or not groups:
                groups.append([])
            groups[-1].append(piece)
            end = piece.position + len(piece.ids)
    tail = np.array(request.tail[:_LABELS], dtype="<i4")
    return [
        Run(
            request=request.ref.request,
            group=request.ref.group,
            prompt_tokens=request.ref.prompt_tokens,
            first_position=pieces[0].position,
            ids=np.concatenate([*(piece.ids for piece in pieces), *([tail] if pieces is groups[-1] else [])]),
            states=tuple(piece.states for piece in pieces),
        )
        for pieces in groups
    ]
