"""What the worker reads from the trainer's stdout: one JSON object a line."""

import dataclasses
import json
import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

from tided.model.codec import to_plain
from tided.model.jobs import JobResult, Progress


class Reporter:
    """Writes the newest progress once a second from a thread of its own, so that a long step never looks like a dead trainer.

    Leaving the context ends the thread before the last line is written. `quiet`: one of several processes that says nothing.
    """

    def __init__(self, stream: TextIO | None = None, interval_s: float = 1.0, quiet: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._newest = Progress(0.0, "starting")
        self._at = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def update(self, progress: Progress) -> None:
        """Take the newest progress; it goes out with the next tick."""
        with self._lock:
            self._newest, self._at = progress, time.monotonic()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s) and not self._quiet:
            with self._lock:
                newest, age_s = self._newest, time.monotonic() - self._at
            if newest.eta_s >= 0:
                newest = dataclasses.replace(newest, eta_s=max(0.0, newest.eta_s - age_s))
            write_line(to_plain(newest), self._stream)


def write_result(result: JobResult, stream: TextIO | None = None) -> None:
    """The last line of a job that succeeded."""
    write_line({"result": to_plain(result)}, stream or sys.stdout)


def write_line(plain: Any, stream: TextIO) -> None:
    """One JSON object, one line, flushed."""
    stream.write(json.dumps(plain) + "\n")
    stream.flush()
