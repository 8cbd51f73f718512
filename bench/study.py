"""What the studies of shifting traffic share: prompts, the timeline beside the load, raw parts on disk, and stopping with a process."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import signal
import sys
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bench import report
from bench.control import Control, moment
from bench.traffic import DOMAINS, Prompt, Split
from tided.local import LocalStack
from tided.model.errors import TideError

T = TypeVar("T")
SAMPLE_EVERY_S = 2.0


def prompts_of(domain_name: str, split: Split, seed: int, skip: int, max_tokens: int) -> Iterator[Prompt]:
    """One domain's prompts of one split from the `skip`-th on, without end. `seed` orders those of "train" only."""
    domain = DOMAINS[domain_name]
    source = domain.endless(split, seed=seed) if split == "train" else itertools.cycle(domain.prompts(split))
    for prompt in itertools.islice(source, skip, None):
        yield replace(prompt, max_tokens=min(max_tokens, prompt.max_tokens))


def noting(source: Iterator[Prompt], into: list[Prompt]) -> Iterator[Prompt]:
    """`source`, and everything that was taken from it is in `into`."""
    for prompt in source:
        into.append(prompt)
        yield prompt


def digest_of(prompt: Prompt) -> str:
    """Names a prompt in raw parts, which hold no text."""
    return hashlib.sha256(f"{prompt.domain}\n{prompt.user}".encode()).hexdigest()[:20]


def plan_digest(plan: Mapping[str, Any]) -> str:
    """Identifies a plan, as plain data, in the parts that were run under it."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


@asynccontextmanager
async def timeline(control: Control, began_s: float) -> AsyncGenerator[list[dict[str, Any]]]:
    """While the body runs, the list gets a moment of tided's only engine every SAMPLE_EVERY_S."""
    moments = list[dict[str, Any]]()

    async def watch() -> None:
        while True:
            # A tided that is busy for a moment leaves a gap in the timeline and nothing else.
            with contextlib.suppress(TideError):
                moments.append({"at_s": round(time.monotonic() - began_s, 1), **moment(await control.engine())})
            await asyncio.sleep(SAMPLE_EVERY_S)

    watching = asyncio.create_task(watch())
    try:
        yield moments
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def unless_ended(stack: LocalStack, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result, or `TideError` when a process of the stack ends before it."""
    working, ended = asyncio.ensure_future(work), asyncio.create_task(stack.ended())
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise TideError(ended.result())
        return working.result()
    finally:
        for task in (working, ended):
            task.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


def run(study: Coroutine[Any, Any, T]) -> T:
    """A study to its end. What is wrong, or that it was stopped, ends the program with a line that says so.

    SIGTERM stops it as Ctrl-C does, also where a shell had SIGINT ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return asyncio.run(study)
    except TideError as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on with the parts that are missing")


@dataclass(frozen=True)
class Parts:
    """Raw figures under `directory`, one file for each part. One that was run under another `plan` digest does not count."""

    directory: Path
    plan: str

    def read(self, name: str) -> dict[str, Any] | None:
        """A part; None when it has not run under this plan."""
        try:
            part: dict[str, Any] = json.loads(self._file(name).read_text())
        except FileNotFoundError:
            return None
        return part if part["plan"] == self.plan else None

    def write(self, name: str, part: dict[str, Any]) -> None:
        """In one step, as soon as the part is done."""
        report.write_json(self._file(name), {"plan": self.plan, **part})

    def first(self, *names: str) -> list[dict[str, Any]]:
        """The parts that have run, in this order up to the first gap."""
        found = itertools.takewhile(lambda part: part is not None, map(self.read, names))
        return [part for part in found if part is not None]

    def begin_anew(self, *names: str) -> None:
        """Forgets these parts where all of them have run; else the missing ones go on."""
        if len(self.first(*names)) == len(names):
            for name in names:
                self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.directory / f"part-{name}.json"
