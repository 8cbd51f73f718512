"""The agent: what makes an engine reachable for tided. Threads beside the engine, which they never disturb.

One thread writes the heartbeat and the observations and reads commands; another applies them, one at a time, so that a swap
of seconds does not silence the heartbeat; a third fetches drafts that tided sends over Redis, so that no schedule has to wait for
them. When Redis is gone the engine serves on with what it has; the agent comes back by
itself. Every failure is counted; the first of a row is logged.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from redis.exceptions import RedisError

from tided.engine.fetch import Fetcher
from tided.engine.link import Backoff, connect
from tided.model.engines import Capability, EngineInfo, Observation, RequestStats, StepCounts, TapTotals
from tided.model.errors import Refused, TideError
from tided.wire import keys
from tided.wire.control import Body, Command, Deliver, Reply, SetCapture, Swap, decode_command, encode

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
HEARTBEAT_TTL_S = 10
QUIET_REPORT_S = 5.0
STREAM_TTL_S = 3600
REPLIES_KEPT = 1000
OBSERVATIONS_KEPT = 7200
_COMMANDS_REMEMBERED = 1024
_READ_COUNT = 16


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine counted since it was last asked, and how busy it is now. `version`: the draft that serves now."""

    steps: tuple[StepCounts, ...]
    requests: tuple[RequestStats, ...]
    running: int
    waiting: int
    version: str


class EngineControl(Protocol):
    """What an engine implements. The agent calls these from its own threads; they must not wait for a whole request."""

    def info(self) -> EngineInfo:
        """The heartbeat. The agent fills in `epoch` and `capturing`."""
        ...

    def apply(self, body: Body) -> dict[str, Any]:
        """Do what the command says and give the reply's data, once it is in force. Raises `TideError`; may take seconds."""
        ...

    def observe(self) -> Counters:
        """The counters since the previous call."""
        ...


class TapControl(Protocol):
    """What the agent needs of a tap, which may be in another process."""

    @property
    def capturing(self) -> bool: ...

    def set_capture(self, on: bool, credit_bytes: int) -> None: ...

    def totals(self) -> TapTotals: ...


@dataclass(frozen=True, slots=True)
class _Work:
    """A command to apply. Of a `deliver`: where the draft is, or why it is not here."""

    command: Command
    fetched: Path | TideError | None = None


class EngineAgent:
    """Connects one engine incarnation to tided. `start()` returns at once, whether or not Redis is there.

    `drafts_dir`: where drafts are kept that are sent over Redis; None: the engine takes them from a filesystem that it shares with tided.
    """

    def __init__(
        self,
        redis_url: str,
        engine: str,
        incarnation: str,
        control: EngineControl,
        tap: TapControl,
        *,
        report_interval_s: float = 0.5,
        drafts_dir: Path | None = None,
    ) -> None:
        self.errors = 0
        self._engine, self._incarnation = engine, incarnation
        self._control, self._tap = control, tap
        self._report_interval_s = report_interval_s
        self._client = connect(redis_url)
        self._reader = connect(redis_url, block_s=1.0)
        self._epoch = 0
        self._cursor: str | None = None
        self._done: OrderedDict[str, Reply | None] = OrderedDict()  # None: being applied
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._fetcher = Fetcher(self._client, engine, drafts_dir) if drafts_dir is not None else None
        self._fetches: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._newest_swap = ""
        self._report_seq = 0
        self._report_due_s = 0.0
        self._reported = (TapTotals(), 0, 0, "")
        self._heartbeat_lock = threading.Lock()
        self._stopping = threading.Event()
        self._failing = False
        self._threads = [
            threading.Thread(target=self._guard, args=(self._talk,), name="tided-agent", daemon=True),
            threading.Thread(target=self._guard, args=(self._work,), name="tided-agent-apply", daemon=True),
        ]
        if self._fetcher is not None:
            self._threads.append(
                threading.Thread(target=self._guard, args=(self._fetch,), name="tided-agent-fetch", daemon=True)
            )

    @property
    def epoch(self) -> int:
        """The highest leader's epoch seen."""
        return self._epoch

    def declared(self, capabilities: tuple[Capability, ...]) -> tuple[Capability, ...]:
        """What the engine can do, and what the agent can do for it."""
        fetches = self._fetcher is not None and Capability.SWAP in capabilities
        return (*capabilities, Capability.FETCH) if fetches else capabilities

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self, deadline_s: float = 3.0) -> None:
        """Stop: send what was counted last, and take the heartbeat away so that tided need not wait for its TTL."""
        self._stopping.set()
        self._queue.put(None)
        self._fetches.put(None)
        end = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))
        try:
            self._client.delete(keys.info(self._engine))
        except (RedisError, OSError) as exc:
            self._count(exc)
        self._client.close()
        self._reader.close()

    def _guard(self, body: Any) -> None:
        """Run `body` again and again: whatever fails in it is counted, and retried with backoff."""
        backoff = Backoff()
        while not self._stopping.is_set():
            try:
                body()
                self._failing = False
                backoff.reset()
            except Exception as exc:  # noqa: BLE001 - the one guard of the agent's threads: they must outlive whatever happens
                self._count(exc)
                self._stopping.wait(backoff.next_s())

    def _count(self, exc: Exception) -> None:
        self.errors += 1
        if not self._failing:
            log.warning("agent: %s; retrying, serving goes on", type(exc).__name__)
        self._failing = True

    # --- heartbeat, observations, reading commands ---

    def _talk(self) -> None:
        """One connection's life: until something fails or the agent closes, which sends what was counted last."""
        if self._cursor is None:
            # Before the first heartbeat, so that no command that follows it can be missed.
            newest = cast("list[Any]", self._client.xrevrange(keys.commands(self._engine), count=1))
            # A leader that was superseded while this engine was away is as superseded now.
            self._epoch = max((_epoch_of(fields) for _, fields in newest), default=0)
            self._cursor = newest[0][0].decode() if newest else "0-0"
        heartbeat_s = report_s = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= heartbeat_s:
                self._heartbeat()
                heartbeat_s = now + HEARTBEAT_S
            if now >= report_s:
                self._report()
                report_s = now + self._report_interval_s
            self._failing = False
            self._read(max(min(heartbeat_s, report_s) - time.monotonic(), 0.001))
        self._report()

    def _heartbeat(self) -> None:
        with self._heartbeat_lock:  # or an older state could be written over a newer one
            info = dataclasses.replace(self._control.info(), epoch=self._epoch, capturing=self._tap.capturing)
            info = dataclasses.replace(info, capabilities=self.declared(info.capabilities))
            self._client.set(keys.info(self._engine), encode(info), ex=HEARTBEAT_TTL_S)

    def _report(self) -> None:
        """Send what was counted since the last report, if anything was, and every few seconds anyway.

        A report that Redis did not confirm is lost: it must not be sent twice, and must not pile up.
        """
        counters, tap = self._control.observe(), self._tap.totals()
        state = (tap, counters.running, counters.waiting, counters.version)
        quiet = not counters.steps and not counters.requests and state == self._reported
        if quiet and time.monotonic() < self._report_due_s:
            return
        self._reported = state
        self._report_due_s = time.monotonic() + QUIET_REPORT_S
        self._report_seq += 1
        observation = Observation(
            engine=self._engine,
            incarnation=self._incarnation,
            seq=self._report_seq,
            at_ms=self._time_ms(),
            version=counters.version,
            running=counters.running,
            waiting=counters.waiting,
            steps=counters.steps,
            requests=counters.requests,
            tap=tap,
        )
        self._append(keys.observations(self._engine), encode(observation), OBSERVATIONS_KEPT)

    def _read(self, block_s: float) -> None:
        stream = keys.commands(self._engine)
        found = self._reader.xread(
            {stream: self._cursor or "0-0"}, count=_READ_COUNT, block=max(int(block_s * 1000), 1)
        )
        for _, entries in cast("list[Any]", found or []):
            for entry, fields in entries:
                self._cursor = entry.decode()
                try:
                    self._take(decode_command(fields.get(b"m", b"")))
                except Refused as exc:
                    self._count(exc)

    def _take(self, command: Command) -> None:
        if isinstance(command.body, Swap | Deliver):
            self._newest_swap = command.id
        if isinstance(command.body, Deliver) and self._fetcher is not None:
            self._fetches.put(command)
        else:
            self._queue.put(_Work(command))

    # --- fetching drafts ---

    def _fetch(self) -> None:
        """Bring a draft here, for a command that is applied thereafter, in its turn."""
        command = self._fetches.get()
        if command is None or self._fetcher is None or not isinstance(command.body, Deliver):
            return
        try:
            self._check_epoch(command)
            wanted = lambda: self._newest_swap == command.id and not self._stopping.is_set()  # noqa: E731
            found: Path | TideError = self._fetcher.fetch(command, command.body, self._left_s(command), wanted)
        except TideError as exc:
            found = exc
        self._queue.put(_Work(command, found))

    # --- applying commands ---

    def _work(self) -> None:
        work = self._queue.get()
        if work is None:
            return
        command = work.command
        if command.id in self._done:
            earlier = self._done[command.id]
            if earlier is not None:
                self._reply(earlier)
            return
        self._done[command.id] = None
        if len(self._done) > _COMMANDS_REMEMBERED:
            self._done.popitem(last=False)
        ok, error, data = self._attempt(work)
        reply = Reply(command.id, self._epoch, ok, error, data)
        self._done[command.id] = reply
        try:
            # First, so that whoever reads the reply finds a heartbeat that agrees with it.
            self._heartbeat()
        finally:
            self._reply(reply)

    def _attempt(self, work: _Work) -> tuple[bool, str, dict[str, Any]]:
        command = work.command
        try:
            self._check_epoch(command)
            self._epoch = command.epoch
            if isinstance(work.fetched, TideError):
                raise work.fetched
            self._left_s(command)
            match command.body:
                case SetCapture(on, credit_bytes):
                    self._tap.set_capture(on, credit_bytes)
                    return True, "", {}
                case Deliver(version):
                    return True, "", self._control.apply(Swap(version, str(_found(work))))
                case body:
                    return True, "", self._control.apply(body)
        except TideError as exc:
            return False, str(exc), {}
        except Exception as exc:  # noqa: BLE001 - an engine's fault in a command is the command's answer, not the agent's end
            self._count(exc)
            return False, f"the engine failed: {type(exc).__name__}", {}

    def _check_epoch(self, command: Command) -> None:
        if command.epoch < self._epoch:
            raise Refused(f"epoch {command.epoch} is over: this engine has seen epoch {self._epoch}")

    def _left_s(self, command: Command) -> float:
        """How long the command may still be obeyed."""
        left_ms = command.expires_ms - self._time_ms()
        if left_ms < 0:
            raise Refused("the command expired before it was read")
        return left_ms / 1000

    def _reply(self, reply: Reply) -> None:
        self._append(keys.replies(self._engine), encode(reply), REPLIES_KEPT)

    def _time_ms(self) -> int:
        seconds, micros = self._client.time()
        return seconds * 1000 + micros // 1000

    def _append(self, stream: str, message: bytes, kept: int) -> None:
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xadd(stream, {"m": message}, maxlen=kept, approximate=True)
        pipeline.expire(stream, STREAM_TTL_S)
        pipeline.execute()


def _epoch_of(fields: dict[bytes, bytes]) -> int:
    """Of a stored command; 0 when it cannot be read."""
    try:
        return decode_command(fields.get(b"m", b"")).epoch
    except Refused:
        return 0


def _found(work: _Work) -> Path:
    if not isinstance(work.fetched, Path):
        raise Refused("this engine fetches no drafts: it takes them from a filesystem that it shares with tided")
    return work.fetched
