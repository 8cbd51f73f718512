"""The processor time of a stack's processes while a bench runs, each with all that it started."""

import asyncio
import itertools
import os
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tided.local import LocalStack

EVERY_S = 2.0
CLIENT = "client"
"""This process: the load generator."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Moment:
    """Seconds of processor time since each process began, by its service's name. `at_ms`: of the wall clock, as jobs have it."""

    at_ms: int
    cpu_s: dict[str, float]


def trees_cpu_s(roots: Iterable[int]) -> list[float]:
    """Processor seconds of each of these processes with all its descendants, those that have ended and were waited for among them."""
    own: dict[int, float] = {}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            text = (entry / "stat").read_text()
        except OSError:
            continue  # it has ended
        fields = text.rpartition(")")[2].split()  # from the state on: the name before it may hold anything
        children[int(fields[1])].append(int(entry.name))
        own[int(entry.name)] = sum(int(ticks) for ticks in fields[11:15]) / _TICKS

    def tree(pid: int) -> float:
        return own.get(pid, 0.0) + sum(tree(child) for child in children[pid])

    return [tree(root) for root in roots]


def moment(stack: LocalStack) -> Moment:
    """Of the stack's services and of this process alone."""
    names = list(stack.running)
    times = os.times()
    cpu_s = dict(zip(names, trees_cpu_s(stack.running[name].pid for name in names), strict=True))
    return Moment(round(time.time() * 1000), {CLIENT: times.user + times.system, **cpu_s})


@asynccontextmanager
async def usage(stack: LocalStack) -> AsyncGenerator[list[Moment]]:
    """While the body runs, the list gets a moment every EVERY_S, and one at its end."""
    moments = [moment(stack)]

    async def watch() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            moments.append(moment(stack))

    watching = asyncio.create_task(watch())
    try:
        yield moments
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        moments.append(moment(stack))


def shares(moments: Sequence[Moment]) -> dict[str, float]:
    """Of a core, what each service took from the first moment to the last."""
    first, last = moments[0], moments[-1]
    seconds = (last.at_ms - first.at_ms) / 1000
    return {name: (last.cpu_s[name] - first.cpu_s.get(name, 0.0)) / seconds for name in last.cpu_s}


def share_within(moments: Sequence[Moment], name: str, spans_ms: Sequence[tuple[int, int]]) -> float | None:
    """Of a core, what one service took in the steps between moments that lie wholly within one of the spans; None without any."""
    cpu_s = seconds = 0.0
    for before, after in itertools.pairwise(moments):
        if any(start <= before.at_ms and after.at_ms <= end for start, end in spans_ms):
            cpu_s += after.cpu_s[name] - before.cpu_s[name]
            seconds += (after.at_ms - before.at_ms) / 1000
    return cpu_s / seconds if seconds else None
