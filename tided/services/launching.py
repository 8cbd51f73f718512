"""Workers from a scheduler that owns the devices: `tided.machine.launching` with its IO.

The leader looks at what waits, who is registered and what the scheduler runs, and closes the gap. It is a task of its own: a scheduler
that is away, slow or wrong keeps nothing else from going on, and ordinary workers take jobs as ever. Without a `launcher.kind` it does
nothing.
"""

import shlex

import anyio
import structlog

from tided.config import LauncherConfig
from tided.launchers.base import Launcher
from tided.launchers.registry import launcher_for
from tided.machine import launching as machine
from tided.machine.launching import Cancel, Forget, LaunchAction, Launches, Rules, Seen, Submit, Tell
from tided.machine.placement import Capacity, Offer, Waiting
from tided.model import failpoints
from tided.model.errors import Refused, Superseded, TideError
from tided.model.jobs import JobKind, JobState, WorkerMark
from tided.model.launch import Launch
from tided.model.status import LauncherStatus, LaunchStatus
from tided.services.context import Context

LOOK_S = 2.0
MOST_WAITING = 200
"""Of the queued jobs, so many of the newest are looked at: far more than there can be launched workers."""

_log = structlog.get_logger()


class Launching:
    """`status` is what it saw last; None without a launcher, or in standby."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._config = context.config.launcher  # it cannot change while tided runs
        self._rules = rules_of(self._config)
        self._launcher: Launcher | None = None
        self._state = Launches()
        self.status: LauncherStatus | None = None

    async def run(self) -> None:
        """For ever, while this tided leads."""
        if not self._config.kind:
            await anyio.sleep_forever()
        try:
            while True:
                if self._context.leadership.leads:
                    await self._guarded()
                else:
                    self._state, self.status = Launches(), None
                await anyio.sleep(LOOK_S)
        finally:
            if self._launcher is not None:
                with anyio.move_on_after(2, shield=True):
                    await self._launcher.aclose()

    async def look(self) -> None:
        """Once. Raises `Unavailable` and `Refused`, from Redis or from the scheduler; `Superseded`."""
        self._launcher = self._launcher or launcher_for(self._config)
        launches = await self._launcher.states()
        seen = await self._seen(launches)
        self._state, actions = machine.step(self._state, seen, self._rules)
        for action in actions:
            await self._do(self._launcher, action, seen.now_ms)
        self._note(self._problem(seen), launches)

    async def _guarded(self) -> None:
        try:
            await self.look()
        except Superseded as exc:
            await self._step_down(exc)
        except TideError as exc:
            why = f"{exc}; jobs wait for a worker that registers by itself"
            self._note(why, None)

    async def _step_down(self, reason: Superseded) -> None:
        try:
            await self._context.leadership.step_down(reason)
        except TideError as exc:
            _log.warning("lease-not-released", why=str(exc))

    async def _seen(self, launches: dict[str, Launch]) -> Seen:
        context = self._context
        jobs = await context.jobs.list(MOST_WAITING, (JobState.QUEUED,))
        waiting = tuple(
            Waiting(job.id, job.spec.kind, job.spec.needs, job.spec.priority, job.not_before_ms) for job in jobs
        )
        workers, _ = await context.workers.registry()
        slots = (machine.worker_name(self._rules.name, slot) for slot in range(1, self._rules.most + 1))
        marked = [name for name in slots if await context.workers.marked(name) is not WorkerMark.NONE]
        return Seen(await context.now_ms(), waiting, tuple(workers), launches, frozenset(marked))

    async def _do(self, launcher: Launcher, action: LaunchAction, now_ms: int) -> None:
        context = self._context
        context.leadership.require()
        match action:
            case Submit(launch_id, worker):
                failpoints.hit("launching.submitting")
                try:
                    await launcher.submit(launch_id, command(self._config, worker))
                except Refused as exc:
                    self._state = machine.refused(self._state, now_ms, str(exc))
                    await context.announce("launch-failed", launch_id, str(exc))
                    return
                await context.announce("worker-launched", worker, f"asked of {self._config.kind} as {launch_id}")
            case Cancel(launch_id):
                await launcher.cancel(launch_id)
                await context.announce("launch-withdrawn", launch_id, "nothing waits for it any more")
            case Forget(launch_id):
                await launcher.forget(launch_id)
            case Tell(launch_id, reason):
                await context.announce("launch-failed", launch_id, reason)

    def _problem(self, seen: Seen) -> str:
        """What people should know, while a job suffers from it."""
        if self._state.failures and machine.waits(seen, self._rules):
            return f"the newest launch failed ({self._state.failures} in a row): {self._state.reason}"
        stuck = machine.unfit(seen, self._rules)
        if stuck:
            return f"job {stuck[0].id} needs more than [launcher] says that a launched worker has, and than any that is registered"
        return ""

    def _note(self, problem: str, launches: dict[str, Launch] | None) -> None:
        """`launches` None: not known now; what was seen last is not shown as if it were."""
        shown = tuple(
            LaunchStatus(key, launch.state, "withdrawn" if key in self._state.withdrawn else launch.message)
            for key, launch in machine.live(self._rules.name, launches or {}).items()
        )
        if problem and (self.status is None or self.status.problem != problem):
            _log.warning("launcher-problem", why=problem)
        self.status = LauncherStatus(self._config.kind, problem, shown)


def rules_of(config: LauncherConfig) -> Rules:
    has = Capacity(config.device, config.devices, config.memory_bytes)
    return Rules(config.name, config.max_workers, round(config.after_s * 1000), Offer(tuple(JobKind), has))


def command(config: LauncherConfig, worker: str) -> str:
    """What the scheduler runs, for a shell: the site's own command, and what makes it a worker of that slot that does one job."""
    flags = ["--name", worker, "--kinds", ",".join(JobKind), "--jobs", "1", "--idle-s", f"{config.idle_s:g}"]
    flags += ["--device", config.device, "--devices", str(config.devices)]
    if config.memory_bytes:
        flags += ["--memory-bytes", str(config.memory_bytes)]
    return f"{config.command} {shlex.join(flags)}"
