"""One attempt at a job: run the trainer, renew the lease with its newest progress, stop it when told, commit what it gave."""

import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import anyio
import structlog

from tided.machine.job import Verdict
from tided.model import failpoints
from tided.model.codec import from_plain, to_plain
from tided.model.errors import Conflict, Refused, TideError, Unavailable
from tided.model.jobs import JobKind, JobResult, JobSpec, Progress
from tided.store.jobs import Claim, JobStore, TooLarge
from tided.store.lease import MARGIN, boottime_s
from tided.worker import leftovers
from tided.worker.process import TrainerProcess, describe_exit
from tided.worker.settings import WorkerSettings, trainer_environment
from tided.worker.staging import Staging

RENEW_S = 1.0
RETRY_S = 0.5
EXIT_GRACE_S = 5.0

_log = structlog.get_logger()


# How an attempt can end, before anything is committed.


@dataclass(frozen=True, slots=True)
class Succeeded:
    result: JobResult


@dataclass(frozen=True, slots=True)
class Failed:
    error: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Cancelled:
    pass


@dataclass(frozen=True, slots=True)
class LeaseLost:
    pass


@dataclass(frozen=True, slots=True)
class GivenBack:
    pass


Outcome = Succeeded | Failed | Cancelled | LeaseLost | GivenBack


class Fate(Enum):
    """What became of an attempt's report. UNKNOWN: its lease ended before an answer came."""

    TAKEN = auto()
    REFUSED = auto()
    UNKNOWN = auto()


class Attempt:
    """`claimed_s`: `boottime_s` from before the claim was sent. `give_back` set: stop, and return the job to the queue. `staging` None: the
    job's paths are this host's too."""

    def __init__(
        self,
        jobs: JobStore,
        claim: Claim,
        settings: WorkerSettings,
        staging: Staging | None,
        give_back: anyio.Event,
        claimed_s: float,
    ) -> None:
        self._jobs = jobs
        self._claim = claim
        self._settings = settings
        self._staging = staging
        self._give_back = give_back
        self._usable_s = jobs.lease_s * (1 - MARGIN)
        self._until_s = claimed_s + self._usable_s
        self.rate = 0.0
        """Tokens/s that the trainer said last; 0 before it said any."""
        self._progress: Progress | None = None
        self._outcome: Outcome | None = None
        self._directory = leftovers.attempt_dir(settings.work_dir, claim.job.id, claim.attempt)
        self._log = _log.bind(job=claim.job.id, kind=claim.job.spec.kind.value, attempt=claim.attempt)

    async def run(self) -> None:
        """Work until the attempt has ended and that is committed, or nothing can be committed any more. No process is left."""
        self._log.info("attempt-started")
        outcome: Outcome = Failed("the worker itself failed; see its log", retryable=True)
        try:
            outcome = await self._work()
        except anyio.get_cancelled_exc_class():
            outcome = GivenBack()
            raise
        finally:
            # Also when the agent itself is being cancelled: the job should not have to wait for its lease to run out.
            with anyio.CancelScope(shield=True):
                fate = await self._commit(outcome)
                await anyio.to_thread.run_sync(self._tidy, outcome, fate)

    async def _work(self) -> Outcome:
        async with anyio.create_task_group() as group:
            for ending in (self._carry_out(), self._hold_lease(), self._heed_give_back()):
                group.start_soon(self._until_over, ending, group.cancel_scope)
        assert self._outcome is not None
        return self._outcome

    async def _until_over(self, ending: Awaitable[Outcome], scope: anyio.CancelScope) -> None:
        outcome = await ending
        if self._outcome is None:
            self._outcome = outcome
            scope.cancel()

    # --- the job itself ---

    async def _carry_out(self) -> Outcome:
        """Stage what the job needs, run the trainer, upload what it gave."""
        staging, spec = self._staging, self._claim.job.spec
        try:
            if staging is None:
                return await self._train(shared(spec))
            with staging.holding(spec):
                outcome = await self._train(await anyio.to_thread.run_sync(staging.localise, spec))
                if isinstance(outcome, Succeeded) and outcome.result.staged:
                    outcome = Succeeded(await anyio.to_thread.run_sync(staging.upload, spec.kind, outcome.result))
                return outcome
        except Unavailable as exc:
            return Failed(str(exc), retryable=True)
        except Refused as exc:
            return Failed(str(exc), retryable=False)

    async def _train(self, spec: JobSpec) -> Outcome:
        argv = await anyio.to_thread.run_sync(self._prepare, spec)
        environment = trainer_environment(os.environ, self._settings.threads)
        trainer = await TrainerProcess.start(argv, environment, self._settings.nice)
        outcome: Outcome | None = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(trainer.watch_stderr)
                outcome = await self._follow(trainer)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as closing:
                    closing.start_soon(self._hold_lease)  # the end may take longer than what is left of the lease
                    await trainer.kill()
                    closing.cancel_scope.cancel()
        assert outcome is not None
        if isinstance(outcome, Failed) and trainer.stderr_tail:
            self._log.warning("trainer-stderr", tail=list(trainer.stderr_tail))
        return outcome

    def _prepare(self, spec: JobSpec) -> list[str]:
        spec_file = self._directory / "spec.json"
        try:
            self._directory.mkdir(parents=True)
            spec_file.write_text(json.dumps(to_plain(on_this_host(spec, self._settings))))
            if spec.kind is JobKind.TRAIN and leftovers.take_up(self._directory):
                self._log.info("attempt-resumes")
        except OSError as exc:
            raise Unavailable(
                f"{self._directory}: cannot be written ({exc.strerror}); free space on the worker"
            ) from exc
        command = self._settings.command(spec.kind)
        return [*command, spec.kind.value, str(spec_file), "--out", str(self._directory), "--with-parent"]

    # --- the three ways in which it can be over: the trainer, the lease, the agent ---

    async def _follow(self, trainer: TrainerProcess) -> Outcome:
        lines = trainer.lines()
        try:
            while True:
                with anyio.fail_after(self._settings.silence_s):
                    line = await anext(lines, None)
                if line is None:
                    break
                if (ended := self._said(line)) is not None:
                    with anyio.move_on_after(EXIT_GRACE_S):
                        await trainer.wait()
                    return ended
        except TimeoutError:
            return Failed(f"the trainer said nothing for {self._settings.silence_s:g} s", retryable=True)
        except ValueError as exc:
            return Failed(f"the trainer wrote {exc}", retryable=False)
        return Failed(describe_exit(await trainer.wait()), retryable=True)

    def _said(self, line: bytes) -> Outcome | None:
        """Take a line of the trainer in: progress, or the end."""
        try:
            plain: Any = json.loads(line)
            if not isinstance(plain, dict):
                raise Refused("not an object")
            if "result" in plain:
                return Succeeded(from_plain(JobResult, plain["result"], "result"))
            if "error" in plain:
                return Failed(str(plain["error"]), retryable=plain.get("retryable") is True)
            self._progress = from_plain(Progress, plain, "progress")
            self.rate = self._progress.tokens_per_s or self.rate
        except (ValueError, RecursionError):
            self._log.debug("trainer-line-ignored", bytes=len(line))  # a library that prints; not ours to quote
        except Refused as exc:
            if b'"result"' in line[:20]:
                return Failed(f"the trainer's result does not decode: {exc}", retryable=False)
            self._log.debug("trainer-line-ignored", bytes=len(line))
        return None

    async def _hold_lease(self) -> Outcome:
        sent: Progress | None = None
        while True:
            await anyio.sleep(min(RENEW_S, self._usable_s / 4))
            newest, sent_s = self._progress, boottime_s()
            verdict = await self._ask(lambda: self._jobs.renew(self._claim, newest if newest is not sent else None))  # noqa: B023
            if verdict is Verdict.CANCEL:
                return Cancelled()
            if verdict is Verdict.LOST or boottime_s() >= self._until_s:
                return LeaseLost()
            if verdict is Verdict.GO_ON:
                self._until_s, sent = sent_s + self._usable_s, newest

    async def _heed_give_back(self) -> Outcome:
        await self._give_back.wait()
        return GivenBack()

    async def _ask(self, call: Callable[[], Awaitable[Verdict]]) -> Verdict | None:
        """One request inside the lease; None when Redis did not answer: the attempt goes on while its lease lasts."""
        with anyio.move_on_after(max(0.0, self._until_s - boottime_s())):
            try:
                return await call()
            except TideError as exc:
                self._log.warning("lease-not-renewed", why=str(exc), remaining_s=round(self._until_s - boottime_s(), 1))
        return None

    # --- commit ---

    async def _commit(self, outcome: Outcome) -> Fate:
        """Say how it ended, until it was heard or the lease is over. After that the leader takes the job back by itself."""
        if isinstance(outcome, LeaseLost):
            self._log.warning("attempt-lost")
            return Fate.UNKNOWN
        while True:
            with anyio.move_on_after(max(0.0, self._until_s - boottime_s())):
                try:
                    await self._report(outcome)
                except Conflict as exc:
                    self._log.warning("attempt-refused", outcome=type(outcome).__name__, why=str(exc))
                    return Fate.REFUSED
                except TooLarge as exc:
                    outcome = Failed(str(exc), retryable=False)
                    continue
                except TideError as exc:
                    self._log.warning("attempt-not-reported", why=str(exc))
                    await anyio.sleep(RETRY_S)
                    continue
                else:
                    self._log.info("attempt-ended", outcome=type(outcome).__name__, **_told(outcome))
                    return Fate.TAKEN
            self._log.warning("attempt-lost", outcome=type(outcome).__name__)
            return Fate.UNKNOWN

    def _tidy(self, outcome: Outcome, fate: Fate) -> None:
        """Keep what was staged, and what another attempt may go on from. What others have made is theirs unless this one counts."""
        if fate is Fate.REFUSED:
            leftovers.remove(self._directory)
            return
        if fate is Fate.UNKNOWN:
            # It may have been heard after all.
            staged = isinstance(outcome, Succeeded) and outcome.result.staged and not outcome.result.objects
            if not staged and not leftovers.may_resume(self._directory):
                leftovers.remove(self._directory)
            return
        match outcome:
            case Succeeded(result):
                leftovers.remove_others(self._directory)
                keep = bool(result.staged) and not result.objects
            case GivenBack() | LeaseLost() | Failed(retryable=True):
                keep = leftovers.may_resume(self._directory)
            case Failed() | Cancelled():
                leftovers.remove_others(self._directory)
                keep = False
        if not keep:
            leftovers.remove(self._directory)

    async def _report(self, outcome: Outcome) -> None:
        match outcome:
            case Succeeded(result):
                failpoints.hit("worker.finishing")
                await self._jobs.finish(self._claim, result)
                failpoints.hit("worker.finished")
            case Failed(error, retryable):
                await self._jobs.fail(self._claim, error, retryable)
            case Cancelled():
                await self._jobs.fail(self._claim, "cancelled", retryable=False)
            case GivenBack():
                await self._jobs.release(self._claim)
            case LeaseLost():
                pass


def shared(spec: JobSpec) -> JobSpec:
    """The job as it is, for a worker that shares a filesystem with tided. Raises `Unavailable` when its tided has another storage."""
    if spec.objects:
        raise Unavailable(
            "the job's samples are in a shared storage, and this worker has none: set storage.url, or --storage"
        )
    return spec


def on_this_host(spec: JobSpec, settings: WorkerSettings) -> JobSpec:
    """The job with the threads and devices of this worker, which whoever submitted it cannot know.

    Every process needs a pack of each step: `packs` is rounded up to a multiple of the devices.
    """
    options = {**spec.options, "threads": settings.threads, "device": settings.device}
    if spec.kind is JobKind.TRAIN and settings.devices > 1:
        options["packs"] = -(-int(options.get("packs", 1)) // settings.devices) * settings.devices
    return replace(spec, options=options)


def _told(outcome: Outcome) -> dict[str, Any]:
    return {"error": outcome.error, "retryable": outcome.retryable} if isinstance(outcome, Failed) else {}
