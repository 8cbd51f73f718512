"""The Lua scripts of jobs, each one typed async function. They follow `tided.machine.job`; a contract test compares the two.

A job is one hash; what the scripts decide by are plain fields, the rest are msgpack records that they never open. A queue is a
sorted set by the time before which a job must not start, `running` one by the end of the lease. Queued jobs, and those that ended in
one state, are also in an index by the time at which they came into it, so that no script walks over all jobs. Every write sets the TTL
anew: a job that nothing has touched for `keep_ms` is forgotten.
"""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from tided.machine.job import BACKOFF_BASE_MS, BACKOFF_CAP_MS
from tided.machine.placement import FASTER, IDLE_MS, LOOKED_AT, PATIENCE_MS, Offer
from tided.store.scripts import run
from tided.wire import keys

# KEYS and ARGV begin alike in all of them: KEYS[1..3] = running, queues, untold; ARGV[1..4] = the prefixes of jobs, queues and indexes,
# keep_ms. Then ARGV[5] = id, where the script is about one job.
_COMMON = f"""
local BASE, CAP = {BACKOFF_BASE_MS}, {BACKOFF_CAP_MS}
local running, queues, untold = KEYS[1], KEYS[2], KEYS[3]
local job_prefix, queue_prefix, index_prefix, keep = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local now = now_ms()
local function touch(id) redis.call('PEXPIRE', job_prefix .. id, keep) end
local function add(key, score, id)
  redis.call('ZADD', key, score, id)
  redis.call('PEXPIRE', key, keep)
end
local function enqueue(id, alike, not_before)
  add(queue_prefix .. alike, int(not_before), id)
  add(queues, '-' .. string.match(alike, '^%d+'), alike)
  add(index_prefix .. 'queued', int(now), id)
end
local function dequeue(id, alike)
  redis.call('ZREM', queue_prefix .. alike, id)
  redis.call('ZREM', index_prefix .. 'queued', id)
end
local function holds(job, attempt)
  local f = redis.call('HMGET', job, 'state', 'attempt', 'lease_until_ms')
  return f[1] == 'running' and f[2] == attempt and now < tonumber(f[3])
end
local function cancelling(job) return redis.call('HGET', job, 'cancelling') == '1' end
local function close(id, state, ...)
  redis.call('HSET', job_prefix .. id, 'state', state, 'cancelling', '0', 'lease_until_ms', '0', 'finished_ms', int(now), ...)
  redis.call('ZREM', running, id)
  add(index_prefix .. state, int(now), id)
  if state == 'failed' then
    redis.call('RPUSH', untold, id)
    redis.call('PEXPIRE', untold, keep)
  end
  touch(id)
end
local function requeue(id, not_before, ...)
  local job = job_prefix .. id
  redis.call('HSET', job, 'state', 'queued', 'not_before_ms', int(not_before), 'lease_until_ms', '0', 'worker', '', ...)
  redis.call('HDEL', job, 'progress')
  redis.call('ZREM', running, id)
  enqueue(id, redis.call('HGET', job, 'alike'), not_before)
  touch(id)
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
local refused = fence(KEYS[4], ARGV[6])
if refused then return refused end
local id, alike = ARGV[5], ARGV[8]
local job = job_prefix .. id
if redis.call('EXISTS', job) == 0 then
  redis.call('HSET', job, 'state', 'queued', 'epoch', ARGV[6], 'spec', ARGV[7], 'alike', alike, 'attempt', '0',
    'max_attempts', ARGV[9], 'created_ms', int(now), 'not_before_ms', int(now), 'lease_until_ms', '0', 'worker', '',
    'cancelling', '0', 'started_ms', '0', 'finished_ms', '0', 'error', '')
  enqueue(id, alike, now)
  touch(id)
end
return read(id)
"""

# Its cost grows with the number of queues that are not empty, never with that of jobs. Names follow `tided.machine.placement`.
_CLAIM = f"""
local FASTER, PATIENCE, IDLE, LOOKED_AT = {FASTER}, {PATIENCE_MS}, {IDLE_MS}, {LOOKED_AT}
local idle, offers = KEYS[4], KEYS[5]
local worker, lease_ms, kinds, rate = ARGV[5], tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[12])
local offer = {{kinds = kinds, device = ARGV[9], devices = tonumber(ARGV[10]), memory = tonumber(ARGV[11])}}
local function not_idle(name)
  redis.call('ZREM', idle, name)
  redis.call('HDEL', offers, name)
end
if redis.call('EXISTS', ARGV[6] .. worker) == 1 then
  not_idle(worker)
  return false
end
local function fits(needs, other)
  return string.find(other.kinds, ',' .. needs.kind .. ',', 1, true) and (needs.device == 'any' or needs.device == other.device)
    and needs.devices <= other.devices and needs.memory <= other.memory
end
local faster
local function looked_up()
  faster = {{}}
  if rate <= 0 then return end
  for _, name in ipairs(redis.call('ZRANGE', idle, '+inf', FASTER * rate, 'BYSCORE', 'REV', 'LIMIT', 0, LOOKED_AT)) do
    local asked, named, device, devices, memory =
      string.match(redis.call('HGET', offers, name) or '', '^(%d+)|([^|]*)|([^|]*)|(%d+)|(%d+)$')
    if asked and now < tonumber(asked) + IDLE then
      faster[#faster + 1] = {{kinds = named, device = device, devices = tonumber(devices), memory = tonumber(memory)}}
    else not_idle(name) end
  end
end
local function left(needs, due)
  if rate <= 0 or now >= due + PATIENCE then return false end
  if not faster then looked_up() end
  for _, other in ipairs(faster) do if fits(needs, other) then return true end end
  return false
end
local function head(queue)
  while true do
    local found = redis.call('ZRANGEBYSCORE', queue, '-inf', int(now), 'WITHSCORES', 'LIMIT', 0, 1)
    if #found == 0 then return end
    if redis.call('HGET', job_prefix .. found[1], 'state') == 'queued' then return found[1], tonumber(found[2]) end
    redis.call('ZREM', queue, found[1])
    redis.call('ZREM', index_prefix .. 'queued', found[1])
  end
end
local best
for _, alike in ipairs(redis.call('ZRANGE', queues, 0, -1)) do
  local needs = {{}}
  needs.priority, needs.kind, needs.device, needs.devices, needs.memory =
    string.match(alike, '^(%d+)%.(%l+)%.(%l+)%.(%d+)%.(%d+)$')
  needs.devices, needs.memory = tonumber(needs.devices), tonumber(needs.memory)
  if best and best.priority ~= needs.priority then break end
  if fits(needs, offer) then
    local id, due = head(queue_prefix .. alike)
    if not id then
      if redis.call('EXISTS', queue_prefix .. alike) == 0 then redis.call('ZREM', queues, alike) end
    elseif not left(needs, due) and (not best or due < best.due or (due == best.due and id < best.id)) then
      best = {{priority = needs.priority, id = id, due = due, alike = alike}}
    end
  end
end
if not best then
  if rate > 0 then
    redis.call('ZADD', idle, ARGV[12], worker)
    redis.call('HSET', offers, worker, table.concat({{int(now), kinds, ARGV[9], ARGV[10], ARGV[11]}}, '|'))
    redis.call('PEXPIRE', idle, keep)
    redis.call('PEXPIRE', offers, keep)
  end
  return false
end
not_idle(worker)
dequeue(best.id, best.alike)
local job = job_prefix .. best.id
local lease_until = int(now + lease_ms)
redis.call('HINCRBY', job, 'attempt', 1)
redis.call('HSET', job, 'state', 'running', 'worker', worker, 'lease_until_ms', lease_until, 'started_ms', int(now), 'error', '')
add(running, lease_until, best.id)
touch(best.id)
return read(best.id)
"""

_RENEW = """
local id, job = ARGV[5], job_prefix .. ARGV[5]
if not holds(job, ARGV[6]) then return 'lost' end
if cancelling(job) then return 'cancel' end
local lease_until = int(now + tonumber(ARGV[7]))
redis.call('HSET', job, 'lease_until_ms', lease_until)
if ARGV[8] ~= '' then redis.call('HSET', job, 'progress', ARGV[8]) end
add(running, lease_until, id)
touch(id)
return 'go-on'
"""

_FINISH = """
local id, job = ARGV[5], job_prefix .. ARGV[5]
local f = redis.call('HMGET', job, 'state', 'attempt', 'result')
if f[1] == 'succeeded' and f[2] == ARGV[6] and f[3] == ARGV[7] then return 'done' end
if not holds(job, ARGV[6]) then return 'lost' end
if cancelling(job) then close(id, 'cancelled') return 'cancelled' end
close(id, 'succeeded', 'result', ARGV[7])
return 'done'
"""

_FAIL = """
local id, job = ARGV[5], job_prefix .. ARGV[5]
if not holds(job, ARGV[6]) then return 'lost' end
if cancelling(job) then close(id, 'cancelled')
elseif ARGV[8] == '1' then retry(id, ARGV[7])
else close(id, 'failed', 'error', ARGV[7]) end
return 'done'
"""

_RELEASE = """
local id, job = ARGV[5], job_prefix .. ARGV[5]
if not holds(job, ARGV[6]) then return 'lost' end
if cancelling(job) then close(id, 'cancelled')
else
  redis.call('HINCRBY', job, 'max_attempts', 1)
  requeue(id, now)
end
return 'done'
"""

_CANCEL = """
local refused = fence(KEYS[4], ARGV[6])
if refused then return refused end
local id, job = ARGV[5], job_prefix .. ARGV[5]
local state = redis.call('HGET', job, 'state')
if not state then return 'missing' end
if state == 'queued' then
  dequeue(id, redis.call('HGET', job, 'alike'))
  close(id, 'cancelled')
elseif state == 'running' then
  redis.call('HSET', job, 'cancelling', '1')
  touch(id)
elseif state ~= 'cancelled' then return state end
return read(id)
"""

_REAP = """
local refused = fence(KEYS[4], ARGV[6])
if refused then return refused end
local reaped, known = {}, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', int(now), 'LIMIT', 0, 100)) do
  local job = job_prefix .. id
  if redis.call('EXISTS', job) == 0 then redis.call('ZREM', running, id)
  else
    local worker = redis.call('HGET', job, 'worker')
    if cancelling(job) then close(id, 'cancelled')
    else retry(id, 'worker ' .. worker .. ' stopped renewing its lease (died, hung or cut off)') end
    reaped[#reaped + 1], known[id] = read(id), true
  end
end
for _, id in ipairs(redis.call('LPOP', untold, 100) or {}) do
  if not known[id] and redis.call('EXISTS', job_prefix .. id) == 1 then reaped[#reaped + 1] = read(id) end
end
for _, state in ipairs({'queued', 'succeeded', 'failed', 'cancelled'}) do
  redis.call('ZREMRANGEBYSCORE', index_prefix .. state, '-inf', int(now - tonumber(keep)))
end
return reaped
"""

# At most `limit` of each state are looked at.
_LIST = """
local limit, found = tonumber(ARGV[6]), {}
for i = 7, #ARGV do
  local index = ARGV[i] == 'running' and running or index_prefix .. ARGV[i]
  for _, id in ipairs(redis.call('ZREVRANGE', index, 0, limit - 1)) do
    local created = redis.call('HGET', job_prefix .. id, 'created_ms')
    if created then found[#found + 1] = {id = id, created = tonumber(created)} end
  end
end
table.sort(found, function(a, b)
  if a.created == b.created then return a.id > b.id end
  return a.created > b.created
end)
local newest = {}
for i = 1, math.min(limit, #found) do newest[i] = read(found[i].id) end
return newest
"""

Arg = str | int | bytes
_PREFIXES = (keys.JOB_PREFIX, keys.QUEUE_PREFIX, keys.JOBS_PREFIX)


async def _run(redis: Redis, body: str, keep_ms: int, args: Sequence[Arg], more: Sequence[str] = ()) -> Any:
    script_keys = [keys.running(), keys.queues(), keys.untold(), *more]
    return await run(redis, _COMMON + body, script_keys, [*_PREFIXES, keep_ms, *args])


async def submit(
    redis: Redis, keep_ms: int, job_id: str, epoch: int, spec: bytes, alike: str, max_attempts: int
) -> list[Any]:
    """Queue a job; the job as stored, [id, [field, value, ...]]. The same id again changes nothing."""
    return await _run(redis, _SUBMIT, keep_ms, [job_id, epoch, spec, alike, max_attempts], [keys.epoch()])


async def claim(redis: Redis, keep_ms: int, lease_ms: int, worker: str, offer: Offer) -> list[Any] | None:
    """Take the job that `tided.machine.placement.choose` says; the job, or None."""
    kinds = f",{','.join(kind.value for kind in offer.kinds)},"
    has: list[Arg] = [offer.has.device, offer.has.devices, offer.has.memory_bytes, repr(offer.has.rate)]
    args = [worker, keys.CORDON_PREFIX, lease_ms, kinds, *has]
    return await _run(redis, _CLAIM, keep_ms, args, [keys.idle(), keys.offers()])


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
    reply = await _run(redis, _CANCEL, keep_ms, [job_id, epoch], [keys.epoch()])
    return reply if isinstance(reply, list) else _text(reply)


async def reap(redis: Redis, keep_ms: int, epoch: int) -> list[list[Any]]:
    """Requeue, fail or cancel at most 100 jobs whose lease has ended, as they are afterwards, and what has failed since; trims indexes."""
    return await _run(redis, _REAP, keep_ms, ["", epoch], [keys.epoch()])


async def find(redis: Redis, keep_ms: int, limit: int, states: Sequence[str]) -> list[list[Any]]:
    """At most `limit` jobs in one of the states, newest first; of each state those that came into it last."""
    return await _run(redis, _LIST, keep_ms, ["", limit, *states])


def _text(reply: bytes | str) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply
