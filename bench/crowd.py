"""Many simulated engines and workers in one event loop: what tided and Redis see of them is what they see of real ones.

An engine sends a heartbeat every second and a report every half second, and obeys commands (docs/protocol.md); it has no model. A worker
registers, sends heartbeats, claims, renews and finishes through the same stores as tide-worker, at its pace; its trainer is a pause.
What is shared is the connections, and one read for the commands of all engines.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

from redis.asyncio import Redis

from tided.engine.agent import HEARTBEAT_S, HEARTBEAT_TTL_S, OBSERVATIONS_KEPT, REPLIES_KEPT, STREAM_TTL_S
from tided.machine.job import Verdict
from tided.model.engines import EngineInfo, Observation, RequestStats, StepCounts, TapTotals
from tided.model.errors import Conflict
from tided.model.ids import new_id
from tided.model.jobs import JobKind, JobResult, JobSpec, Progress, WorkerInfo
from tided.store.client import connect, redis_time_ms
from tided.store.jobs import Claim, JobStore
from tided.store.workers import WorkerStore
from tided.wire import keys
from tided.wire.control import Command, Reply, SetCapture, SetSchedule, Swap, decode_command, encode
from tided.worker.agent import POLL_S, SLOTS
from tided.worker.attempt import RENEW_S

REPORT_S = 0.5
WORKER_BEATS = 4
"""Heartbeats in their TTL, as tide-worker has them."""


class Ending(StrEnum):
    """How an attempt ends; in a job's options."""

    FINISH = "finish"
    FAIL = "fail"  # its first attempt, to be tried again
    VANISH = "vanish"  # its first attempt: no renewal and no word more


@dataclass
class SimulatedEngine:
    """Heartbeat, reports and replies of one engine."""

    redis: Redis
    info: EngineInfo
    seq: int = 0
    cursor: bytes = b"0"

    async def beat(self) -> None:
        await self.redis.set(keys.info(self.info.engine), encode(self.info), ex=HEARTBEAT_TTL_S)

    async def report(self) -> None:
        """Half a second of four running requests of which one has ended."""
        self.seq += 1
        gamma = self.info.gammas[min(3, len(self.info.gammas) - 1)] if self.info.version else 0
        accepted = (20,) if not gamma else (8, *(2,) * (gamma - 1), 12 - 2 * (gamma - 1))
        stats = RequestStats(40, 80, 30, 30 * gamma, 14 * bool(gamma), self.info.version, 0.0)
        observation = Observation(
            engine=self.info.engine,
            incarnation=self.info.incarnation,
            seq=self.seq,
            at_ms=time.time_ns() // 1_000_000,
            version=self.info.version,
            running=4,
            waiting=0,
            steps=(StepCounts(4, gamma, 5, REPORT_S, accepted),),
            requests=(stats,),
            tap=TapTotals(),
        )
        name = keys.observations(self.info.engine)
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.xadd(name, {"m": encode(observation)}, maxlen=OBSERVATIONS_KEPT, approximate=True)
            pipe.expire(name, STREAM_TTL_S)
            await pipe.execute()

    async def obey(self, command: Command) -> None:
        data: dict[str, Any] = {}
        match command.body:
            case SetSchedule(gammas):
                self.info = replace(self.info, gammas=gammas)
            case SetCapture(on):
                self.info = replace(self.info, capturing=on)
            case Swap(version):
                self.info = replace(self.info, version=version)
                data = {"version": version, "seconds": 0.01}
            case _:
                raise RuntimeError(f"a simulated engine was sent {type(command.body).__name__}")
        self.info = replace(self.info, epoch=command.epoch)
        await self.beat()
        name = keys.replies(self.info.engine)
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.xadd(name, {"m": encode(Reply(command.id, command.epoch, True, "", data))}, maxlen=REPLIES_KEPT)
            pipe.expire(name, STREAM_TTL_S)
            await pipe.execute()


@dataclass(frozen=True, slots=True)
class Dispatched:
    """An attempt: when its job became due, and when a worker had it (both by Redis TIME)."""

    job: str
    attempt: int
    due_ms: int
    claimed_ms: int


@dataclass
class Crowd:
    """What has happened to all of them. `busy`: slots that hold a job now, by kind."""

    url: str
    seed: int = 0
    dispatched: list[Dispatched] = field(default_factory=list[Dispatched])
    finished: Counter[str] = field(default_factory=Counter[str])
    busy: Counter[JobKind] = field(default_factory=Counter[JobKind])
    most_busy: Counter[JobKind] = field(default_factory=Counter[JobKind])
    claims_s: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        self.redis = connect(self.url)
        self.rng = random.Random(self.seed)

    # --- engines ---

    def engines(self, infos: Sequence[EngineInfo]) -> list[Coroutine[Any, Any, None]]:
        """What they do for ever."""
        engines = [SimulatedEngine(self.redis, info) for info in infos]
        return [
            *(self._every(HEARTBEAT_S, engine.beat) for engine in engines),
            *(self._every(REPORT_S, engine.report) for engine in engines),
            self._commands({keys.commands(engine.info.engine): engine for engine in engines}),
        ]

    async def _commands(self, engines: dict[str, SimulatedEngine]) -> None:
        while True:
            cursors = {name: engine.cursor for name, engine in engines.items()}
            found = cast("list[Any]", await self.redis.xread(cast("Any", cursors), count=10, block=200) or [])
            for stream, entries in found:
                engine = engines[stream.decode()]
                for entry, fields in entries:
                    engine.cursor = entry
                    await engine.obey(decode_command(fields[b"m"]))

    # --- workers ---

    async def workers(self, names: Sequence[str], lease_s: float) -> list[Coroutine[Any, Any, None]]:
        """Register them; what they do for ever."""
        jobs, workers = JobStore(self.redis, lease_s), WorkerStore(self.redis)
        doing: list[Coroutine[Any, Any, None]] = []
        for name in names:
            kinds = tuple(kind for slot in SLOTS for kind in slot)
            info = WorkerInfo(name, new_id("worker"), "simulated", kinds, "cpu", 1)
            await workers.register(info)
            doing.append(self._every(workers.ttl_s / WORKER_BEATS, _beating(workers, info)))
            doing += [self._slot(jobs, name, slot) for slot in SLOTS]
        return doing

    async def _slot(self, jobs: JobStore, worker: str, kinds: tuple[JobKind, ...]) -> None:
        await asyncio.sleep(self.rng.random() * POLL_S)
        while True:
            asked_s = time.perf_counter()
            claim = await jobs.claim(worker, kinds)
            self.claims_s.append(time.perf_counter() - asked_s)
            if claim is None:
                await asyncio.sleep(POLL_S)
                continue
            job = claim.job
            self.dispatched.append(Dispatched(job.id, claim.attempt, job.not_before_ms, job.started_ms))
            kind = kinds[0]
            self.busy[kind] += 1
            self.most_busy[kind] = max(self.most_busy[kind], self.busy[kind])
            try:
                await self._attempt(jobs, claim)
            finally:
                self.busy[kind] -= 1

    async def _attempt(self, jobs: JobStore, claim: Claim) -> None:
        options = claim.job.spec.options
        ending = Ending(options["ending"]) if claim.attempt == 1 else Ending.FINISH
        until_s = time.monotonic() + options["seconds"]
        while (left_s := until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(RENEW_S, left_s))
            if ending is Ending.VANISH:
                return
            if await jobs.renew(claim, Progress(0.5, "training", 1.0, 2.0, 1000.0, left_s)) is not Verdict.GO_ON:
                self.finished["lost"] += 1
                return
        try:
            if ending is Ending.FAIL:
                await jobs.fail(claim, "as planned", retryable=True)
                self.finished["failed"] += 1
            else:
                await jobs.finish(claim, JobResult(seconds=options["seconds"]))
                self.finished["finished"] += 1
        except Conflict:
            self.finished["lost"] += 1

    async def _every(self, interval_s: float, work: Any) -> None:
        """At a phase of its own, so that they do not all speak at once."""
        await asyncio.sleep(self.rng.random() * interval_s)
        next_s = time.monotonic()
        while True:
            await work()
            next_s = max(next_s + interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())

    # --- jobs ---

    async def submit(self, spec: JobSpec, jobs: JobStore) -> None:
        """As the leader would."""
        await jobs.submit(spec, int(await self.redis.get(keys.epoch()) or 0))

    async def now_ms(self) -> int:
        return await redis_time_ms(self.redis)


def _beating(workers: WorkerStore, info: WorkerInfo) -> Any:
    async def beat() -> None:
        await workers.heartbeat(info)

    return beat


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """`work` in the background while the body runs, and ended with it. The first failure ends the body, and is raised."""
    body = asyncio.current_task()
    assert body is not None
    failed, inside = list[BaseException](), True

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None:
            failed.append(exc)
            if inside and len(failed) == 1:
                body.cancel()

    tasks = [asyncio.create_task(item) for item in work]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    except asyncio.CancelledError:
        if not failed:
            raise
        body.uncancel()
        raise failed[0] from None
    finally:
        inside = False
        while pending := [task for task in tasks if not task.done()]:
            for task in pending:
                task.cancel()  # again and again: redis-py can swallow a cancellation that meets a reply
            await asyncio.wait(pending, timeout=0.2)
