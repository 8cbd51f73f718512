"""The demo itself: a stack, two phases of traffic, and turns with drafting off on the same engine in between."""

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from bench.configs import free_port, write_config
from bench.control import Control, moment
from bench.load import NO_CAPTURE, NO_DRAFT, Traffic, ask, client
from bench.traffic import DOMAINS, Prompt, Split
from demo.record import Happening, Record, Turn
from demo.view import View
from tided.config import Config
from tided.local import LocalStack, services
from tided.model.errors import TideError, Unavailable

WATCH_EVERY_S = 1.0
HIDDEN = ("audit",)

NAMES = {"code": "Python coding", "french": "French customer service", "maths": "word problems", "json": "extraction"}


@dataclass(frozen=True)
class Plan:
    """Sizes. A phase ends `turns_after` turns after the swap that it waits for, and in any case `ends_s` after the traffic began."""

    model: Path
    directory: Path
    domains: tuple[str, str] = ("code", "french")
    ends_s: tuple[float, float] = (310.0, 585.0)
    adapt_s: float = 24.0
    turns: int = 2
    turns_after: int = 6
    concurrency: int = 8
    max_tokens: int = 80
    turn_tokens: int = 48
    changes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            # A demonstration has minutes, not hours: less is collected, more of it is held out, and a training is short.
            "training": {"min_rows": 6000, "budget_s": 70.0, "cool_down_s": 5.0, "short_window": 24},
            "samples": {"held_out_fraction": 0.35, "shard_age_s": 4.0, "shard_rows": 2048},
            "gate": {"min_requests": 20, "min_tokens": 1200},
            "speculation": {"probe_every_s": 10.0},
        }
    )
    ends_early: bool = True


class Demo:
    """One run. `record` holds what was seen, also when the run is cut short."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.record = Record()
        self.view = View(self.record)
        self._began_s = 0.0
        self._began_ms = 0

    @property
    def _at_s(self) -> float:
        return time.monotonic() - self._began_s

    async def run(self) -> None:
        """Everything from starting the processes to stopping them.

        Raises:
            TideError: what is wrong and what to do.
        """
        plan = self.plan
        shutil.rmtree(plan.directory / "state", ignore_errors=True)
        config_file = plan.directory / "config.toml"
        config = write_config(config_file, self._changes())
        async with LocalStack(plan.directory / "logs", self.view.note) as stack:
            for service in services(config_file, config):
                await stack.start(service)
            control = Control(config.daemon.socket_path)
            try:
                await control.has_draft()
            except TimeoutError as exc:
                raise Unavailable(
                    f"tided did not bring its engine onto a first draft; see {plan.directory}/logs"
                ) from exc
            ended = asyncio.create_task(stack.ended())
            working = asyncio.create_task(self._phases(control, config))
            try:
                await asyncio.wait((ended, working), return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    raise Unavailable(ended.result())
                working.result()
            finally:
                for task in (ended, working):
                    task.cancel()
                await asyncio.gather(ended, working, return_exceptions=True)

    def _changes(self) -> dict[str, dict[str, Any]]:
        plan = self.plan
        changes: dict[str, dict[str, Any]] = {
            "daemon": {"state_dir": str(plan.directory / "state")},
            "target": {"path": str(plan.model)},
            "engine": {"port": free_port(), "max_batch": plan.concurrency},
        }
        for section, values in plan.changes.items():
            changes[section] = {**changes.get(section, {}), **values}
        return changes

    async def _phases(self, control: Control, config: Config) -> None:
        url = f"http://{config.engine.host}:{config.engine.port}"
        newest = await control.events("")
        cursor = newest[-1].id if newest else ""
        self._began_s, self._began_ms = time.monotonic(), round(time.time() * 1000)
        with self.view.running():
            watching = asyncio.create_task(self._watch(control, cursor))
            try:
                train = [_prompts(domain, "train", self.plan.max_tokens) for domain in self.plan.domains]
                async with Traffic(url, train[0], self.plan.concurrency) as traffic:
                    for index, domain in enumerate(self.plan.domains):
                        self.record.phases.append((NAMES[domain], self._at_s))
                        self.view.note(f"phase {self.record.phase}: {NAMES[domain]}")
                        traffic.prompts = train[index]
                        await self._phase(index, domain, traffic, url, control)
                    self.record.errors += traffic.load.errors
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _phase(self, index: int, domain: str, traffic: Traffic, url: str, control: Control) -> None:
        plan = self.plan
        measure = _prompts(domain, "measure", plan.turn_tokens)
        after = 0
        while True:  # at least one round, however slow the machine is
            traffic.resume()
            await asyncio.sleep(plan.adapt_s)
            await traffic.pause()
            for prompt in itertools.islice(measure, plan.turns):
                await self._turn(prompt, url, control)
                after += int(self.record.adapted(index + 1) is not None)
            if self._at_s >= plan.ends_s[index] or (plan.ends_early and after >= plan.turns_after):
                return

    async def _turn(self, prompt: Prompt, url: str, control: Control) -> None:
        """The prompt twice, alone on the engine: as tided drafts, and with drafting off; the order alternates."""
        headers = (NO_CAPTURE, {**NO_CAPTURE, **NO_DRAFT})
        order = (0, 1) if len(self.record.turns) % 2 == 0 else (1, 0)
        draft = (await control.engine()).draft
        async with client(url) as http:
            answers = {which: await ask(http, prompt, headers=headers[which]) for which in order}
        self.record.errors += sum(bool(answer.error) for answer in answers.values())
        if answers[0].error or answers[1].error:
            return
        speeds = answers[0].tokens_per_s, answers[1].tokens_per_s
        self.record.turns.append(Turn(self._at_s, self.record.phase, draft, *speeds, answers[0].accept_length))

    async def _watch(self, control: Control, cursor: str) -> None:
        while True:
            # A tided that does not answer for a moment costs a line of the view, not the demo.
            with contextlib.suppress(TideError, httpx.HTTPError):
                for event in await control.events(cursor):
                    cursor = event.id
                    if event.kind not in HIDDEN:
                        at_s = (event.at_ms - self._began_ms) / 1000
                        seen = Happening(at_s, self.record.phase, event.kind, f"{event.kind}: {event.message}")
                        self.record.happenings.append(seen)
                        self.view.happened(seen)
                status = await control.status()
                if status.engines:
                    self.record.timeline.append({"at_s": round(self._at_s, 1), **moment(status.engines[0])})
                self.view.show(status, self._at_s)
            await asyncio.sleep(WATCH_EVERY_S)


def _prompts(domain: str, split: Split, max_tokens: int) -> Iterator[Prompt]:
    for prompt in DOMAINS[domain].endless(split):
        yield replace(prompt, max_tokens=min(max_tokens, prompt.max_tokens))
