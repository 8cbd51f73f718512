"""tide-engine: the embedded engine as a process. Arguments, start, step thread, HTTP, orderly end."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import transformers
import uvicorn

from tided.config import Config, load
from tided.draft.eagle3 import Eagle3
from tided.draft.init import init_draft
from tided.engine.agent import EngineAgent
from tided.engine.embedded.api import Api
from tided.engine.embedded.control import EmbeddedControl, load_draft
from tided.engine.embedded.drafter import Drafter
from tided.engine.embedded.scheduler import Scheduler
from tided.engine.embedded.target import Target
from tided.engine.embedded.text import Tokens
from tided.engine.fetch import cache_dir
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.model.errors import Refused, TideError
from tided.model.ids import check_name, new_id
from tided.wire.notify import notify, watchdog_interval_s

log = logging.getLogger("tided.engine")

T = TypeVar("T")

DRAIN_S = 20.0
"""How long requests in flight may take to finish after SIGTERM."""
KEEP_ALIVE_S = 75
"""Connections without a request are kept so long. One that is closed while a request is on its way fails it, and a process that was
stopped for a moment finds all of them overdue as it goes on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the process starts with: arguments over the configuration file over defaults."""

    model: Path
    draft: Path | None  # None: version 0, made from the target
    draft_vocab: int  # of that version 0
    engine_id: str
    host: str
    port: int
    redis: str
    dtype: str
    device: str
    threads: int
    max_batch: int
    max_context: int
    gamma_max: int
    gammas: tuple[int, ...]
    capture_last: bool
    ring_slots: int
    report_interval_s: float
    profile: bool
    admin: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Run until SIGTERM or SIGINT. Exit codes: 0 ended in order, 1 the step loop failed, 2 it could not start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        settings = parse(sys.argv[1:] if argv is None else argv)
        with _listen(settings.host, settings.port) as listener:
            engine = Engine(settings, listener)
            code = asyncio.run(engine.serve())
    except TideError as exc:
        sys.stderr.write(f"tide-engine: {' '.join(str(exc).split())}\n")
        sys.exit(2)
    sys.exit(code)


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line, and the configuration file that it names. Raises `ConfigError` or `Refused`."""
    parser = argparse.ArgumentParser("tide-engine", description="The embedded reference engine of tided.")
    parser.add_argument("--config", type=Path, help="configuration file; arguments override it")
    parser.add_argument("--model", type=Path, help="checkpoint directory of a Llama-architecture target")
    parser.add_argument("--draft", type=Path, help="checkpoint directory of an EAGLE-3 draft; default: version 0")
    parser.add_argument("--engine-id", help="name of this engine in Redis")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, help="0: any free one")
    parser.add_argument(
        "--redis", metavar="URL", help="where tided is reached; without and without --config: not connected"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--gamma-max", type=int)
    parser.add_argument("--gammas", default="0", help="drafted tokens at batch size 1, 2, ...; e.g. 3,3,1,0")
    parser.add_argument(
        "--capture-last", action=argparse.BooleanOptionalAction, help="samples carry the last hidden state"
    )
    parser.add_argument(
        "--profile", action=argparse.BooleanOptionalAction, default=True, help="measure latency at start"
    )
    parser.add_argument("--admin", action="store_true", help="serve /admin/* even when connected to Redis")
    args = parser.parse_args(argv)
    config = load(args.config) if args.config is not None else Config()
    engine = config.engine
    if args.redis and urlsplit(args.redis).scheme not in ("redis", "rediss", "unix"):
        raise Refused("--redis must be a redis://, rediss:// or unix:// URL")
    redis = args.redis or (config.redis_url if args.config is not None else "")
    settings = Settings(
        model=args.model or config.engine_target.path,
        draft=args.draft,
        draft_vocab=config.training.draft_vocab,
        engine_id=check_name(_or(args.engine_id, engine.id), "--engine-id"),
        host=_or(args.host, engine.host),
        port=_or(args.port, engine.port),
        redis=redis,
        dtype=_or(args.dtype, engine.dtype),
        device=_or(args.device, engine.device),
        threads=_or(args.threads, engine.threads),
        max_batch=_or(args.max_batch, engine.max_batch),
        max_context=_or(args.max_context, engine.max_context),
        gamma_max=_or(args.gamma_max, engine.gamma_max),
        gammas=_gammas(args.gammas),
        capture_last=_or(args.capture_last, config.capture.last_hidden),
        ring_slots=config.capture.ring_slots,
        report_interval_s=engine.report_interval_s,
        profile=args.profile,
        admin=args.admin or not redis,
    )
    least = {"threads": 1, "max_batch": 1, "max_context": 32, "gamma_max": 0, "port": 0}
    for name, lowest in least.items():
        if getattr(settings, name) < lowest:
            raise Refused(f"--{name.replace('_', '-')} must be at least {lowest}, got {getattr(settings, name)}")
    return settings


class Engine:
    """The parts of a running engine, put together. `serve` runs them to their end."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        """Load target and draft. Raises `TideError` with one clear line when that is not possible."""
        torch.set_num_threads(settings.threads)
        self._settings, self._listener = settings, listener
        if not (settings.model / "config.json").is_file():
            raise Refused(f"target {settings.model} is not a checkpoint directory: it has no config.json")
        dtype = getattr(torch, settings.dtype)
        target = Target(
            settings.model,
            dtype=dtype,
            device=settings.device,
            max_batch=settings.max_batch,
            max_context=settings.max_context,
            gamma_max=settings.gamma_max,
        )
        drafter = Drafter(_first_draft(settings, target), target)
        incarnation = new_id("run")
        self._tap: Tap | None = None
        if settings.redis:
            states = len(target.info.aux_layers) + int(settings.capture_last)
            self._tap = Tap(
                TapSettings(
                    engine=settings.engine_id,
                    incarnation=incarnation,
                    target=target.info.digest,
                    states=states,
                    hidden=target.hidden,
                    dtype=settings.dtype,
                    has_last=settings.capture_last,
                    ring_slots=settings.ring_slots,
                ),
                pinned=target.device.type != "cpu",
            )
        self._scheduler = Scheduler(
            target, drafter, self._tap, gammas=settings.gammas, last_hidden=settings.capture_last
        )
        self.url = f"http://{settings.host}:{listener.getsockname()[1]}"
        self._control = EmbeddedControl(
            self._scheduler,
            engine=settings.engine_id,
            incarnation=incarnation,
            url=self.url,
            taps=self._tap is not None,
            last_hidden=settings.capture_last,
        )
        self._publisher: Publisher | None = None
        self._agent: EngineAgent | None = None
        if self._tap is not None:
            self._publisher = Publisher(settings.redis, self._tap)
            self._agent = EngineAgent(
                settings.redis,
                settings.engine_id,
                incarnation,
                self._control,
                self._tap,
                report_interval_s=settings.report_interval_s,
                drafts_dir=cache_dir(settings.engine_id),
            )
        api = Api(self._scheduler, self._control, Tokens(settings.model), admin=settings.admin)
        self._server = _Server(
            uvicorn.Config(
                api.app,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(DRAIN_S),
            )
        )
        self._failed = False
        self._steps = threading.Thread(target=self._step_loop, name="tide-steps", daemon=True)

    async def serve(self) -> int:
        """Serve until told to stop; give the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        self._steps.start()
        if self._settings.profile:
            await asyncio.to_thread(self._control.measure_profile)
        for part in (self._publisher, self._agent):
            if part is not None:
                part.start()
        watchdog = asyncio.create_task(self._watchdog())
        # Whoever hears READY may connect at once: the kernel queues until uvicorn accepts.
        self._listener.listen(self._server.config.backlog)
        log.info("ready on %s", self.url)
        notify(f"READY=1\nSTATUS=serving on {self.url}")
        await self._server.serve(sockets=[self._listener])
        notify("STOPPING=1")
        watchdog.cancel()
        await asyncio.to_thread(self._close)
        return 1 if self._failed else 0

    def _stop(self) -> None:
        self._server.should_exit = True

    def _step_loop(self) -> None:
        try:
            self._scheduler.run()
        except Exception:
            log.exception("the step loop failed; requests in flight are aborted and the engine ends")
            self._failed = True
            self._scheduler.close()
            self._scheduler.abort_all()
            self._stop()

    async def _watchdog(self) -> None:
        """Tell systemd that we live as long as steps are made, or none is due."""
        interval_s = watchdog_interval_s()
        seen = -1
        while interval_s is not None:
            scheduler = self._scheduler
            idle = not (scheduler.running or scheduler.waiting)
            if self._steps.is_alive() and (idle or scheduler.totals.steps != seen):
                notify("WATCHDOG=1")
            seen = scheduler.totals.steps
            await asyncio.sleep(interval_s)

    def _close(self) -> None:
        """Let the steps drain, send what the tap holds, take the heartbeat away."""
        self._scheduler.close()
        self._steps.join(DRAIN_S)
        if self._publisher is not None:
            self._publisher.close()
        if self._agent is not None:
            self._agent.close()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before the tap is flushed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _first_draft(settings: Settings, target: Target) -> Eagle3:
    """The draft to begin with: the given one, or version 0, which follows from the target alone."""
    if settings.draft is not None:
        return load_draft(settings.draft, target)
    with tempfile.TemporaryDirectory(prefix="tide-engine-") as directory:
        init_draft(settings.model, Path(directory), settings.draft_vocab)
        return load_draft(Path(directory), target)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise Refused(f"cannot listen on {host}:{port}: {exc.strerror}; check --host") from exc
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise Refused(f"cannot listen on {host}:{port}: {exc.strerror}; choose another --port") from exc
    return listener


def _gammas(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise Refused(f"--gammas must be whole numbers separated by commas, got {text!r}") from exc


def _or(value: Any, default: T) -> T:
    return default if value is None else value


if __name__ == "__main__":
    main()
