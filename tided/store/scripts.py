"""The Lua scripts of the control plane, each one typed async function. All their keys are in the `{ctl}` slot.

A script decides and writes in one step on the server, by the server's TIME. Every write of the leader carries its epoch and is
refused (`Superseded`) inside the script when a newer epoch was given out. Jobs: see `tided.store.job_scripts`.
"""

import hashlib
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from tided.model.errors import Superseded
from tided.store.client import translated
from tided.wire import keys

DAY_MS = 86_400_000

PRELUDE = """
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function int(n) return string.format('%.0f', n) end
local function fence(key, epoch)
  local newest = redis.call('GET', key) or '0'
  if tonumber(newest) > tonumber(epoch) then
    return redis.error_reply('SUPERSEDED epoch ' .. epoch .. ' is older than ' .. newest)
  end
end
"""

_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
local epoch = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') + 1, now_ms(), tonumber(ARGV[3]) + 1)
redis.call('SET', KEYS[2], int(epoch))
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return epoch
"""

_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('GET', KEYS[2]) ~= ARGV[3] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return 1
"""

_PUT = """
local refused = fence(KEYS[1], ARGV[1])
if refused then return refused end
if ARGV[3] == '0' then redis.call('SET', KEYS[2], ARGV[2]) else redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3]) end
return 1
"""

_DELETE = """
local refused = fence(KEYS[1], ARGV[1])
if refused then return refused end
return redis.call('DEL', KEYS[2])
"""

_TELL = """
local refused = fence(KEYS[1], ARGV[1])
if refused then return refused end
return redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'm', ARGV[2])
"""

_HEARTBEAT = """
local owner = redis.call('HGET', KEYS[1], 'incarnation')
if owner and owner ~= ARGV[1] and ARGV[4] ~= '1' then return 0 end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'info', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', int(now_ms() - ARGV[6]))
redis.call('ZADD', KEYS[3], int(now_ms()), ARGV[5])
redis.call('PEXPIRE', KEYS[3], ARGV[6])
local wish = redis.call('GET', KEYS[2])
return wish == 'drain' and 3 or wish and 2 or 1
"""

_REMOVE_WORKER = """
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[2])
return redis.call('DEL', KEYS[1])
"""

_WORKERS = """
local found = {}
for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  found[#found + 1] = {name, redis.call('HGET', ARGV[1] .. name, 'info') or '', redis.call('GET', ARGV[2] .. name) or ''}
end
return found
"""


async def run(
    redis: Redis, body: str, script_keys: list[str], args: list[str | int | bytes], *, allow_oom: bool = False
) -> Any:
    """Run a script by its digest, sending the text only when the server does not know it. `allow_oom`: also at maxmemory.

    Raises `Superseded` for a stale epoch, `Unavailable` when the server cannot be reached or is full.
    """
    text = ("#!lua flags=allow-oom\n" if allow_oom else "") + PRELUDE + body
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    arguments = cast("list[Any]", [*script_keys, *args])
    with translated():
        try:
            try:
                return await redis.evalsha(digest, len(script_keys), *arguments)
            except NoScriptError:
                return await redis.eval(text, len(script_keys), *arguments)
        except ResponseError as exc:
            if str(exc).startswith("SUPERSEDED"):
                raise Superseded(f"a newer leader has taken over: {str(exc)[11:]}; this one must stop leading") from exc
            raise


async def acquire_lease(redis: Redis, holder: str, ttl_ms: int, highest_engine_epoch: int) -> int | None:
    """Take the leader's lease if it is free or already `holder`'s; the new epoch, or None while another holds it.

    epoch = max(stored + 1, Redis TIME in ms, highest that an engine reports + 1), so it grows even when Redis lost its data.
    """
    epoch = await run(redis, _ACQUIRE, [keys.lease(), keys.epoch()], [holder, ttl_ms, highest_engine_epoch])
    return int(epoch) or None


async def renew_lease(redis: Redis, holder: str, ttl_ms: int, epoch: int) -> bool:
    """Extend the lease if `holder` still has it under `epoch`."""
    return bool(await run(redis, _RENEW, [keys.lease(), keys.epoch()], [holder, ttl_ms, epoch]))


async def release_lease(redis: Redis, holder: str) -> bool:
    """Give the lease up if `holder` still has it."""
    return bool(await run(redis, _RELEASE, [keys.lease()], [holder]))


async def put(redis: Redis, key: str, value: bytes, epoch: int, ttl_ms: int = 0) -> None:
    """The leader writes a value; `ttl_ms` 0 keeps it for ever. Raises `Superseded`."""
    await run(redis, _PUT, [keys.epoch(), key], [epoch, value, ttl_ms])


async def delete(redis: Redis, key: str, epoch: int) -> None:
    """The leader deletes a value. Raises `Superseded`."""
    await run(redis, _DELETE, [keys.epoch(), key], [epoch])


async def tell(redis: Redis, stream: str, message: bytes, epoch: int, maxlen: int) -> bytes:
    """The leader appends to a stream of at least the newest `maxlen`; the entry's id. Raises `Superseded`."""
    return await run(redis, _TELL, [keys.epoch(), stream], [epoch, message, maxlen])


async def heartbeat(redis: Redis, worker: str, incarnation: str, info: bytes, ttl_ms: int, *, take: bool) -> int:
    """A worker's heartbeat. 0: another incarnation has the name; 1: noted; 2: it is cordoned; 3: and drains. `take` replaces another."""
    args: list[str | int | bytes] = [incarnation, info, ttl_ms, int(take), worker, DAY_MS]
    return int(await run(redis, _HEARTBEAT, [keys.worker(worker), keys.cordon(worker), keys.workers()], args))


async def remove_worker(redis: Redis, worker: str, incarnation: str) -> None:
    """Forget a worker's heartbeat if this incarnation wrote it."""
    await run(redis, _REMOVE_WORKER, [keys.worker(worker), keys.workers()], [incarnation, worker])


async def workers(redis: Redis) -> list[tuple[str, bytes, str]]:
    """Name, newest record and mark of the registered workers; no bytes for one whose heartbeat has ended, "" without a mark."""
    found = await run(redis, _WORKERS, [keys.workers()], [keys.WORKER_PREFIX, keys.CORDON_PREFIX])
    return [(name.decode(), info, mark.decode()) for name, info, mark in found]
