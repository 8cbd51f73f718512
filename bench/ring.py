"""A prototype of the same-host ring, to be measured against the product: payloads in shared memory, only their headers in the stream.

Slots of a file in /dev/shm, as many as credit allows; chunk number n is in slot n modulo their number, and a byte in front of all slots
says whether it is taken. All else is the product's: header, checks, credit, shards, acknowledgement. What a product would need beyond
this is not here: who owns the file, what a killed producer leaves in it, entries that are delivered again.
"""

import argparse
import mmap
import os
from pathlib import Path
from typing import Any, cast

import anyio
from redis.asyncio import Redis

from bench.dataplane import CREDIT_BYTES, ENGINE, SHARD_AGE_S
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap
from tided.services.assembly import Limits
from tided.services.engine_collector import CollectorSettings, EngineCollector, Entry
from tided.store.ledger import StoredChunk
from tided.store.samples import SampleStore
from tided.wire.samples import decode_header

SLOT_BYTES = 1 << 20
SLOTS = CREDIT_BYTES // SLOT_BYTES
_FLAGS_BYTES = 4096


class Ring:
    """The shared file, mapped. `taken` has a byte for each slot."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _FLAGS_BYTES + SLOTS * SLOT_BYTES)
            self._map = memoryview(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)
        self.taken = self._map[:SLOTS]

    def slot(self, number: int) -> memoryview:
        at = _FLAGS_BYTES + number * SLOT_BYTES
        return self._map[at : at + SLOT_BYTES]


class RingPublisher(Publisher):
    """Sends headers; payloads go into the ring, for which there must be a free slot as well as credit."""

    def __init__(self, redis_url: str, tap: Tap, ring: Ring) -> None:
        super().__init__(redis_url, tap)
        self._ring = ring

    @property
    def _slot(self) -> int:
        return (self._seq - 1) % SLOTS

    def _has_credit(self, size: int) -> bool:
        return not self._ring.taken[self._slot] and super()._has_credit(size)

    def _append(self, header: bytes, payload: memoryview, size: int) -> None:
        self._ring.slot(self._slot)[: payload.nbytes] = payload
        self._ring.taken[self._slot] = 1
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xadd(self._stream, {"h": header})
        pipeline.incrby(self._credit, size)
        self._used_bytes = int(pipeline.execute()[1])


class RingCollector(EngineCollector):
    """Takes payloads from the ring, and frees a slot when its chunk is acknowledged whole."""

    def __init__(self, settings: CollectorSettings, store: SampleStore, ring: Ring) -> None:
        super().__init__(ENGINE, settings, store)
        self._ring = ring

    async def _read(self, reader: Redis, block_s: float) -> list[Entry]:
        entries = await super()._read(reader, block_s)
        for _, fields in entries:
            header = decode_header(fields[b"h"])
            fields[b"p"] = cast("Any", self._ring.slot(header.seq % SLOTS)[: header.payload_bytes])
        return entries

    async def _acknowledge(self, redis: Redis, chunks: dict[str, list[StoredChunk]]) -> None:
        await super()._acknowledge(redis, chunks)
        for incarnation, stored in chunks.items():
            for chunk in stored:
                if not self._assembly.holds_chunk(incarnation, chunk.seq):
                    self._ring.taken[chunk.seq % SLOTS] = 0


async def _collect(url: str, root: Path, ring: Path) -> None:
    store = SampleStore(root, 0.15, 1 << 40, 86400)
    limits = Limits(4096, SHARD_AGE_S, hold_bytes=CREDIT_BYTES // 2)
    await RingCollector(CollectorSettings(url, limits), store, Ring(ring)).run(anyio.Event())


def main() -> None:
    """The collector's process, until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.ring", description=__doc__)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--ring", type=Path, required=True)
    options = parser.parse_args()
    anyio.run(_collect, options.redis, options.root, options.ring)


if __name__ == "__main__":
    main()
