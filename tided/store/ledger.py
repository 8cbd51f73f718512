"""What became of every row: the collector's counters in Redis, and the scripts that change them together with the stream.

All are one step on the server and may be repeated: an acknowledgement whose reply was lost changes nothing the second time.
They are flagged allow-oom, because acknowledging is what frees memory. `{engine}:ledger` sums over incarnations; `seen` keeps,
for each incarnation, which chunks are stored and its producer's last totals.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from tided.model.codec import to_plain
from tided.model.status import SampleTotals
from tided.store import scripts
from tided.store.client import translated
from tided.wire import keys
from tided.wire.samples import SampleHeader

SEEN_TTL_S = 7 * 86400
DEAD_KEPT = 1000
SEQ_WINDOW = 4096
"""How far behind the newest stored chunk of a producer a chunk may be and still be told from a double. Rings are smaller."""

_COMMON = """
local samples, credit, seen, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local function drop(id, bytes)
  redis.call('XACK', samples, ARGV[1], id)
  if redis.call('XDEL', samples, id) == 0 then return false end
  if redis.call('DECRBY', credit, bytes) < 0 then redis.call('SET', credit, '0') end
  return true
end
local function get(name) return tonumber(redis.call('HGET', seen, name) or '0') end
local function count(name, rows)
  if rows ~= 0 then redis.call('HINCRBY', ledger, name, int(rows)) end
end
local function count_both(name, rows)
  if rows ~= 0 then redis.call('HINCRBY', seen, name, int(rows)) end
  count(name, rows)
end
"""

_STORED = (
    _COMMON
    + """
local window = tonumber(ARGV[3])
local function is_seen(seq) return seq < get('w') or redis.call('HEXISTS', seen, int(seq)) == 1 end
local function mark(seq)
  redis.call('HSET', seen, int(seq), '1')
  local w = get('w')
  while redis.call('HDEL', seen, int(w)) == 1 do w = w + 1 end
  if seq - window > w then
    w = seq - window
    for _, name in ipairs(redis.call('HKEYS', seen)) do
      local n = tonumber(name)
      if n and n < w then redis.call('HDEL', seen, name) end
    end
  end
  redis.call('HSET', seen, 'w', int(w))
end
for _, chunk in ipairs(cjson.decode(ARGV[4])) do
  local finished = is_seen(chunk.seq)
  if not finished then
    local name = 'p:' .. int(chunk.seq)
    local mask = redis.call('HGET', seen, name) or string.rep('0', chunk.parts)
    local rows = 0
    for i, part in ipairs(chunk.stored) do
      local at = part[1] + 1
      if string.sub(mask, at, at) == '0' then
        mask = string.sub(mask, 1, at - 1) .. '1' .. string.sub(mask, at + 1)
        rows = rows + part[2]
      end
    end
    count_both(ARGV[5], rows)
    local late = math.min(get('unknown'), rows)
    count_both('unknown', -late)
    for _, total in ipairs({'tapped', 'sent', 'shed', 'skipped'}) do
      local more = chunk.totals[total] - get(total)
      if more > 0 then count_both(total, more) end
    end
    finished = not string.find(mask, '0', 1, true)
    if finished then redis.call('HDEL', seen, name) mark(chunk.seq) else redis.call('HSET', seen, name, mask) end
  end
  if finished then drop(chunk.entry, chunk.bytes) end
end
redis.call('EXPIRE', seen, ARGV[2])
return 1
"""
)

_DOUBLE = _COMMON + "if drop(ARGV[2], ARGV[3]) then count('duplicated', tonumber(ARGV[4])) end return 1"

_DEAD = (
    _COMMON
    + """
if drop(ARGV[2], ARGV[3]) then
  redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[5], '*', 'entry', ARGV[2], 'bytes', ARGV[3], 'reason', ARGV[4])
  count('dead', 1)
end
return 1
"""
)

_SETTLE = (
    _COMMON
    + """
if redis.call('EXISTS', seen) == 1 then redis.call('EXPIRE', seen, ARGV[2]) end
if redis.call('XLEN', samples) > 0 then return 0 end
redis.call('SET', credit, '0')
count_both('lost', math.max(get('sent') - get('stored') - get('purged') - get('lost'), 0))
if ARGV[1] == '0' then
  local known = get('shed') + get('stored') + get('purged') + get('lost') + get('unknown')
  count_both('unknown', math.max(get('tapped') - known, 0))
end
return 1
"""
)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What is durable of one stream entry. A chunk has `parts` parts, one for each request that it mentions; `stored` are
    (index, rows) of those that are. The entry leaves the stream when all are. `totals` are its producer's, itself counted as sent."""

    entry: str
    seq: int
    bytes: int
    parts: int
    stored: tuple[tuple[int, int], ...]
    totals: dict[str, int]


def totals_of(header: SampleHeader) -> dict[str, int]:
    """The producer's totals once this chunk is sent: what was sent before it, and its own rows."""
    totals = header.totals
    sent = totals.sent + header.rows
    return {"tapped": totals.tapped, "sent": sent, "shed": totals.shed, "skipped": totals.skipped}


def _keys(engine: str, incarnation: str) -> list[str]:
    return [keys.samples(engine), keys.credit(engine), keys.seen(engine, incarnation), keys.ledger(engine)]


async def acknowledge(
    redis: Redis, engine: str, incarnation: str, chunks: Iterable[StoredChunk], *, purged: bool = False
) -> None:
    """Count what is durable of `chunks`, take whole ones out of the stream and give their bytes back to the producer.

    `purged`: it is not durable but discarded for good, because an operator wants it gone.
    """
    plain = json.dumps([to_plain(chunk) for chunk in chunks])
    fate = "purged" if purged else "stored"
    args: list[str | int | bytes] = [keys.SAMPLES_GROUP, SEEN_TTL_S, SEQ_WINDOW, plain, fate]
    await scripts.run(redis, _STORED, _keys(engine, incarnation), args, allow_oom=True)


async def discard_double(redis: Redis, engine: str, incarnation: str, entry: str, size: int, rows: int) -> None:
    """Take a second copy of a chunk out of the stream."""
    args: list[str | int | bytes] = [keys.SAMPLES_GROUP, entry, size, rows]
    await scripts.run(redis, _DOUBLE, _keys(engine, incarnation), args, allow_oom=True)


async def set_aside(redis: Redis, engine: str, entry: str, size: int, reason: str) -> None:
    """Move a poison entry, without its payload, to the dead-letter stream. `settle` counts its rows as lost."""
    args: list[str | int | bytes] = [keys.SAMPLES_GROUP, entry, size, reason[:300], DEAD_KEPT]
    # A poison entry names no incarnation that could be believed; the script does not touch KEYS[3].
    script_keys = [*_keys(engine, "none"), keys.dead(engine)]
    await scripts.run(redis, _DEAD, script_keys, args, allow_oom=True)


async def settle(redis: Redis, engine: str, incarnation: str, *, alive: bool) -> bool:
    """When the stream is drained: what was sent and is not stored is lost, and what a dead producer tapped and never sent is
    unknown. Gives whether it was drained."""
    args: list[str | int | bytes] = [int(alive), SEEN_TTL_S]
    return bool(await scripts.run(redis, _SETTLE, _keys(engine, incarnation), args, allow_oom=True))


async def incarnations(redis: Redis, engine: str) -> list[str]:
    """The producer incarnations of which samples were stored in the last days."""
    with translated("sample ledger"):
        found = [
            cast("bytes", key).decode() async for key in redis.scan_iter(match=keys.seen_pattern(engine), count=1000)
        ]
    return sorted(key.rsplit(":", 1)[1] for key in found)


@dataclass(frozen=True, slots=True)
class Seen:
    """Which chunks of an incarnation are stored: all below `watermark`, those in `above`, and of `partial` ones some parts."""

    watermark: int
    above: frozenset[int]
    partial: dict[int, frozenset[int]]


async def read_seen(redis: Redis, engine: str, incarnation: str) -> Seen:
    """What was stored of an incarnation by collectors before this one."""
    with translated("sample ledger"):
        fields = cast("dict[bytes, bytes]", await cast("Any", redis.hgetall(keys.seen(engine, incarnation))))
    plain = {name.decode(): value.decode() for name, value in fields.items()}
    return Seen(
        watermark=int(plain.get("w", "0")),
        above=frozenset(int(name) for name in plain if name.isdigit()),
        partial={
            int(name[2:]): frozenset(i for i, flag in enumerate(mask) if flag == "1")
            for name, mask in plain.items()
            if name.startswith("p:")
        },
    )


async def read_ledger(redis: Redis, engine: str) -> SampleTotals:
    """The engine's samples so far, over all its incarnations, in rows: tapped = stored + purged + shed + lost + unknown + in_flight.

    Exact when drained; before that `tapped` is as old as the newest chunk of which something is stored.
    """
    with translated("sample ledger"):
        pipeline = redis.pipeline(transaction=True)
        pipeline.hgetall(keys.ledger(engine))
        pipeline.get(keys.credit(engine))
        fields, used = cast("tuple[dict[bytes, bytes], bytes | None]", await pipeline.execute())
    count = {name.decode(): int(value) for name, value in fields.items()}
    tapped, stored, purged, shed, lost, unknown = (
        count.get(name, 0) for name in ("tapped", "stored", "purged", "shed", "lost", "unknown")
    )
    return SampleTotals(
        tapped=tapped,
        stored=stored,
        shed=shed,
        lost=lost,
        in_flight=tapped - stored - purged - shed - lost - unknown,
        duplicated=count.get("duplicated", 0),
        skipped=count.get("skipped", 0),
        unknown=unknown,
        stream_bytes=max(int(used or 0), 0),
        dead=count.get("dead", 0),
        purged=purged,
    )
