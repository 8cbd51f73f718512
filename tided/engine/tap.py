"""The tap: the target's hidden states of accepted tokens, copied into preallocated chunk slots on the engine's step thread.

The engine calls `begin`, `record` and `end`; one call of `record` is one copy (two where a slot ends). Nothing in here waits,
talks to the network or raises into the engine: when no slot is free the rows are shed and counted, and any failure of the tap
itself is counted, logged once and costs its rows only. A publisher thread takes full slots, or slots that are `flush_s` old.

Used as it is by the embedded engine, by the plugins for vLLM and SGLang and by tided.client. Rows are a torch tensor, or anything with
the buffer protocol (a numpy array, bytes): torch is imported only by whoever hands in tensors, numpy only for those of a device. Rows of
a device are copied behind what it computes; the publisher, not the engine, waits for them.
"""

import logging
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tided.model.engines import TapTotals
from tided.model.ids import check_digest, check_name, prompt_group
from tided.wire.samples import CHUNK_BYTES, ITEM_BYTES, End, RequestRef, Segment

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    HostRows = Buffer | NDArray[Any]  # numpy declares itself a Buffer to type checkers from Python 3.12 on only

log = logging.getLogger(__name__)

# Bounds of one chunk's metadata, so that its header stays below wire.samples.MAX_HEADER_BYTES whatever the rows are.
MAX_ROWS = 4096
MAX_SEGMENTS = 2048
MAX_REQUESTS = 256
MAX_SPAN = 128
MAX_TAIL = 16
MAX_ENDS_WAITING = 1024
MAX_REQUEST_ID = 256
_FORMATS = {"bfloat16": "H", "float16": "e", "float32": "f"}
"""How the buffer protocol names the items; bfloat16, which it does not know, travels as its bits."""


@dataclass(frozen=True, slots=True)
class TapSettings:
    """What the rows are, and how much host memory they may wait in: `ring_slots` chunks of about 1 MB.

    `states` counts the last hidden state too, when `has_last`. `dtype` is a key of tided.wire.samples.ITEM_BYTES.
    """

    engine: str
    incarnation: str
    target: str
    states: int
    hidden: int
    dtype: str = "bfloat16"
    has_last: bool = False
    ring_slots: int = 16
    flush_s: float = 0.2

    @property
    def row_bytes(self) -> int:
        return self.states * self.hidden * ITEM_BYTES[self.dtype]

    @property
    def slot_rows(self) -> int:
        """Whole rows of a chunk: as many as fit the wire's chunk size, at least one."""
        return min(max(CHUNK_BYTES // self.row_bytes, 1), MAX_ROWS)


class Slot:
    """One chunk being filled, or on its way out. Its buffers are allocated, and their pages touched, once. `pinned`: a device writes to
    them by itself."""

    __slots__ = (
        *("_copied", "_index", "_memory", "_settings", "_tensor"),
        *("ends", "ids", "opened_s", "requests", "rows", "segments"),
    )

    def __init__(self, settings: TapSettings, pinned: bool) -> None:
        self._settings = settings
        self._memory = _memory(settings.slot_rows * settings.row_bytes, pinned)
        self._tensor: torch.Tensor | None = None
        self.ids = array("i", bytes(4 * settings.slot_rows))
        self.clear()

    def clear(self) -> None:
        self.rows = 0
        self.opened_s = 0.0
        self.requests: list[RequestRef] = []
        self.segments: list[Segment] = []
        self.ends: list[End] = []
        self._index: dict[str, int] = {}
        self._copied: torch.Event | None = None  # behind the newest copy from a device

    def payload(self, row_bytes: int) -> memoryview:
        """The filled rows' bytes, not copied: valid until the slot is given back. Waits for what a device has not copied yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._memory[: self.rows * row_bytes]

    def copy(self, at: int, rows: "torch.Tensor | memoryview", first: int, count: int) -> None:
        """Put `count` of `rows`, from `first` on, into rows `at`.. of the slot: a tensor, or the rows' bytes one after the other."""
        if isinstance(rows, memoryview):
            size = self._settings.row_bytes
            self._memory[at * size : (at + count) * size] = rows[first * size : (first + count) * size]
            return
        from tided.engine.device import SideStream, on_host

        if on_host(rows):
            self._states()[at : at + count].copy_(rows[first : first + count])
        else:
            side = SideStream.of(rows.device)
            self._copied = side.copy(self._states()[at : at + count], rows[first : first + count])

    def _states(self) -> "torch.Tensor":
        """The slot's memory as a tensor, made when the first tensor arrives."""
        if self._tensor is None:
            import torch

            settings = self._settings
            flat = torch.frombuffer(self._memory, dtype=getattr(torch, settings.dtype))
            self._tensor = flat.view(settings.slot_rows, settings.states, settings.hidden)
        return self._tensor

    def reference(self, ref: RequestRef) -> int:
        """The index of `ref` in this chunk, added when it is new."""
        index = self._index.get(ref.request)
        if index is None:
            index = self._index[ref.request] = len(self.requests)
            self.requests.append(ref)
        return index

    def note(self, ref: RequestRef, position: int, rows: int) -> None:
        """Say whose the next `rows` rows are. What continues the previous segment is merged into it."""
        index = self.reference(ref)
        last = self.segments[-1] if self.segments else None
        if last is not None and last.request == index and last.position + last.rows == position:
            self.segments[-1] = Segment(index, last.position, last.rows + rows)
        else:
            self.segments.append(Segment(index, position, rows))
        self.rows += rows

    @property
    def empty(self) -> bool:
        return not self.rows and not self.ends


@dataclass(slots=True)
class _Piece:
    """Rows `start` to `start + rows` of one record call, all of one request."""

    ref: RequestRef
    position: int
    start: int
    rows: int


class Tap:
    """The engine's side of sample capture. `begin`, `record` and `end` come from one thread; the publisher's calls from another.

    `pinned`: rows come from a device, which copies them to the ring's memory by itself.
    """

    def __init__(self, settings: TapSettings, pinned: bool = False) -> None:
        check_name(settings.engine, "engine")
        check_name(settings.incarnation, "incarnation")
        check_digest(settings.target, "target")
        self.settings = settings
        self.errors = 0
        self._capacity = settings.slot_rows
        self._free = deque(Slot(settings, pinned) for _ in range(settings.ring_slots))
        self._ready: deque[Slot] = deque()
        self._open: Slot | None = None
        self._changed = threading.Condition()
        # Requests that are tapped, and None for those that opted out.
        self._requests: dict[str, RequestRef | None] = {}
        # Ends that found the ring full. Beyond the bound the oldest go: whoever reads then waits for them in vain, a while.
        self._ends: deque[tuple[RequestRef, str, tuple[int, ...]]] = deque(maxlen=MAX_ENDS_WAITING)
        self._capturing = False
        self._credit_bytes = 0
        self._tapped = self._sent = self._shed = self._skipped = 0

    # --- the engine's thread ---

    @property
    def capturing(self) -> bool:
        """Whether requests that begin now are tapped."""
        return self._capturing

    @property
    def credit_bytes(self) -> int:
        """What may wait in the stream."""
        return self._credit_bytes

    def set_capture(self, on: bool, credit_bytes: int) -> None:
        """Tap requests that begin from now on, or stop with the requests that begin from now on."""
        self._capturing, self._credit_bytes = on, credit_bytes

    def begin(self, request_id: str, prompt_ids: Sequence[int], opt_out: bool) -> None:
        """A request begins, with its whole prompt (also the part that a prefix cache will serve)."""
        if not self._capturing:
            return
        try:
            if len(request_id) > MAX_REQUEST_ID:
                raise ValueError(f"request id of {len(request_id)} characters")
            ids = None if opt_out else _little_endian(array("i", prompt_ids))
            ref = None if ids is None else RequestRef(request_id, len(prompt_ids), prompt_group(ids))
            self._requests[request_id] = ref
        except Exception as exc:  # noqa: BLE001 - the tap must never fail a request
            self._failed("begin", exc)

    def record(
        self, segments: Sequence[tuple[str, int, int]], ids: Sequence[int], rows: "torch.Tensor | HostRows"
    ) -> None:
        """Take one step's rows: `rows` [N, states, hidden], `ids` their N token ids, `segments` (request, first position,
        rows) in the order of the rows. Rows of requests that are not tapped are passed over; opted-out ones are counted.

        A tensor is converted to the tap's dtype; a device's must not be written to again, for it is copied behind. A buffer must
        hold it already, little-endian and contiguous: a numpy array of that shape and dtype (bfloat16: its bits as uint16), or the
        bytes alone.
        """
        if not self._requests:
            return
        pieces: list[_Piece] = []
        before = self._tapped
        try:
            pieces, skipped, total = self._wanted(segments)
            if total != len(ids):
                raise ValueError(f"{total} rows in segments, {len(ids)} ids")
            source = _source(rows, total, self.settings)
            with self._changed:
                self._skipped += skipped
                for span in _spans(pieces):
                    self._copy(span, ids, source)
        except Exception as exc:  # noqa: BLE001 - the tap must never fail a request
            self._failed("record", exc)
            with self._changed:
                rest = sum(piece.rows for piece in pieces) - (self._tapped - before)
                self._tapped += rest
                self._shed += rest

    def end(self, request_id: str, finish: str, tail: Sequence[int]) -> None:
        """A request is over. `finish`: "stop", "length" or "abort"; `tail`: token ids after its last row, which have no states."""
        ref = self._requests.pop(request_id, None)
        if ref is None:
            return
        try:
            with self._changed:
                self._ends.append((ref, finish, tuple(int(token) for token in tail[:MAX_TAIL])))
                self._place_ends()
        except Exception as exc:  # noqa: BLE001 - the tap must never fail a request
            self._failed("end", exc)

    def flush(self) -> None:
        """Hand what was recorded so far to the publisher now."""
        with self._changed:
            self._hand_over()

    def totals(self) -> TapTotals:
        """Running totals, consistent in themselves: tapped = sent + shed + ring."""
        with self._changed:
            ring = self._tapped - self._sent - self._shed
            return TapTotals(self._tapped, self._sent, self._shed, ring, self._skipped)

    def _wanted(self, segments: Sequence[tuple[str, int, int]]) -> tuple[list[_Piece], int, int]:
        pieces: list[_Piece] = []
        skipped = start = 0
        for request_id, position, count in segments:
            if request_id in self._requests:
                ref = self._requests[request_id]
                if ref is None:
                    skipped += count
                elif count:
                    pieces.append(_Piece(ref, position, start, count))
            start += count
        return pieces, skipped, start

    def _copy(self, span: list[_Piece], ids: Sequence[int], rows: "torch.Tensor | memoryview") -> None:
        """Copy one contiguous range of rows, over as many slots as it takes; shed what finds none."""
        start, done = span[0].start, 0
        count = sum(piece.rows for piece in span)
        while done < count:
            slot = self._room(len(span))
            if slot is None:
                self._tapped += count - done
                self._shed += count - done
                return
            take = min(count - done, self._capacity - slot.rows)
            begin, at = start + done, slot.rows
            slot.copy(at, rows, begin, take)
            slot.ids[at : at + take] = array("i", ids[begin : begin + take])
            for piece in span:
                first, last = max(piece.start, begin), min(piece.start + piece.rows, begin + take)
                if first < last:
                    slot.note(piece.ref, piece.position + first - piece.start, last - first)
            done += take
            self._tapped += take
            if slot.rows == self._capacity:
                self._hand_over()

    def _room(self, pieces: int) -> Slot | None:
        """The open slot with room for a row and for `pieces` more mentions, or None when the ring is full."""
        slot = self._open
        if slot is not None and (
            len(slot.segments) + pieces > MAX_SEGMENTS
            or len(slot.requests) + pieces > MAX_REQUESTS
            or len(slot.ends) >= MAX_REQUESTS
        ):
            self._hand_over()
            slot = None
        if slot is None:
            if not self._free:
                return None
            slot = self._open = self._free.popleft()
        if slot.empty:
            slot.opened_s = time.monotonic()
            self._changed.notify_all()
        return slot

    def _place_ends(self) -> None:
        """Put the ends that wait into the open slot, as far as the ring has room."""
        while self._ends and (slot := self._room(1)) is not None:
            ref, finish, tail = self._ends.popleft()
            slot.ends.append(End(slot.reference(ref), finish, tail))

    def _hand_over(self) -> None:
        slot = self._open
        if slot is not None and not slot.empty:
            self._ready.append(slot)
            self._open = None
            self._changed.notify_all()

    def _failed(self, where: str, exc: Exception) -> None:
        self.errors += 1
        if self.errors == 1:
            log.error("tap: %s failed (%s); rows are shed and counted, serving goes on", where, type(exc).__name__)

    # --- the publisher's thread ---

    def take(self, timeout_s: float) -> Slot | None:
        """The next slot to send: the oldest full one, or the open one once it is `flush_s` old. None after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._ready:
                now = time.monotonic()
                due = deadline
                if self._open is not None and not self._open.empty:
                    flush = self._open.opened_s + self.settings.flush_s
                    if flush <= now:
                        self._hand_over()
                        break
                    due = min(due, flush)
                if now >= deadline:
                    return None
                self._changed.wait(due - now)
            return self._ready.popleft()

    def give_back(self, slot: Slot, *, sent: bool) -> None:
        """The slot's rows were sent, or else are shed; it is free again, for ends that waited first."""
        with self._changed:
            if sent:
                self._sent += slot.rows
            else:
                self._shed += slot.rows
            slot.clear()
            self._free.append(slot)
            self._place_ends()


def _memory(size: int, pinned: bool) -> memoryview:
    if not pinned:
        return memoryview(bytearray(b"\0") * size)
    import torch

    ring: Any = torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memoryview(ring)


def _source(rows: "torch.Tensor | HostRows", count: int, settings: TapSettings) -> "torch.Tensor | memoryview":
    """`rows` as a tensor or as flat bytes. Raises ValueError or TypeError unless they are `count` rows of the tap's shape and dtype."""
    shape = (count, settings.states, settings.hidden)
    if hasattr(rows, "data_ptr"):
        tensor = cast("torch.Tensor", rows)
        if tensor.shape != shape:
            raise ValueError(f"states {tuple(tensor.shape)}, expected {shape}")
        return tensor
    view = memoryview(cast("Buffer", rows))
    if view.nbytes != count * settings.row_bytes or not view.c_contiguous:
        raise ValueError(f"{view.nbytes} bytes of states, expected {count * settings.row_bytes}, contiguous")
    plain = view.format in ("B", "c") and view.ndim == 1
    if not plain and (view.shape != shape or view.format.lstrip("<") != _FORMATS[settings.dtype]):
        raise ValueError(f"states {view.shape} of format {view.format!r}, expected {shape} of {settings.dtype}")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _spans(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Pieces whose rows lie behind each other, together: each span is one copy, and fits an empty slot's metadata."""
    spans: list[list[_Piece]] = []
    for piece in pieces:
        if spans and len(spans[-1]) < MAX_SPAN and spans[-1][-1].start + spans[-1][-1].rows == piece.start:
            spans[-1].append(piece)
        else:
            spans.append([piece])
    return spans


def _little_endian(values: "array[int]") -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
