"""tide-worker: the agent on a training host. It claims jobs and runs each attempt as a subprocess; it never imports torch.

What it has (kind and number of devices, memory, how fast it trained last) goes with every claim and heartbeat: it is given what fits.
One slot trains; another scores and makes references, so that a quick question never waits behind a training. Redis away: nothing is
claimed, running attempts go on while their leases last. SIGTERM: claim nothing more, let attempts finish for `drain_s`, then give
their jobs back; a second signal gives them back at once. An operator's drain is the same, but that the worker stays, for the day on which
it is uncordoned. Where a scheduler owns the devices, a worker is started for so many jobs, and ends after them or when none comes.
"""

import argparse
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import structlog

from tided import config as configuration
from tided import logs
from tided.model import failpoints
from tided.model.errors import ConfigError, TideError
from tided.model.ids import check_name, new_id
from tided.model.jobs import JobKind, WorkerInfo
from tided.store.client import connect, shown
from tided.store.jobs import Claim, JobStore
from tided.store.lease import boottime_s
from tided.store.workers import Beat, WorkerStore
from tided.wire.notify import notify
from tided.worker.attempt import Attempt
from tided.worker.settings import WorkerSettings
from tided.worker.staging import CACHE_DIR, Staging

POLL_S = 0.5
EXIT_CONFIG = 2
"""The unit does not restart after it: nothing would change."""
STAGED_KEPT = 8
DROP_EVERY_S = 10.0
SLOTS = ((JobKind.TRAIN,), (JobKind.SCORE, JobKind.REFERENCE))

_log = structlog.get_logger()


class Agent:
    """`run` returns when the worker has drained; `replaced` then tells whether another process has taken its name."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._redis = connect(settings.redis_url)
        self._jobs = JobStore(self._redis, settings.lease_s, settings.keep_s)
        self._workers = WorkerStore(self._redis, settings.heartbeat_ttl_s)
        self._staging = Staging.of(settings)
        self._incarnation = new_id("worker")
        self._stop = anyio.Event()
        self._give_back = anyio.Event()
        self._told = Beat.NOTED
        self._drains_since_s: float | None = None
        self._rate = 0.0
        self._asking = anyio.Lock()
        self._left = settings.jobs or math.inf
        self._idle_since_s = time.monotonic()
        self._reachable = False
        self._told_reachable: bool | None = None
        self._running: dict[JobKind, str] = {}
        self.replaced = False
        self.cut_off = False
        """It ended because nothing came, and Redis could not be reached."""

    async def run(self) -> None:
        await self._sweep()
        notify("READY=1\nSTATUS=starting")
        try:
            async with anyio.create_task_group() as background:
                background.start_soon(self._heed_signals)
                background.start_soon(self._beat)
                background.start_soon(self._time_drain)
                background.start_soon(self._drop_old_samples)
                async with anyio.create_task_group() as slots:
                    for kinds in SLOTS:
                        served = [kind for kind in kinds if kind in self._settings.kinds]
                        if served:
                            slots.start_soon(self._slot, served)
                background.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                await self._sign_off()
        _log.info("worker-stopped", worker=self._settings.name)

    def stop(self) -> None:
        """Drain; called again: give running jobs back at once."""
        if self._stop.is_set():
            self._give_back.set()
        self._stop.set()
        notify("STOPPING=1\nSTATUS=draining")

    async def _heed_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                _log.info("signal", name=number.name)
                self.stop()

    async def _time_drain(self) -> None:
        await self._stop.wait()
        await anyio.sleep(self._settings.drain_s)
        self._give_back.set()

    async def _slot(self, kinds: Sequence[JobKind]) -> None:
        while not self._stop.is_set() and self._left > 0:
            async with self._asking:  # slots must not both take the last job
                claimed_s = boottime_s()
                asks = self._left > 0 and self._reachable and self._told is Beat.NOTED
                claim = await self._claim(kinds) if asks else None
                if claim is not None:
                    self._left -= 1
                    self._running[claim.job.spec.kind] = claim.job.id
                elif self._has_idled():
                    self.cut_off = not self._reachable
                    self.stop()
            if claim is None:
                with anyio.move_on_after(POLL_S):
                    await self._stop.wait()
                continue
            kind = claim.job.spec.kind
            try:
                attempt = Attempt(self._jobs, claim, self._settings, self._staging, self._give_back, claimed_s)
                await attempt.run()
            finally:
                del self._running[kind]
                self._idle_since_s = time.monotonic()
            if kind is JobKind.TRAIN:
                self._rate = attempt.rate or self._rate
            await self._sweep()

    def _has_idled(self) -> bool:
        """Redis may be away for a lease longer."""
        idle_s, away_s = self._settings.idle_s, 0.0 if self._reachable else self._settings.lease_s
        return idle_s > 0 and not self._running and time.monotonic() - self._idle_since_s >= idle_s + away_s

    async def _claim(self, kinds: Sequence[JobKind]) -> Claim | None:
        """A job to do, if there is one. A claim whose answer is lost comes back to the queue when its lease ends."""
        try:
            # Rates are those of trainings: of other kinds no job waits for a faster worker.
            has = self._settings.capacity(self._rate if JobKind.TRAIN in kinds else 0.0)
            claim = await self._jobs.claim(self._settings.name, kinds, has)
            if claim is not None:
                failpoints.hit("worker.claimed")
        except TideError as exc:
            _log.warning("cannot-claim", why=str(exc))
            return None
        return claim

    async def _sweep(self) -> None:
        await anyio.to_thread.run_sync(_remove_old, self._settings.work_dir, frozenset(self._running.values()))

    async def _drop_old_samples(self) -> None:
        """What is gone from the shared storage goes here too: samples are as private as prompts."""
        while self._staging is not None:
            try:
                await anyio.to_thread.run_sync(self._staging.drop_old_samples)
            except TideError as exc:
                _log.warning("storage-unavailable", why=str(exc))
            await anyio.sleep(DROP_EVERY_S)

    async def _beat(self) -> None:
        """Heartbeats, for ever; while Redis is away, attempts to come back."""
        beat = self._workers.register
        while True:
            started_s = time.monotonic()
            try:
                answer = await beat(self._info())
            except TideError as exc:
                self._noted(reachable=False, why=str(exc))
            else:
                self._noted(reachable=True)
                beat = self._workers.heartbeat
                self._heed(answer)
                if answer is Beat.REPLACED:
                    _log.error("worker-replaced", worker=self._settings.name)
                    self.replaced = True
                    self.stop()
                    return
            notify("WATCHDOG=1")
            await anyio.sleep(max(0.1, self._settings.heartbeat_ttl_s / 4 - (time.monotonic() - started_s)))

    def _heed(self, told: Beat) -> None:
        """Take an operator's wish in: what runs is given back when the worker has drained for `drain_s`."""
        if told is not self._told:
            _log.info("told", worker=self._settings.name, by="operator", what=told.name.lower())
        self._told = told
        if told is not Beat.DRAIN:
            self._drains_since_s = None
            if self._give_back.is_set() and not self._stop.is_set():
                self._give_back = anyio.Event()
            return
        if self._drains_since_s is None:
            self._drains_since_s = time.monotonic()
        if time.monotonic() - self._drains_since_s >= self._settings.drain_s:
            self._give_back.set()

    def _noted(self, *, reachable: bool, why: str = "") -> None:
        if reachable != self._told_reachable:
            url = shown(self._settings.redis_url)
            (_log.info if reachable else _log.warning)("redis", url=url, reachable=reachable, why=why)
            notify(f"STATUS={'ready' if reachable else f'waiting for Redis at {url}'}")
        if reachable and not self._reachable:
            self._idle_since_s = time.monotonic()
        self._reachable = self._told_reachable = reachable

    def _info(self) -> WorkerInfo:
        has = self._settings.capacity(self._rate)
        return WorkerInfo(
            worker=self._settings.name,
            incarnation=self._incarnation,
            host=socket.gethostname(),
            kinds=self._settings.kinds,
            device=self._settings.device,
            threads=self._settings.threads,
            job=next(iter(self._running.values()), ""),
            draining=self._told is Beat.DRAIN or self._stop.is_set(),
            pid=os.getpid(),
            devices=has.devices,
            memory_bytes=has.memory_bytes,
            rate=has.rate,
        )

    async def _sign_off(self) -> None:
        try:
            await self._workers.remove(self._info())
        except TideError as exc:
            _log.warning("not-signed-off", why=str(exc))  # its heartbeat's TTL says it instead
        await self._redis.aclose()


def _remove_old(work_dir: Path, running: frozenset[str]) -> None:
    """Keep what the newest jobs staged. By count, not by age: jobs come from a leader, which takes a result before it asks for more."""
    if not work_dir.is_dir():
        return
    done = [path for path in work_dir.iterdir() if path.is_dir() and path.name not in running | {CACHE_DIR}]
    for job_dir in sorted(done, key=lambda path: path.name, reverse=True)[STAGED_KEPT:]:
        shutil.rmtree(job_dir, ignore_errors=True)


def parse_settings(argv: Sequence[str]) -> WorkerSettings:
    """Flags over the configuration file over defaults. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(prog="tide-worker", description="Run training and scoring jobs for tided.")
    parser.add_argument("--config", type=Path, help="the configuration file that tided runs from")
    parser.add_argument("--redis", dest="redis_url", help="unix://PATH, redis://HOST or rediss://HOST")
    parser.add_argument("--name", help="unique among workers")
    parser.add_argument("--kinds", help="comma-separated: train, score, reference")
    parser.add_argument("--work-dir", type=Path, help="for attempts; without --storage tided must be able to read it")
    parser.add_argument("--storage", dest="storage_url", help="the shared storage, where this host has no --config")
    parser.add_argument(
        "--target", dest="targets", action="append", type=Path, help="with --storage: a target's directory here"
    )
    parser.add_argument("--threads", type=int, help="of each trainer")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--devices", type=int, help="a training runs on so many, by torchrun")
    parser.add_argument("--memory-bytes", type=int, help="of each device, for jobs that need it")
    parser.add_argument("--cpus", help="cores for the agent and its trainers, comma-separated")
    parser.add_argument("--nice", type=int, help="of the trainers")
    parser.add_argument("--drain-s", type=float, help="after SIGTERM, let attempts go on for so long")
    parser.add_argument("--jobs", type=int, help="end after so many; 0: never")
    parser.add_argument("--idle-s", type=float, help="end when there has been no job for so long; 0: never")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    values: dict[str, Any] = {"name": socket.gethostname().lower(), "kinds": "train,score,reference"}
    path = given.pop("config", None)
    work_dir = Path("build/work")
    if path is not None:
        config = configuration.load(path)
        work_dir = config.daemon.state_dir / "work"
        values |= _from_config(config)
    values |= given
    if "redis_url" not in values:
        raise ConfigError("tide-worker: give --config FILE, or --redis URL")
    values["targets"] = tuple(values.get("targets", ()))
    values.setdefault("work_dir", work_dir / values["name"])
    try:
        values["name"] = check_name(values["name"], "worker")
        values["kinds"] = tuple(JobKind(kind.strip()) for kind in values["kinds"].split(","))
        values["cpus"] = tuple(int(core) for core in values["cpus"].split(",")) if "cpus" in values else ()
    except (TideError, ValueError) as exc:
        raise ConfigError(f"tide-worker: {exc}") from exc
    if values.get("threads", 1) < 1 or values.get("drain_s", 0.0) < 0:
        raise ConfigError("tide-worker: --threads must be at least 1 and --drain-s not negative")
    if values.get("jobs", 0) < 0 or values.get("idle_s", 0.0) < 0:
        raise ConfigError("tide-worker: --jobs and --idle-s must not be negative")
    if values.get("devices", 1) < 1:
        raise ConfigError("tide-worker: --devices must be at least 1")
    if values.get("devices", 1) > 1 and ":" in values.get("device", "cpu"):
        raise ConfigError("tide-worker: --device must be a kind without a number when there are several --devices")
    return WorkerSettings(**values)


def _from_config(config: configuration.Config) -> dict[str, Any]:
    worker = config.worker
    return {
        "redis_url": config.redis_url,
        "name": worker.name,
        "kinds": ",".join(worker.kinds),
        "threads": worker.threads,
        "device": worker.device,
        "devices": worker.devices,
        "memory_bytes": worker.memory_bytes,
        "drain_s": worker.drain_s,
        "lease_s": config.jobs.lease_s,
        "keep_s": config.jobs.keep_s,
        "storage_url": config.storage.url.get_secret_value(),
        "storage_options": config.storage.options,
        "cache_bytes": config.storage.cache_bytes,
        "targets": tuple(target.path for target in config.target),
    }


def main() -> None:
    try:
        settings = parse_settings(sys.argv[1:])
        if settings.cpus:
            os.sched_setaffinity(0, settings.cpus)
        agent = Agent(settings)
        os.umask(0o077)  # for its trainers too
        settings.work_dir.mkdir(parents=True, exist_ok=True)
    except ConfigError as exc:
        sys.stderr.write(f"{exc}\n")
        sys.exit(EXIT_CONFIG)
    except OSError as exc:
        sys.exit(f"tide-worker: {exc}")
    logs.configure()
    anyio.run(agent.run)
    if agent.cut_off:
        sys.exit(f"tide-worker: Redis at {shown(settings.redis_url)} could not be reached")
    if agent.replaced:
        sys.exit(f"tide-worker: another process has registered as {settings.name}; give each worker its own --name")


if __name__ == "__main__":
    main()
