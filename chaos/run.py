"""One run: a stack under load, faults, quiet, convergence, and what the audit finds."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chaos import audit
from chaos.audit import Finding
from chaos.faults import Injector
from chaos.load import Load
from chaos.plan import DAEMONS, ENGINES, Fault, plan
from chaos.stack import CYCLE_S, LEASE_S, Stack, stack, valkey_url
from chaos.watch import Watch
from tided.model.deployments import DeploymentState
from tided.model.errors import TideError
from tided.model.jobs import JobState
from tided.model.status import Status
from tided.store.client import COMMAND_TIMEOUT_S

CLIENTS = 2
"""For each engine."""
SLACK_S = COMMAND_TIMEOUT_S + 15.0
"""A connection that went mute is given up after the first; a swap that was in flight may take its deadline."""
BOUND_S = LEASE_S + 2 * CYCLE_S + SLACK_S
PATIENCE_S = 180.0
"""After which a run that has not converged, or has not drained, is judged as it is."""
SETTLED = (None, DeploymentState.WATCHING, DeploymentState.LIVE, DeploymentState.ROLLED_BACK, DeploymentState.FAILED)


@dataclass
class Outcome:
    """What a run gave. `converged_s`: from the moment at which every fault was undone and every process ready; None: it did not."""

    seed: int
    seconds: float
    faults: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    findings: list[Finding] = field(default_factory=list[Finding])
    converged_s: float | None = None
    answered: int = 0
    failures: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        return bool(self.findings) and all(finding.ok for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        findings = [{**asdict(finding), "ok": finding.ok} for finding in self.findings]
        return {**asdict(self), "ok": self.ok, "bound_s": BOUND_S, "findings": findings}


class Chaos:
    """`faults` None: drawn from the seed."""

    def __init__(
        self,
        root: Path,
        seed: int,
        seconds: float,
        say: Callable[[str], None],
        faults: list[Fault] | None = None,
    ) -> None:
        self.outcome = Outcome(seed, seconds)
        self._root, self._say = root, say
        self._faults = faults if faults is not None else plan(seed, seconds, LEASE_S)
        self._load = Load()

    async def run(self) -> Outcome:
        """Start everything, do all of it, stop everything. Raises `Unavailable` when the stack does not even start."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix="tided-chaos-") as directory:
            sockets = Path(directory)
            self._say("starting Valkey, two tided, a collector, two workers and two engines")
            watch = Watch(valkey_url(sockets), self._root / "shared" / "samples", self._root / "kept")
            async with _beside(watch.run()), stack(self._root, sockets) as running:
                stops = await self._through(running, watch)
            self.outcome.findings += audit.ended(running, stops, audit.leftover(self._root, sockets))
        return self.outcome

    async def _through(self, running: Stack, watch: Watch) -> dict[str, tuple[int | None, float]]:
        outcome, load = self.outcome, self._load
        await load.learn(f"http://127.0.0.1:{running.ports[ENGINES[0]]}", outcome.seed)
        self._say(f"{len(load.expected)} answers are known; {len(self._faults)} faults follow, seed {outcome.seed}")
        injector = Injector(running, self._say)
        async with self._clients(running):
            await injector.run(self._faults)
            outcome.faults = injector.done
            self._say("quiet: every fault is undone")
            await running.all_up()
            started_s = time.monotonic()
            if await self._until(lambda: self._converged(running), "converged"):
                outcome.converged_s = time.monotonic() - started_s
            outcome.findings.append(converged_in_time(outcome.converged_s))
            load.enough.set()
        await self._until(lambda: self._drained(running), "drained")
        records = await audit.read(running)
        watch.link()
        outcome.findings += await audit.audit(running, load, watch, records)
        outcome.answered = load.answered
        outcome.failures = [f"{failure.engine}: {failure.error}" for failure in load.failures]
        self._say("stopping all")
        return await running.stop_all()

    @asynccontextmanager
    async def _clients(self, running: Stack) -> AsyncGenerator[None]:
        """Load until `enough` is set; leaving it waits for what was asked."""
        async with asyncio.TaskGroup() as group:
            clients = [
                group.create_task(self._load.client(engine, f"http://127.0.0.1:{running.ports[engine]}", number))
                for engine in ENGINES
                for number in range(CLIENTS)
            ]
            try:
                yield
            except BaseException:
                for client in clients:
                    client.cancel()
                raise

    async def _until(self, check: Callable[[], Awaitable[bool]], what: str) -> bool:
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(TideError):
                if await check():
                    self._say(what)
                    return True
            await asyncio.sleep(CYCLE_S)
        self._say(f"not {what} within {PATIENCE_S:.0f} s")
        return False

    async def _converged(self, running: Stack) -> bool:
        """One leads and sees every engine in order; nothing is under way that nobody drives."""
        statuses = [await asyncio.to_thread(running.client(daemon).status) for daemon in DAEMONS]
        leading = [status for status in statuses if status.leader]
        if len(leading) != 1 or any(status.redis != "connected" for status in statuses):
            return False
        return _in_order(leading[0])

    async def _drained(self, running: Stack) -> bool:
        """Twice, a while apart: what a tap still holds may come last."""
        if not await audit.drained(running):
            return False
        await asyncio.sleep(2.0)
        return await audit.drained(running)


def _in_order(status: Status) -> bool:
    if {engine.info.engine for engine in status.engines} != set(ENGINES) or len(status.workers) < 2:
        return False
    if any((engine.deployment and engine.deployment.state) not in SETTLED for engine in status.engines):
        return False
    return all(job.worker for job in status.active_jobs if job.state is JobState.RUNNING)


def converged_in_time(converged_s: float | None) -> Finding:
    """Promise 7."""
    measured = "never" if converged_s is None else f"{converged_s:.1f} s after the last fault, with every process up"
    late = converged_s is None or converged_s > BOUND_S
    return Finding(f"converges within {BOUND_S:.1f} s", "7", measured, ["too late"] if late else [])


@asynccontextmanager
async def _beside(work: Any) -> AsyncGenerator[None]:
    """Run `work` until the body ends; what it raises is raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
