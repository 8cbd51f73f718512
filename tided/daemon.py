"""tided: the composition root. The only module that knows all services; owns signals, start, reload and the orderly end.

    embedded Valkey -> collector (a process) -> leadership, controller, admin API, watchdog (tasks)

A root task that returns or raises ends the daemon, which systemd starts again. While Redis is away tided is degraded, says so in its
STATUS and its log, and tries again; engines serve on without it.
"""

import argparse
import fcntl
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import structlog

import tided
from tided import logs
from tided.api.server import serve
from tided.config import Config, check_plugins, load
from tided.model.errors import ConfigError, InvariantBroken, TideError
from tided.services.context import Context
from tided.services.controller import Controller
from tided.services.exchange import open_storage
from tided.services.leadership import Leadership
from tided.services.plane import ControlPlane
from tided.services.processes import keep_collector, keep_valkey
from tided.store.client import connect
from tided.store.engines import EngineStore
from tided.store.lease import LeaderLease
from tided.wire.notify import notify, watchdog_interval_s

LIVE_SECTIONS = frozenset({"self_test", "speculation", "training", "pool", "gate", "deployment"})
"""What SIGHUP can change; anything else needs a restart."""
STATUS_EVERY_S = 1.0

_log = structlog.get_logger()


class Daemon:
    """One run of tided. `config_file` None: the defaults, which SIGHUP cannot change."""

    def __init__(self, config: Config, config_file: Path | None) -> None:
        self._config_file = config_file
        redis = connect(config.redis_url)
        daemon = config.daemon
        engines = EngineStore(redis)
        lease = LeaderLease(redis, daemon.name, daemon.lease_ttl_s)
        self._context = Context.of(config, redis, Leadership(lease, engines, daemon.lease_ttl_s))
        self._controller = Controller(self._context)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises what ended it otherwise."""
        config = self._context.config
        async with anyio.create_task_group() as outer:
            if not config.redis.url.get_secret_value():
                await outer.start(keep_valkey, config)
            await self._serve(config)
            outer.cancel_scope.cancel()
        _log.info("tided-stopped")

    async def _serve(self, config: Config) -> None:
        """The tasks that end before Valkey does: they write their last words to it."""
        plane = ControlPlane(self._controller)
        async with anyio.create_task_group() as inner:
            inner.start_soon(self._heed_signals, inner.cancel_scope)
            if config.daemon.start_collector:
                inner.start_soon(_root, "collector", lambda: keep_collector(self._config_file))
            await inner.start(serve, plane, config)
            inner.start_soon(_root, "leadership", self._context.leadership.run)
            inner.start_soon(_root, "self-test", self._controller.selftest.run)
            inner.start_soon(_root, "controller", self._controller.run)
            inner.start_soon(_root, "exchange", self._context.exchange.run)
            inner.start_soon(_root, "launching", self._controller.launching.run)
            inner.start_soon(_root, "courier", self._context.courier.run)
            inner.start_soon(_root, "status", self._tell_systemd)
            _log.info("tided-started", pid=os.getpid(), socket=str(config.daemon.socket_path))
            notify(f"READY=1\nSTATUS={self._status()}")
        with anyio.CancelScope(shield=True):
            await self._context.redis.aclose()

    async def _heed_signals(self, scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number != signal.SIGHUP:
                    _log.info("stopping", signal=number.name)
                    notify("STOPPING=1\nSTATUS=stopping")
                    scope.cancel()
                    return
                await self._reload()

    async def _reload(self) -> None:
        """All or nothing: a file with one bad value, or one that changes what needs a restart, changes nothing."""
        notify("RELOADING=1")
        try:
            self._take(self._read_again())
            _log.info("config-reloaded", file=str(self._config_file))
        except ConfigError as exc:
            _log.error("config-not-reloaded", why=str(exc))
        notify("READY=1")

    def _read_again(self) -> Config:
        if self._config_file is None:
            raise ConfigError("tided was started without a configuration file: there is nothing to reload")
        config = load(self._config_file)
        check_plugins(config, str(self._config_file))
        return config

    def _take(self, config: Config) -> None:
        old = self._context.config
        changed = [name for name in Config.model_fields if getattr(old, name) != getattr(config, name)]
        fixed = [name for name in changed if name not in LIVE_SECTIONS]
        if fixed:
            raise ConfigError(f"{self._config_file}: [{'], ['.join(fixed)}] cannot change while tided runs: restart it")
        self._context.config = config

    async def _tell_systemd(self) -> None:
        """STATUS when it changes; WATCHDOG only when the control cycle went on since the last one."""
        interval_s = watchdog_interval_s()
        told, cycles, beat_s = "", -1, float("-inf")
        while True:
            status = self._status()
            if status != told:
                told = status
                notify(f"STATUS={status}")
            now_s = anyio.current_time()
            if interval_s is not None and now_s - beat_s >= interval_s and self._controller.cycles != cycles:
                cycles, beat_s = self._controller.cycles, now_s
                notify("WATCHDOG=1")
            await anyio.sleep(min(STATUS_EVERY_S, interval_s or STATUS_EVERY_S))

    def _status(self) -> str:
        leadership, controller = self._context.leadership, self._controller
        problem = controller.redis_problem or leadership.problem
        if problem:
            return f"degraded: {problem}"
        if not leadership.leads:
            return "standby: another tided leads"
        engines = len(controller.monitor.views)
        troubled = sum(bool(problem) for problem in controller.problems.values())
        return f"leading {engines} engine{'' if engines == 1 else 's'}" + (
            f", {troubled} with a problem" if troubled else ""
        )


async def _root(name: str, service: Callable[[], Awaitable[None]]) -> None:
    """A root service that returns is as broken as one that raises."""
    await service()
    raise InvariantBroken(f"the {name} service ended by itself")


def main(argv: Sequence[str] | None = None) -> None:
    """`tided --config config.toml`. Exit status 2 for what a person must change, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="tided", description="The control plane that keeps drafts aligned with traffic."
    )
    parser.add_argument("--config", type=Path, help="the configuration file; without it, the defaults")
    parser.add_argument(
        "--check", action="store_true", help="check the configuration, print it as it is in force, and end"
    )
    parser.add_argument("--version", action="version", version=f"tided {tided.__version__}")
    options = parser.parse_args(argv)
    try:
        config = load(options.config) if options.config else Config()
        check_plugins(config, str(options.config or "defaults"))
        open_storage(config.storage)
        if options.check:
            sys.stdout.write(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
            return
        logs.configure(config.daemon.log_level)
        os.umask(0o077)  # state is for this user alone; sockets get their mode from the configuration
        with _Exclusive(config.daemon.state_dir):
            anyio.run(Daemon(config, options.config).run)
    except ConfigError as exc:
        _fail(str(exc), 2)
    except TideError as exc:
        _fail(str(exc), 1)
    except BaseExceptionGroup as group:
        _end_of(group)


class _Exclusive:
    """One tided on a state directory: two would fight over the embedded Valkey and the socket."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "tided.lock"
        self._file = -1

    def __enter__(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"daemon.state_dir: {self._path.parent} is not writable: {exc.strerror}") from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._file)
            raise ConfigError(
                f"daemon.state_dir: another tided runs on {self._path.parent}; stop it, or give this one its own"
            ) from exc

    def __exit__(self, *failure: object) -> None:
        os.close(self._file)


def _end_of(group: BaseExceptionGroup[BaseException]) -> None:
    """One clear line for what we can name, a traceback for a bug."""
    named, other = group.split(TideError)
    if other is not None or named is None:
        _log.critical("tided-failed", exc_info=group)
        sys.exit(1)
    leaves = list(_leaves(named))
    _fail("\n".join(dict.fromkeys(map(str, leaves))), 2 if any(isinstance(leaf, ConfigError) for leaf in leaves) else 1)


def _leaves(group: BaseException) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for inner in group.exceptions for leaf in _leaves(inner)]
    return [group]


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
