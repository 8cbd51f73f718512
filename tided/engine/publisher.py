"""The publisher: a thread that sends the tap's chunks to the engine's sample stream, within its byte credit.

`MULTI XADD + INCRBY credit` per chunk; the collector takes the bytes off again when it acknowledges. A chunk whose fate is
unknown (the connection broke) is sent again under the same sequence number, and the collector drops the double. While there is
no credit or no Redis the thread waits, the ring fills, and the tap sheds: the engine never does.
"""

import logging
import threading
import time

from redis.exceptions import RedisError

from tided.engine.link import Backoff, connect
from tided.engine.tap import Slot, Tap
from tided.model.engines import TapTotals
from tided.wire import keys
from tided.wire.checksum import crc32
from tided.wire.samples import SampleHeader, encode_header

log = logging.getLogger(__name__)

_CREDIT_POLL_S = 0.02
_TAKE_S = 0.1


class Publisher:
    """Sends what `tap` gives until closed. Never raises; `errors` counts failed attempts."""

    def __init__(self, redis_url: str, tap: Tap) -> None:
        self.errors = 0
        self._tap = tap
        self._client = connect(redis_url)
        self._stream = keys.samples(tap.settings.engine)
        self._credit = keys.credit(tap.settings.engine)
        self._seq = 0
        self._reported = TapTotals()
        # At least what is in use: only this thread adds to the counter, so the last reply is an upper bound.
        self._used_bytes = 0
        self._used_known = False
        self._stopping = threading.Event()
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._guard, name="tided-publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, deadline_s: float = 5.0) -> bool:
        """Send what the tap still holds, for at most `deadline_s`, then stop. False when rows were left: they are shed."""
        shed = self._tap.totals().shed
        self._deadline_s = time.monotonic() + deadline_s
        self._tap.flush()
        self._stopping.set()
        self._thread.join(deadline_s + 1.0)
        self._client.close()
        totals = self._tap.totals()
        return not totals.ring and totals.shed == shed

    def _guard(self) -> None:
        while True:
            try:
                self._run()
                return
            except Exception as exc:  # noqa: BLE001 - the one guard of this thread: it must outlive whatever happens
                self._count(exc)
                time.sleep(_TAKE_S)

    def _run(self) -> None:
        while not self._over():
            slot = self._tap.take(0.0 if self._stopping.is_set() else _TAKE_S)
            if slot is not None:
                sent = False
                try:
                    sent = self._send(slot)
                finally:
                    self._tap.give_back(slot, sent=sent)
            elif self._unreported():
                self._send(None)
            elif self._stopping.is_set():
                return

    def _over(self) -> bool:
        return time.monotonic() >= self._deadline_s

    def _unreported(self) -> bool:
        """Whether the ledger downstream would be wrong without another header: rows were shed or skipped since the last."""
        now, told = self._tap.totals(), self._reported
        return not now.ring and (now.tapped, now.shed, now.skipped) != (told.tapped, told.shed, told.skipped)

    def _send(self, slot: Slot | None) -> bool:
        """Send one chunk (None: only totals) until Redis has confirmed it; False when closing ended that."""
        payload = slot.payload(self._tap.settings.row_bytes) if slot is not None else memoryview(b"")
        header = self._header(slot, payload)
        data = encode_header(header)
        size = len(data) + payload.nbytes
        self._seq += 1
        backoff = Backoff()
        while not self._over():
            try:
                if self._has_credit(size):
                    self._append(data, payload, size)
                    self._reported = header.totals
                    return True
                wait_s = _CREDIT_POLL_S
            except (RedisError, OSError) as exc:
                self._count(exc)
                self._used_known = False
                wait_s = backoff.next_s()
            if self._stopping.wait(wait_s):
                time.sleep(_CREDIT_POLL_S)
        return False

    def _has_credit(self, size: int) -> bool:
        """Whether `size` more bytes may wait in the stream. An empty stream always takes one chunk."""
        if not self._used_known or self._used_bytes + size > self._tap.credit_bytes:
            self._used_bytes = int(self._client.get(self._credit) or 0)
            self._used_known = True
        return self._used_bytes <= 0 or self._used_bytes + size <= self._tap.credit_bytes

    def _append(self, header: bytes, payload: memoryview, size: int) -> None:
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xadd(self._stream, {"h": header, "p": payload})
        pipeline.incrby(self._credit, size)
        self._used_bytes = int(pipeline.execute()[1])

    def _header(self, slot: Slot | None, payload: memoryview) -> SampleHeader:
        settings = self._tap.settings
        rows = slot.rows if slot is not None else 0
        return SampleHeader(
            engine=settings.engine,
            incarnation=settings.incarnation,
            seq=self._seq,
            target=settings.target,
            dtype=settings.dtype,
            rows=rows,
            states=settings.states,
            hidden=settings.hidden,
            has_last=settings.has_last,
            ids=slot.ids[:rows].tobytes() if slot is not None else b"",
            requests=tuple(slot.requests) if slot is not None else (),
            segments=tuple(slot.segments) if slot is not None else (),
            ends=tuple(slot.ends) if slot is not None else (),
            totals=self._tap.totals(),
            payload_bytes=payload.nbytes,
            crc32=crc32(payload),
            at_ms=time.time_ns() // 1_000_000,
        )

    def _count(self, exc: Exception) -> None:
        self.errors += 1
        if self.errors == 1:
            log.warning("publisher: sending samples failed (%s); retrying, serving goes on", type(exc).__name__)
