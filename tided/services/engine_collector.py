"""One engine's samples, from its stream to shards on disk.

Read the stream as a consumer group, check every entry, hold rows until their requests end, write them durably, and only then
acknowledge, in one step with deduplication and counting (tided.store.ledger). Whatever dies in between, nothing that was acknowledged
is lost and nothing is stored twice: entries that were not acknowledged are delivered again, and a commit that was durable but not
acknowledged is finished first.
"""

import time
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import anyio.to_thread
import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tided.model import failpoints
from tided.model.codec import from_plain, to_plain
from tided.model.engines import EngineInfo
from tided.model.errors import Refused, Unavailable
from tided.model.ids import check_name
from tided.services.assembly import Assembly, Limits, Plan, SeenChunks
from tided.store import ledger, pressing, purge
from tided.store.aside import read_aside
from tided.store.client import closing, connect, connect_blocking, translated
from tided.store.ledger import StoredChunk
from tided.store.samples import Commit, SampleStore
from tided.wire import keys
from tided.wire.control import decode
from tided.wire.samples import check_payload, decode_header

log = structlog.get_logger(__name__)

READ_COUNT = 4  # of about 1 MB each: a larger reply is slower to read
BLOCK_S = 0.5
AHEAD_BLOCK_S = 0.05
UPKEEP_S = 2.0
ABSENT_S = 30.0
CLAIM_EVERY_S = 60.0
CLAIM_IDLE_S = 300.0
MAX_DELIVERIES = 5
CAREFUL_DELIVERIES = 3
BACKOFF_S = (0.1, 2.0)
_CONSUMER = "collector"

Entry = tuple[str, dict[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class CollectorSettings:
    """`consumer` names this collector in the group: the same name after a restart finds what was pending."""

    redis_url: str
    limits: Limits
    consumer: str = _CONSUMER
    max_deliveries: int = MAX_DELIVERIES


@dataclass(slots=True)
class _Ahead:
    """Entries that were read while a commit was written, and are not admitted yet. `failure`: what ended the reading."""

    entries: list[Entry] = field(default_factory=list[Entry])
    bytes: int = 0
    enough: bool = False
    failure: Unavailable | None = None

    def add(self, entries: list[Entry]) -> None:
        self.entries += entries
        self.bytes += sum(len(value) for _, fields in entries for value in fields.values())


class EngineCollector:
    """Collects one engine's samples. One task calls it; one collector serves an engine."""

    def __init__(self, engine: str, settings: CollectorSettings, store: SampleStore) -> None:
        self.engine = check_name(engine, "engine")
        self._settings, self._store = settings, store
        self._stream = keys.samples(engine)
        self._assembly = Assembly(settings.limits)
        self._seen: dict[str, SeenChunks] = {}
        self._unfinished: list[Commit] = []
        self._ahead = _Ahead()
        self._started = False
        self._upkeep_s = self._claim_s = 0.0
        self._absent_since_s: float | None = None
        self._log = log.bind(engine=engine)

    def adopt(self, commit: Commit) -> None:
        """Finish a commit that an earlier collector made durable, before anything is read."""
        self._unfinished.append(commit)

    async def run(self, stopping: anyio.Event) -> None:
        """Collect until `stopping` is set, then write what is held and acknowledge it. Survives Redis and a full disk."""
        wait_s = BACKOFF_S[0]
        while not stopping.is_set():
            try:
                async with (
                    closing(connect(self._settings.redis_url)) as redis,
                    closing(connect_blocking(self._settings.redis_url, BLOCK_S)) as reader,
                ):
                    await self._prepare(redis)
                    wait_s = BACKOFF_S[0]
                    await self._collect(redis, reader, stopping)
            except Unavailable as exc:
                self._log.warning("collecting is interrupted", error=str(exc))
                with anyio.move_on_after(wait_s):
                    await stopping.wait()
                wait_s = min(wait_s * 2, BACKOFF_S[1])
        await self._drain()

    async def _prepare(self, redis: Redis) -> None:
        """After every interruption: finish durable commits, then take what was delivered to us and is not held."""
        self._ahead = _Ahead()
        with translated("samples"):
            try:
                await redis.xgroup_create(self._stream, keys.SAMPLES_GROUP, id="0", mkstream=True)
            except ResponseError as exc:
                if not str(exc).startswith("BUSYGROUP"):
                    raise
        await self._finish(redis)
        self._assembly.aside = await read_aside(redis, self.engine)
        await self._take_pending(redis)
        self._started = True

    async def _collect(self, redis: Redis, reader: Redis, stopping: anyio.Event) -> None:
        while not stopping.is_set():
            if time.monotonic() >= self._upkeep_s:
                await self._upkeep(redis)
            entries = self._ahead.entries
            if not entries and not self._assembly.full:
                entries = await self._read(reader, BLOCK_S)
            self._ahead = _Ahead()
            if entries:
                # Said before the rows could exist, so what is read after them is complete.
                self._assembly.aside = await read_aside(redis, self.engine)
            for entry in entries:
                await self._admit(redis, entry)
            await self._purge(redis)
            self._assembly.pressed = await pressing.is_pressing(redis, self.engine)
            await self._write_due(redis, reader)

    async def _drain(self) -> None:
        try:
            async with closing(connect(self._settings.redis_url)) as redis:
                await self._finish(redis)
                await self._take_pending(redis)  # what was read ahead
                await self._write_due(redis, everything=True)
        except Unavailable as exc:
            self._log.warning("stopped with unwritten samples, which stay in the stream", error=str(exc))

    # --- reading ---

    async def _read(self, reader: Redis, block_s: float) -> list[Entry]:
        """New entries. A failed or cancelled read may have delivered some that never arrived here: `_take_pending` finds them."""
        with translated("samples"):
            found = await reader.xreadgroup(
                keys.SAMPLES_GROUP,
                self._settings.consumer,
                {self._stream: ">"},
                count=READ_COUNT,
                block=int(block_s * 1000),
            )
        failpoints.hit("collector.read")
        streams = cast("list[Any]", found or [])
        return [(entry.decode(), fields) for _, entries in streams for entry, fields in entries]

    async def _read_ahead(self, reader: Redis, ahead: "_Ahead") -> None:
        """Read until told to stop, or as much as may be held. Never cancelled, and what it has read when it fails is pending."""
        try:
            while not ahead.enough and ahead.bytes < self._settings.limits.hold_bytes:
                ahead.add(await self._read(reader, AHEAD_BLOCK_S))
        except Unavailable as exc:
            ahead.failure = exc

    async def _take_pending(self, redis: Redis) -> None:
        """Entries that were delivered to this consumer and are not held: one by one, so that a poison one is found out.

        Only the first round of a process counts as a delivery: losing the connection says nothing against an entry.
        """
        last = "-"
        while True:
            with translated("samples"):
                pending = await redis.xpending_range(
                    self._stream, keys.SAMPLES_GROUP, last, "+", 100, consumername=self._settings.consumer
                )
            for item in pending:
                entry = cast("bytes", item["message_id"]).decode()
                last = f"({entry}"
                if not self._assembly.holds_entry(entry):
                    await self._take_one(redis, entry, int(item["times_delivered"]))
            if not pending:
                return

    async def _take_one(self, redis: Redis, entry: str, deliveries: int) -> None:
        with translated("samples"):
            if not self._started:
                await redis.xclaim(self._stream, keys.SAMPLES_GROUP, self._settings.consumer, 0, [entry])
            found = cast("list[Any]", await redis.xrange(self._stream, entry, entry))
            if not found:  # trimmed while it was pending: `settle` counts it as lost
                await redis.xack(self._stream, keys.SAMPLES_GROUP, entry)
                return
        fields = cast("dict[bytes, bytes]", found[0][1])
        if deliveries >= self._settings.max_deliveries:
            await self._set_aside(redis, (entry, fields), f"delivered {deliveries} times without a result")
            return
        await self._admit(redis, (entry, fields))
        await self._write_due(redis, everything=deliveries >= CAREFUL_DELIVERIES)

    async def _claim_others(self, redis: Redis) -> None:
        """Take over what other consumers of the group left lying."""
        with translated("samples"):
            reply = await redis.xautoclaim(
                self._stream,
                keys.SAMPLES_GROUP,
                self._settings.consumer,
                min_idle_time=int(CLAIM_IDLE_S * 1000),
                count=READ_COUNT,
            )
        for entry, fields in cast("list[Any]", reply[1]):
            if fields is not None and not self._assembly.holds_entry(entry.decode()):
                await self._admit(redis, (entry.decode(), fields))

    async def _admit(self, redis: Redis, item: Entry) -> None:
        """Check one entry; hold it, or take it out of the stream as a double or as poison."""
        entry, fields = item
        data, payload = fields.get(b"h", b""), fields.get(b"p", b"")
        try:
            header = decode_header(data)
            if header.engine != self.engine:
                raise Refused("sample header: it names another engine than its stream")
            check_payload(header, payload)
        except Refused as exc:
            await self._set_aside(redis, item, str(exc))
            return
        seen = await self._seen_of(redis, header.incarnation)
        size = len(data) + len(payload)
        if header.seq in seen or self._assembly.holds_chunk(header.incarnation, header.seq):
            await ledger.discard_double(redis, self.engine, header.incarnation, entry, size, header.rows)
            return
        done = seen.partial.pop(header.seq, frozenset[int]())
        self._assembly.add(entry, size, header, payload, time.monotonic(), done)
        failpoints.hit("collector.admitted")

    async def _seen_of(self, redis: Redis, incarnation: str) -> SeenChunks:
        seen = self._seen.get(incarnation)
        if seen is None:
            seen = self._seen[incarnation] = SeenChunks(await ledger.read_seen(redis, self.engine, incarnation))
        return seen

    async def _set_aside(self, redis: Redis, item: Entry, reason: str) -> None:
        entry, fields = item
        size = len(fields.get(b"h", b"")) + len(fields.get(b"p", b""))
        await ledger.set_aside(redis, self.engine, entry, size, reason)
        self._log.error("poison entry set aside", entry=entry, reason=reason)

    # --- writing ---

    async def _write_due(self, redis: Redis, reader: Redis | None = None, *, everything: bool = False) -> None:
        """Write and acknowledge what is due. With `reader`, what comes meanwhile is read into `_ahead`: the disk takes as long as Redis."""
        now_s = time.monotonic()
        plan = self._assembly.due(now_s, everything=everything)
        if plan is None:
            return
        if not plan.runs and not plan.aside:
            await self._acknowledge(redis, plan.acknowledgements)
            self._forget(plan)
            return
        receipt = {"engine": self.engine, "acknowledge": to_plain(plan.acknowledgements)}
        age_s = now_s - plan.since_s
        ahead, failure = _Ahead(), None
        async with anyio.create_task_group() as tasks:
            if reader is not None:
                tasks.start_soon(self._read_ahead, reader, ahead)
            try:
                commit = await anyio.to_thread.run_sync(self._store.commit, plan.runs, receipt, plan.aside, age_s)
                self._unfinished.append(commit)
                self._forget(plan)
                failpoints.hit("collector.committed")
                await self._finish(redis)
            except Unavailable as exc:
                failure = exc
            finally:
                ahead.enough = True
        if failure or ahead.failure:
            raise failure or cast("Unavailable", ahead.failure)
        self._ahead = ahead
        stored = sum(run.rows for runs in (*plan.runs.values(), *plan.aside.values()) for run in runs)
        self._log.debug("samples stored", rows=stored)

    def _forget(self, plan: Plan) -> None:
        for incarnation, seq in self._assembly.written(plan):
            self._seen[incarnation].add(seq)

    async def _finish(self, redis: Redis) -> None:
        """Acknowledge and publish durable commits, oldest first. Each step may be repeated."""
        while self._unfinished:
            commit = self._unfinished[0]
            receipt = cast("dict[str, Any]", commit.receipt["acknowledge"])
            chunks = {
                incarnation: [from_plain(StoredChunk, chunk, "receipt") for chunk in plain]
                for incarnation, plain in receipt.items()
            }
            await self._acknowledge(redis, chunks)
            failpoints.hit("collector.acknowledged")
            await anyio.to_thread.run_sync(self._store.publish, commit)
            del self._unfinished[0]

    async def _acknowledge(self, redis: Redis, chunks: dict[str, list[StoredChunk]]) -> None:
        for incarnation, stored in chunks.items():
            await ledger.acknowledge(redis, self.engine, incarnation, stored)

    # --- purging ---

    async def _purge(self, redis: Redis) -> None:
        """Discard what an operator wants gone: on its way and, once nothing of it is left there, what had reached the disk."""
        through = await purge.marked(redis, self.engine)
        if not through:
            return
        await self._finish(redis)
        for incarnation, chunks in self._assembly.purge(through).items():
            await ledger.acknowledge(redis, self.engine, incarnation, chunks, purged=True)
            for chunk in chunks:
                self._seen[incarnation].add(chunk.seq)
        failpoints.hit("collector.purging")
        if not await purge.left(redis, self.engine, through):
            gone = await anyio.to_thread.run_sync(self._store.purge, self.engine)
            await purge.done(redis, self.engine, through)
            self._log.info("purged", rows=gone.rows)

    # --- upkeep ---

    async def _upkeep(self, redis: Redis) -> None:
        """Entries of dead collectors, and the account of lost rows and dead producers."""
        now_s = time.monotonic()
        self._upkeep_s = now_s + UPKEEP_S
        if now_s >= self._claim_s:
            self._claim_s = now_s + CLAIM_EVERY_S
            await self._claim_others(redis)
        alive = await self._alive(redis, now_s)
        for incarnation in await ledger.incarnations(redis, self.engine):
            gone = alive is not None and incarnation != alive
            if gone:
                self._assembly.end_incarnation(incarnation, now_s)
            await ledger.settle(redis, self.engine, incarnation, alive=not gone)
            if gone and incarnation not in self._assembly.incarnations():
                self._seen.pop(incarnation, None)

    async def _alive(self, redis: Redis, now_s: float) -> str | None:
        """The incarnation that is alive; "" when surely none is; None when that cannot be told yet."""
        with translated("samples"):
            data = cast("bytes | None", await redis.get(keys.info(self.engine)))
        if data is not None:
            self._absent_since_s = None
            try:
                return decode(EngineInfo, data).incarnation
            except Refused:
                return None
        if self._absent_since_s is None:
            self._absent_since_s = now_s
        return "" if now_s - self._absent_since_s >= ABSENT_S else None
