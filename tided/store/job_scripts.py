"""The Lua scripts of jobs, each one typed async function. They follow `tided.machine.job`; a contract test compares the two.

A job is one hash; what the scripts decide by are plain fields, the rest are msgpack records that they never open. A queue is a
sorted set by the time before which a job must not start, `running` one by the end of the lease, `jobs` the index by creation.
Every write sets the TTL anew: a job that nothing has touched for `keep_ms` is forgotten.
"""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from tided.machine.job import BACKOFF_BASE_MS, BACKOFF_CAP_MS
from tided.store.scripts import run
from tided.wire import keys

# KEYS and ARGV begin alike in all of them: KEYS[1] = jobs, KEYS[2] = running, ARGV[1..4] = job prefix, queue prefix, keep_ms, id.
_COMMON = f"""
local BASE, CAP = {BACKOFF_BASE_MS}, {BACKOFF_CAP_MS}
local jobs, running = KEYS[1], KEYS[2]
local job_prefix, queue_prefix, keep = ARGV[1], ARGV[2], ARGV[3]
local now = now_ms()
local function queue_of(job) return queue_prefix .. redis.call('HGET', job, 'kind') end
local function touch(id, extra)
  redis.call('PEXPIRE', job_prefix .. id, keep)
  redis.call('PEXPIRE', jobs, keep)
  if extra then redis.call('PEXPIRE', extra, keep) end
end
local function holds(job, attempt)
  local f = redis.call('HMGET', job, 'state', 'attempt', 'lease_until_ms')
  return f[1] == 'running' and f[2] == attempt and now < tonumber(f[3])
end
local function cancelling(job) return redis.call('HGET', job, 'cancelling') == '1' end
local function close(id, state, ...)
  redis.call('HSET', job_prefix .. id, 'state', state, 'cancelling', '0', 'lease_until_ms', '0', 'finished_ms', int(now), ...)
  redis.call('ZREM', running, id)
  touch(id)
end
local function requeue(id, not_before, ...)
  local job = job_prefix .. id
  redis.call('HSET', job, 'state', 'queued', 'not_before_ms', int(not_before), 'lease_until_ms', '0', 'worker', '', ...)
  redis.call('HDEL', job, 'progress')
  redis.call('ZREM', running, id)
  local queue = queue_of(job)
  redis.call('ZADD', queue, int(not_before), id)
  touch(id, queue)
end
local function retry(id, message)
  local f = redis.call('HMGET', job_prefix .. id, 'attempt', 'max_attempts')
  local attempt = tonumber(f[1])
  if attempt >= tonumber(f[2]) then close(id, 'failed', 'error', message)
  else requeue(id, now + math.min(CAP, BASE * 2 ^ math.min(attempt - 1, 32)), 'error', message) end
end
local function read(id) return {{id, redis.call('HGETALL', job_prefix .. id)}} end
"""

_SUBMIT = """
local refused = fence(KEYS[3], ARGV[5])
if refused then return refused end
local id, kind = ARGV[4], ARGV[7]
local job, queue = job_prefix .. id, queue_prefix .. kind
if redis.call('EXISTS', job) == 0 then
  redis.call('HSET', job, 'state', 'queued', 'epoch', ARGV[5], 'spec', ARGV[6], 'kind', kind, 'attempt', '0',
    'max_attempts', ARGV[8], 'created_ms', int(now), 'not_before_ms', int(now), 'lease_until_ms', '0', 'worker', '',
    'cancelling', '0', 'started_ms', '0', 'finished_ms', '0', 'error', '')
  redis.call('ZADD', jobs, int(now), id)
  redis.call('ZADD', queue, int(now), id)
  touch(id, queue)
end
return read(id)
"""

_CLAIM = """
for i = 6, #ARGV do
  local queue = queue_prefix .. ARGV[i]
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', int(now), 'LIMIT', 0, 32)) do
    redis.call('ZREM', queue, id)
    local job = job_prefix .. id
    if redis.call('HGET', job, 'state') == 'queued' then
      local lease_until = int(now + tonumber(ARGV[4]))
      redis.call('HINCRBY', job, 'attempt', 1)
      redis.call('HSET', job, 'state', 'running', 'worker', ARGV[5], 'lease_until_ms', lease_until,
        'started_ms', int(now), 'error', '')
      redis.call('ZADD', running, lease_until, id)
      touch(id, running)
      return read(id)
    end
  end
end
return false
"""

_RENEW = """
local id, job = ARGV[4], job_prefix .. ARGV[4]
if not holds(job, ARGV[5]) then return 'lost' end
if cancelling(job) then return 'cancel' end
local lease_until = int(now + tonumber(ARGV[6]))
redis.call('HSET', job, 'lease_until_ms', lease_until)
if ARGV[7] ~= '' then redis.call('HSET', job, 'progress', ARGV[7]) end
redis.call('ZADD', running, lease_until, id)
touch(id, running)
return 'go-on'
"""

_FINISH = """
local id, job = ARGV[4], job_prefix .. ARGV[4]
local f = redis.call('HMGET', job, 'state', 'attempt', 'result')
if f[1] == 'succeeded' and f[2] == ARGV[5] and f[3] == ARGV[6] then return 'done' end
if not holds(job, ARGV[5]) then return 'lost' end
if cancelling(job) then close(id, 'cancelled') return 'cancelled' end
close(id, 'succeeded', 'result', ARGV[6])
return 'done'
"""

_FAIL = """
local id, job = ARGV[4], job_prefix .. ARGV[4]
if not holds(job, ARGV[5]) then return 'lost' end
if cancelling(job) then close(id, 'cancelled')
elseif ARGV[7] == '1' then retry(id, ARGV[6])
else close(id, 'failed', 'error', ARGV[6]) end
return 'done'
"""

_RELEASE = """
local id, job = ARGV[4], job_prefix .. ARGV[4]
if not holds(job, ARGV[5]) then return 'lost' end
if cancelling(job) then close(id, 'cancelled')
else
  redis.call('HINCRBY', job, 'max_attempts', 1)
  requeue(id, now)
end
return 'done'
"""

_CANCEL = """
local refused = fence(KEYS[3], ARGV[5])
if refused then return refused end
local id, job = ARGV[4], job_prefix .. ARGV[4]
local state = redis.call('HGET', job, 'state')
if not state then return 'missing' end
if state == 'queued' then
  redis.call('ZREM', queue_of(job), id)
  close(id, 'cancelled')
elseif state == 'running' then
  redis.call('HSET', job, 'cancelling', '1')
  touch(id)
elseif state ~= 'cancelled' then return state end
return read(id)
"""

_REAP = """
local refused = fence(KEYS[3], ARGV[5])
if refused then return refused end
local reaped = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', int(now), 'LIMIT', 0, 100)) do
  local job = job_prefix .. id
  if redis.call('EXISTS', job) == 0 then redis.call('ZREM', running, id)
  else
    local worker = redis.call('HGET', job, 'worker')
    if cancelling(job) then close(id, 'cancelled')
    else retry(id, 'worker ' .. worker .. ' stopped renewing its lease (died, hung or cut off)') end
    reaped[#reaped + 1] = read(id)
  end
end
for _, id in ipairs(redis.call('ZRANGE', jobs, 0, 99)) do
  if redis.call('EXISTS', job_prefix .. id) == 0 then redis.call('ZREM', jobs, id) end
end
return reaped
"""

_LIST = """
local found = {}
for _, id in ipairs(redis.call('ZREVRANGE', jobs, 0, -1)) do
  local state = redis.call('HGET', job_prefix .. id, 'state')
  local wanted = state and #ARGV < 6
  for i = 6, #ARGV do if state == ARGV[i] then wanted = true end end
  if wanted then found[#found + 1] = read(id) end
  if #found >= tonumber(ARGV[5]) then break end
end
return found
"""

Arg = str | int | bytes


async def _run(redis: Redis, body: str, keep_ms: int, args: Sequence[Arg], *, fenced: bool = False) -> Any:
    script_keys = [keys.jobs(), keys.running(), *([keys.epoch()] if fenced else [])]
    return await run(redis, _COMMON + body, script_keys, [keys.JOB_PREFIX, keys.QUEUE_PREFIX, keep_ms, *args])


async def submit(
    redis: Redis, keep_ms: int, job_id: str, epoch: int, spec: bytes, kind: str, max_attempts: int
) -> list[Any]:
    """Queue a job; the job as stored, [id, [field, value, ...]]. The same id again changes nothing."""
    return await _run(redis, _SUBMIT, keep_ms, [job_id, epoch, spec, kind, max_attempts], fenced=True)


async def claim(redis: Redis, keep_ms: int, lease_ms: int, worker: str, kinds: Sequence[str]) -> list[Any] | None:
    """Take the first due job of the kinds, in their order; the job, or None."""
    return await _run(redis, _CLAIM, keep_ms, [lease_ms, worker, *kinds])


async def renew(redis: Redis, keep_ms: int, job_id: str, attempt: int, lease_ms: int, progress: bytes) -> str:
    """`go-on`, `cancel` or `lost`. An empty `progress` keeps the stored one."""
    return _text(await _run(redis, _RENEW, keep_ms, [job_id, attempt, lease_ms, progress]))


async def finish(redis: Redis, keep_ms: int, job_id: str, attempt: int, result: bytes) -> str:
    """`done` (also for the same report again), `lost` or `cancelled`."""
    return _text(await _run(redis, _FINISH, keep_ms, [job_id, attempt, result]))


async def fail(redis: Redis, keep_ms: int, job_id: str, attempt: int, error: str, retryable: bool) -> str:
    """`done` or `lost`."""
    return _text(await _run(redis, _FAIL, keep_ms, [job_id, attempt, error, int(retryable)]))


async def release(redis: Redis, keep_ms: int, job_id: str, attempt: int) -> str:
    """`done` or `lost`."""
    return _text(await _run(redis, _RELEASE, keep_ms, [job_id, attempt]))


async def cancel(redis: Redis, keep_ms: int, job_id: str, epoch: int) -> list[Any] | str:
    """The job after the cancellation was noted, `missing`, or the final state that forbids it."""
    reply = await _run(redis, _CANCEL, keep_ms, [job_id, epoch], fenced=True)
    return reply if isinstance(reply, list) else _text(reply)


async def reap(redis: Redis, keep_ms: int, epoch: int) -> list[list[Any]]:
    """Requeue, fail or cancel at most 100 jobs whose lease has ended, as they are afterwards; trims the index."""
    return await _run(redis, _REAP, keep_ms, ["", epoch], fenced=True)


async def find(redis: Redis, keep_ms: int, limit: int, states: Sequence[str]) -> list[list[Any]]:
    """At most `limit` jobs in one of the states (none given: all), newest first."""
    return await _run(redis, _LIST, keep_ms, ["", limit, *states])


def _text(reply: bytes | str) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply
