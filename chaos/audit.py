"""The invariants, each judged from records: Redis, disk, logs, what clients and watchers saw. One finding each; nothing is assumed."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis as redis_sync
from redis.asyncio import Redis

from chaos.load import Load
from chaos.plan import DAEMONS, ENGINES, WORKERS
from chaos.stack import Stack
from chaos.watch import Watch
from tests.conftest import unbounded_keys
from tided.draft import checkpoint
from tided.model.drafts import Draft
from tided.model.engines import EngineInfo
from tided.model.events import Event
from tided.model.jobs import Job, JobKind, JobState
from tided.store.client import connect
from tided.store.drafts import DraftStore
from tided.store.engines import EngineStore
from tided.store.events import EventStore
from tided.store.jobs import JobStore
from tided.store.ledger import read_ledger
from tided.store.replies import entries
from tided.store.samples import SampleStore, Split, read_runs
from tided.wire import keys
from tided.wire.control import Command, Reply, Swap, decode_command
from tided.worker.agent import STAGED_KEPT

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One invariant. `wrong`: each thing that breaks it; `measured`: what was looked at."""

    invariant: str
    promises: str
    measured: str
    wrong: Sequence[str] = ()

    @property
    def ok(self) -> bool:
        return not self.wrong


@dataclass(frozen=True, slots=True)
class Records:
    """All that Redis and the disk hold after the last fault, when everything is drained and still runs. `directories`: of jobs, with
    workers; read before the jobs are, for new ones come all the time."""

    engines: tuple[EngineInfo, ...]
    events: tuple[Event, ...]
    jobs: tuple[Job, ...]
    drafts: tuple[Draft, ...]
    commands: Mapping[str, tuple[tuple[str, Command], ...]]  # by engine, with their entries, as they came
    replies: Mapping[str, Mapping[str, Reply]]  # by engine and command
    led: Mapping[int, tuple[str, ...]]  # epoch -> the daemons whose logs say that they led under it
    now_ms: int
    directories: tuple[Path, ...]


async def read(stack: Stack) -> Records:
    """Everything, in one go."""
    directories = tuple(path for path in stack.work.glob("*/job-*/attempt-*") if path.is_dir())
    redis = connect(stack.valkey_url)
    try:
        engines = EngineStore(redis)
        commands, replies = dict[str, tuple[tuple[str, Command], ...]](), dict[str, dict[str, Reply]]()
        for engine in ENGINES:
            stream = entries(await redis.xrange(keys.commands(engine)))
            commands[engine] = tuple((entry, decode_command(message)) for entry, message in stream)
            found, _ = await engines.replies(engine, "0", 10_000)
            replies[engine] = {reply.command: reply for reply in found}
        seconds, micros = await redis.time()
        return Records(
            tuple(await engines.list()),
            tuple(await EventStore(redis).read("0", 100_000)),
            tuple(await JobStore(redis).list(100_000)),
            tuple(DraftStore(stack.config.drafts_dir).list()),
            commands,
            replies,
            _led(stack.root / "logs"),
            seconds * 1000 + micros // 1000,
            directories,
        )
    finally:
        await redis.aclose()


def _led(logs: Path) -> dict[int, tuple[str, ...]]:
    led: dict[int, tuple[str, ...]] = {}
    for daemon in DAEMONS:
        for line in (logs / f"{daemon}.log").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record: dict[str, Any] = json.loads(line)
                if record.get("event") == "leading":
                    epoch = int(record["epoch"])
                    led[epoch] = (*led.get(epoch, ()), daemon)
    return led


async def audit(stack: Stack, load: Load, watch: Watch, records: Records) -> list[Finding]:
    """All that can be told while everything still runs."""
    redis = connect(stack.valkey_url)
    try:
        return [
            answered(load),
            unharmed(stack, load),
            await accounts(redis, stack, watch),
            rows_once(watch),
            one_effect(records),
            nothing_stuck(records),
            one_leader(records, watch),
            obeyed(records),
            under_their_epochs(records, watch),
            served_as_said(stack, records),
            quarantine(records),
            told(records),
            bounded_keys(stack),
            no_litter(stack, records),
        ]
    finally:
        await redis.aclose()


def answered(load: Load) -> Finding:
    return Finding(
        "every request answered, as without faults",
        "10",
        f"{load.answered:,} of {load.asked:,} answered, {len(load.expected)} prompts, greedy",
        [*_unless(load.answered == load.asked, f"{load.asked - load.answered} without an answer"), *load.wrong],
    )


def unharmed(stack: Stack, load: Load) -> Finding:
    """A request fails with its engine, never because of Redis, tided, a worker, a collector or a swap."""
    unexplained = [
        f"{failure.engine}: {failure.error}"
        for failure in load.failures
        if not stack.kept[failure.engine].down(failure.start_s, failure.end_s)
    ]
    return Finding(
        "no request failed but with its engine",
        "10",
        f"{len(load.failures) - len(unexplained)} failed with their engine",
        unexplained,
    )


async def accounts(redis: Redis, stack: Stack, watch: Watch) -> Finding:
    """Promises 1 and 2: every tapped row has one fate, in Redis' ledger and on disk alike."""
    wrong, stored, text = list[str](), 0, list[str]()
    for engine in ENGINES:
        totals = await read_ledger(redis, engine)
        stored += totals.stored
        text.append(
            f"{engine}: {totals.tapped:,} = {totals.stored:,} stored + {totals.shed:,} shed + {totals.lost:,} lost"
            f" + {totals.unknown:,} unknown"
        )
        wrong += _unless(totals.in_flight == 0, f"{engine}: {totals.in_flight} rows are nowhere")
        wrong += _unless(totals.lost == 0, f"{engine}: {totals.lost} rows that were sent are lost")
        waiting = int(await redis.xlen(keys.samples(engine)))
        wrong += _unless(waiting == 0, f"{engine}: {waiting} entries are still in the stream")
        wrong += _unless(
            totals.stream_bytes == 0, f"{engine}: credit says {totals.stream_bytes} bytes in an empty stream"
        )
    samples = SampleStore(stack.config.samples_dir, 0.3, 1 << 40, 1e9)
    disk = samples.ledger()
    wrong += _unless(disk.stored == stored, f"the disk has stored {disk.stored:,} rows, the ledger says {stored:,}")
    linked = sum(run.rows for shard in watch.shards for run in read_runs(shard))
    wrong += _unless(linked == stored, f"shards that were published hold {linked:,} rows, the ledger says {stored:,}")
    return Finding("tapped = stored + shed + lost + unknown", "1, 2", "; ".join(text), wrong)


def rows_once(watch: Watch) -> Finding:
    seen = Counter[tuple[str, int]]()
    for shard in watch.shards:
        for run in read_runs(shard):
            for position in range(run.first_position, run.first_position + run.rows):
                seen[run.request, position] += 1
    twice = [f"{request} at {position}: {n} times" for (request, position), n in seen.items() if n > 1]
    return Finding("no row stored twice", "1", f"{len(seen):,} rows in {len(watch.shards)} shards", twice)


def one_effect(records: Records) -> Finding:
    """Promise 6: of all attempts at a job one took effect; a draft comes from one job and is what its result said."""
    wrong, trained = list[str](), {job.id: job for job in records.jobs if job.spec.kind is JobKind.TRAIN}
    made = Counter(draft.job for draft in records.drafts if draft.job)
    wrong += [f"job {job} made {n} drafts" for job, n in made.items() if n > 1]
    for draft in records.drafts:
        job = trained.get(draft.job)
        if not draft.job:
            continue
        if job is None or job.state is not JobState.SUCCEEDED or job.result is None:
            wrong.append(f"{draft.lineage}@{draft.number} is of job {draft.job}, which did not succeed")
        elif job.result.version != draft.version:
            wrong.append(f"job {job.id} committed {job.result.version[:12]}, stored is {draft.version[:12]}")
    numbers = Counter((draft.lineage, draft.number) for draft in records.drafts)
    wrong += [f"{lineage}@{number} is there {n} times" for (lineage, number), n in numbers.items() if n > 1]
    attempts = sum(job.attempt for job in records.jobs)
    ends = Counter(job.state.value for job in records.jobs)
    return Finding(
        "at most one attempt at a job took effect",
        "6",
        f"{len(records.jobs)} jobs, {attempts} attempts: {_counts(ends)}",
        wrong,
    )


def nothing_stuck(records: Records) -> Finding:
    running = [job for job in records.jobs if job.state is JobState.RUNNING]
    wrong = [f"job {job.id} runs without a lease" for job in running if job.lease_until_ms < records.now_ms]
    final = [event for event in records.events if event.kind == "deployment-failed"]
    return Finding(
        "nothing is stuck", "7", f"{len(running)} jobs run under a lease; {len(final)} deployments failed", wrong
    )


def one_leader(records: Records, watch: Watch) -> Finding:
    """Promises 4 and 5: an epoch has one leader, and no epoch was ever seen to go back."""
    wrong = [f"{' and '.join(who)} both led under epoch {epoch}" for epoch, who in records.led.items() if len(who) > 1]
    by = Counter(who for leaders in records.led.values() for who in leaders)
    return Finding(
        "one leader for an epoch; epochs only grow",
        "4, 5",
        f"{len(records.led)} terms: {_counts(by)}",
        [*wrong, *watch.back],
    )


def obeyed(records: Records) -> Finding:
    """Promise 4: an engine that was told a newer epoch obeys no older one."""
    wrong, asked = list[str](), 0
    for engine, commands in records.commands.items():
        highest = 0
        for _, command in commands:
            asked += 1
            reply = records.replies[engine].get(command.id)
            if command.epoch < highest and reply is not None and reply.ok:
                wrong.append(f"{engine} obeyed {type(command.body).__name__} of epoch {command.epoch} after {highest}")
            highest = max(highest, command.epoch)
    return Finding("no engine obeyed a superseded leader", "4", f"{asked} commands in the streams", wrong)


def under_their_epochs(records: Records, watch: Watch) -> Finding:
    """Promise 4: whatever carries an epoch carries one that a leader had."""
    known = set(records.led) | watch.epochs
    told = [(f"job {job.id}", job.epoch) for job in records.jobs]
    told += [(f"command {c.id} to {engine}", c.epoch) for engine, sent in records.commands.items() for _, c in sent]
    wrong = [f"{what} has epoch {epoch}, which nobody had" for what, epoch in told if epoch not in known]
    return Finding("every commit is under a leader's epoch", "4", f"{len(told)} records, {len(known)} epochs", wrong)


def served_as_said(stack: Stack, records: Records) -> Finding:
    """Promise 9: what an engine reports, read back from what it loaded, is a stored draft whose content has that digest."""
    stored = {draft.version: draft for draft in records.drafts}
    wrong, text = list[str](), list[str]()
    for info in records.engines:
        draft = stored.get(info.version)
        if draft is None:
            wrong.append(f"{info.engine} serves {info.version[:12]}, which is not in the store")
            continue
        text.append(f"{info.engine}: {draft.lineage}@{draft.number}")
        actual = checkpoint.version_of(stack.config.drafts_dir / info.version)
        wrong += _unless(actual == info.version, f"{info.version[:12]} on disk is {actual[:12]}")
        # A fresh engine begins with version 0, whatever became of that.
        banned = draft.quarantined and draft.number > 0
        wrong += _unless(not banned, f"{info.engine} serves {draft.lineage}@{draft.number}: {draft.quarantined}")
    wrong += _unless(len(records.engines) == len(ENGINES), f"only {len(records.engines)} engines are there")
    return Finding("engines serve what they report", "9", "; ".join(text), wrong)


def quarantine(records: Records) -> Finding:
    """Promise 11: after a version was set aside no swap to it was sent."""
    since = {event.subject: _ms(event.id) for event in records.events if event.kind == "draft-quarantined"}
    wrong = [
        f"{engine} was sent {command.body.version[:12]} after its quarantine"
        for engine, commands in records.commands.items()
        for entry, command in commands
        if isinstance(command.body, Swap) and _ms(entry) > since.get(command.body.version, 1 << 62)
    ]
    return Finding("nothing in quarantine is deployed again", "11", f"{len(since)} versions in quarantine", wrong)


def told(records: Records) -> Finding:
    """What happened reads as a story: a draft is live on an engine after its deployment began, and was added before."""
    wrong, begun, added = list[str](), set[tuple[str, str]](), {draft.version for draft in records.drafts}
    for event in records.events:
        version = str(event.data.get("version", ""))
        if event.kind == "deployment-started":
            begun.add((event.subject, version))
            wrong += _unless(version in added, f"{version[:12]} was deployed and is not in the store")
        elif event.kind in ("draft-swapped", "draft-live") and (event.subject, version) not in begun:
            wrong.append(f"{event.kind} {version[:12]} on {event.subject}, which nobody deployed")
    kinds = Counter(event.kind for event in records.events)
    shown = {kind: kinds[kind] for kind in ("training-started", "draft-swapped", "draft-live", "draft-rolled-back")}
    return Finding("events are consistent", "8", f"{len(records.events)} events: {_counts(shown)}", wrong)


def bounded_keys(stack: Stack) -> Finding:
    """Promise 15."""
    client = redis_sync.Redis(unix_socket_path=stack.valkey_url.removeprefix("unix://"))
    try:
        count = client.dbsize()
        return Finding("no key lives for ever undeclared", "15", f"{count} keys", unbounded_keys(client))
    finally:
        client.close()


def no_litter(stack: Stack, records: Records) -> Finding:
    """Attempts, commits and copies that were cut short have been removed, or are kept within their bound."""
    jobs = {job.id: job for job in records.jobs}
    wrong = [f"{path} is of no job" for path in records.directories if path.parent.name not in jobs]
    for worker in WORKERS:
        held = {path.parent for path in records.directories if path.parents[1].name == worker}
        limit = STAGED_KEPT + 2  # and one in each slot
        wrong += _unless(
            len(held) <= limit, f"{worker} keeps {len(held)} directories of jobs, at most {limit} are meant"
        )
    left = Counter(path.parent.name for path in records.directories)
    for job_id, count in left.items():
        job = jobs.get(job_id)
        most = 1 if job is not None and job.state is JobState.SUCCEEDED else job.attempt if job is not None else 0
        wrong += _unless(count <= most, f"{count} attempts at job {job_id} are left, at most {most} are meant")
    shared = stack.root / "shared"
    wrong += [f"{path} is left" for path in (*shared.glob("drafts/.staging-*"), *shared.glob("samples/staging/*"))]
    return Finding(
        "no attempt, commit or copy is left behind", "6, 7", f"{len(records.directories)} attempts are kept", wrong
    )


def ended(stack: Stack, stops: Mapping[str, tuple[int | None, float]], left: Iterable[str]) -> list[Finding]:
    """After SIGTERM to all: promise 12, and whether any process ended of itself before."""
    slow = [f"{name} ended with {code} after {s:.1f} s" for name, (code, s) in stops.items() if code != 0]
    slowest = max((s for _, s in stops.values()), default=0.0)
    lives = [(name, life) for name, kept in stack.kept.items() for life in kept.lives]
    alone = [
        f"{name} ended with {life.code} after {(life.ended_s or 0.0) - life.started_s:.0f} s"
        for name, life in lives
        if life.ended_s is not None and not life.meant and name not in stops
    ]
    alone += [
        f"{name} ended with {life.code} and no fault had befallen it"
        for name, kept in stack.kept.items()
        for life in kept.lives[:-1]
        if not life.meant
    ]
    return [
        Finding(
            "SIGTERM ends all in order, in time", "12", f"{len(stops)} processes, the slowest {slowest:.1f} s", slow
        ),
        Finding("no process ended of itself", "7", f"{len(lives)} lives of {len(stack.kept)} processes", alone),
        Finding("no process is left", "12", "all of /proc", list(left)),
    ]


def leftover(*directories: Path) -> list[str]:
    """Processes whose command line names one of these directories."""
    found = list[str]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if any(str(directory) in line for directory in directories):
                found.append(f"process {path.parent.name}: {line[:120]}")
    return found


async def drained(stack: Stack) -> bool:
    """Whether every row that was tapped has its fate."""
    redis = connect(stack.valkey_url)
    try:
        for engine in ENGINES:
            totals = await read_ledger(redis, engine)
            if totals.in_flight or await redis.xlen(keys.samples(engine)):
                return False
    finally:
        await redis.aclose()
    samples = stack.config.samples_dir
    return not any((samples / "staging").iterdir()) and (samples / Split.TRAIN).is_dir()


def _ms(entry: str) -> int:
    return int(entry.partition("-")[0])


def _unless(condition: bool, wrong: str) -> list[str]:
    return [] if condition else [wrong]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none"
