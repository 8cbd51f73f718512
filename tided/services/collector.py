"""tided-collector: a process of its own that brings samples from the engines' streams to shards on disk, a task for each engine."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from tided import config
from tided.model.errors import Refused, TideError, Unavailable
from tided.model.ids import check_name
from tided.services.assembly import Limits
from tided.services.engine_collector import UPKEEP_S, CollectorSettings, EngineCollector
from tided.store.client import closing, connect, shown, translated
from tided.store.samples import Commit, SampleStore
from tided.wire import keys
from tided.wire.notify import notify, watchdog_interval_s

log = structlog.get_logger(__name__)


class Collector:
    """All engines of one Redis: finds them, runs one `EngineCollector` each."""

    def __init__(self, settings: CollectorSettings, store: SampleStore, engines: Sequence[str] = ()) -> None:
        self._settings, self._store = settings, store
        self._engines = set(engines)
        self._running: set[str] = set()

    async def run(self, stopping: anyio.Event) -> None:
        """Collect until `stopping` is set and everything that is held was written."""
        adopted: dict[str, list[Commit]] = {}
        for commit in await anyio.to_thread.run_sync(self._store.unpublished):
            adopted.setdefault(str(commit.receipt["engine"]), []).append(commit)
        self._engines.update(adopted)
        async with anyio.create_task_group() as tasks:
            while not stopping.is_set():
                await self._find()
                await self._prune()
                for engine in self._engines - self._running:
                    self._running.add(engine)
                    collector = EngineCollector(engine, self._settings, self._store)
                    for commit in adopted.pop(engine, []):
                        collector.adopt(commit)
                    tasks.start_soon(collector.run, stopping, name=f"collect {engine}")
                with anyio.move_on_after(UPKEEP_S):
                    await stopping.wait()

    async def _find(self) -> None:
        """Engines that are alive, and engines that left samples behind."""
        try:
            async with closing(connect(self._settings.redis_url)) as redis:
                with translated("engines"):
                    for pattern in (keys.ENGINE_INFO_PATTERN, keys.SAMPLES_PATTERN):
                        async for key in redis.scan_iter(match=pattern, count=1000):
                            self._add(bytes(key).decode(errors="replace"))
            notify(f"STATUS=collecting from {len(self._engines)} engines")
        except TideError as exc:
            log.warning("engines cannot be looked up", error=str(exc))
            notify(f"STATUS=degraded: {exc}")

    async def _prune(self) -> None:
        try:
            gone = await anyio.to_thread.run_sync(self._store.prune)
        except Unavailable as exc:
            log.warning("samples cannot be pruned", error=str(exc))
            return
        for reason, discarded in gone.items():
            if discarded.shards:
                log.info("samples pruned", reason=reason.value, rows=discarded.rows, bytes=discarded.bytes)

    def _add(self, key: str) -> None:
        try:
            self._engines.add(check_name(key.partition("{")[2].partition("}")[0], "engine"))
        except Refused as exc:
            log.warning("key of no engine", error=str(exc))


async def serve(settings: CollectorSettings, store: SampleStore) -> None:
    """The process: READY when the store is ours, drains on SIGTERM and SIGINT."""
    stopping = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stop_on_signal, stopping)
        tasks.start_soon(_watchdog)
        log.info("collecting", redis=shown(settings.redis_url), root=str(store.root))
        notify("READY=1")
        await Collector(settings, store).run(stopping)
        notify("STOPPING=1")
        tasks.cancel_scope.cancel()


async def _stop_on_signal(stopping: anyio.Event) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            stopping.set()


async def _watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await anyio.sleep(interval_s)


def main(argv: Sequence[str] | None = None) -> None:
    """`tided-collector --config config.toml`. Exit status 2 for what a person must change, 1 for anything else."""
    parser = argparse.ArgumentParser(prog="tided-collector", description="Brings engines' samples from Redis to disk.")
    parser.add_argument("--config", type=Path, help="the configuration file; without it, the defaults")
    parser.add_argument(
        "--redis", metavar="URL", help="instead of the configured one; TIDED_REDIS_URL keeps it out of ps"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="where shards go, instead of STATE_DIR/samples")
    options = parser.parse_args(argv)
    failure: BaseException | None = None
    try:
        _run(options)
    except* (TideError, OSError) as group:
        failure = _first(group)
    if failure is not None:
        sys.stderr.write(f"tided-collector: {failure}\n")
        raise SystemExit(1 if isinstance(failure, Unavailable) else 2)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _run(options: argparse.Namespace) -> None:
    settings = config.load(options.config) if options.config else config.Config()
    _log_json(settings.daemon.log_level)
    samples = settings.samples
    limits = Limits(samples.shard_rows, samples.shard_age_s, hold_bytes=settings.capture.credit_bytes // 2)
    url = options.redis or os.environ.get("TIDED_REDIS_URL") or settings.redis_url
    connect(url)  # a URL that cannot be right is said now
    root = options.root or settings.samples_dir
    os.umask(0o077)
    store = SampleStore(root, samples.held_out_fraction, samples.max_bytes, samples.max_age_s)
    store.lock_writer()
    anyio.run(partial(serve, CollectorSettings(url, limits), store))


def _log_json(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    main()
