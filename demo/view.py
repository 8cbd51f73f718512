"""What the demo shows while it runs: a live table in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.record import Happening, Record, accept_length, rates
from tided.ctl.words import job_progress
from tided.model.status import Status

PLAIN_EVERY_S = 10.0
EVENTS_SHOWN = 8


class View:
    """`note` for one-off lines, `happened` for tided's events, `show` with every new status."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._shown_s = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """The live table while this is open, where there is a terminal."""
        if not (self._console.is_terminal and sys.stdout.isatty()):
            yield
            return
        with Live(console=self._console, refresh_per_second=4) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def happened(self, seen: Happening) -> None:
        """An event, in plain output at once; the table shows the newest."""
        if self._live is None:
            self.note(f"  {seen.at_s:4.0f} s  {seen.message}")

    def show(self, status: Status, at_s: float) -> None:
        """The newest state."""
        if self._live is not None:
            self._live.update(self._table(status, at_s))
        elif time.monotonic() - self._shown_s >= PLAIN_EVERY_S:
            self._shown_s = time.monotonic()
            self.note(self._line(status, at_s))

    def _rows(self, status: Status) -> Iterator[tuple[str, str]]:
        record = self._record
        recent = record.recent(record.phase or None)
        speeds, length = rates(recent), accept_length(recent)
        if speeds is not None:
            yield (
                "one request",
                (
                    f"{speeds[0]:.1f} tokens/s as tided drafts, {speeds[1]:.1f} without speculation:"
                    f" {speeds[0] / speeds[1]:.2f}x"
                ),
            )
        if not status.engines:
            return
        engine = status.engines[0]
        rate = f"{engine.tokens_per_s:.0f} tokens/s in all" if engine.tokens_per_s is not None else "idle"
        yield "traffic", f"{rate}, {engine.running} requests running"
        gammas = engine.speculation.gammas
        if gammas:
            yield (
                "drafting",
                f"{gammas[0]} tokens at batch size 1, {gammas[-1]} at {len(gammas)}; {engine.speculation.reason}",
            )
        yield "acceptance", f"{length:.2f} tokens a step" if length is not None else "not drafting"
        yield "draft", engine.draft or "none"
        training = engine.training
        if training.short is not None and training.long is not None:
            yield (
                "drift",
                f"acceptance {training.short:.2f} short, {training.long:.2f} long; seen {training.drifts} times",
            )
        yield "training", f"{training.state}: {training.reason}"
        for job in status.active_jobs:
            yield "job", f"{job.spec.kind} {job_progress(job)}"
        for problem in status.problems:
            yield "PROBLEM", problem

    def _table(self, status: Status, at_s: float) -> Panel:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column()
        for label, text in self._rows(status):
            grid.add_row(label, Text(text))
        events = [
            Text(f"{seen.at_s:5.0f} s  {seen.message}", overflow="ellipsis", no_wrap=True)
            for seen in self._record.happenings[-EVENTS_SHOWN:]
        ]
        return Panel(Group(grid, Text(), *events), title=self._title(at_s), title_align="left")

    def _line(self, status: Status, at_s: float) -> str:
        rows = {"drafting": "", "job": "", **dict(self._rows(status))}
        parts = [rows.get(name, "") for name in ("one request", "acceptance", "draft", "training", "job")]
        drafting = rows["drafting"].split(";")[0]
        return f"{self._title(at_s)}: " + "; ".join(
            part for part in [parts[0], f"drafting {drafting}", *parts[1:]] if part
        )

    def _title(self, at_s: float) -> str:
        record = self._record
        name = record.phases[-1][0] if record.phases else "starting"
        return f"phase {record.phase} ({name}) {at_s:4.0f} s"
