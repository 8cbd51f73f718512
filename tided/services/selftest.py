"""The self-test at connect, with its IO: reference jobs, probes, what the collector sets aside, and the verdict that is stored.

`reconcile` runs in every control cycle and never waits for an engine; `run` holds the probes that are under way. Nothing of an engine
trains, and nothing is swapped into it, before `Trust.granted`.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from tided.draft.reference import Reference, sequences
from tided.machine import verification as machine
from tided.machine.verification import (
    Connected,
    Doubted,
    DraftServed,
    Listened,
    Probed,
    ProbeFailed,
    ReferenceFailed,
    ReferenceFound,
    TestRules,
    TimePassed,
    VerificationEvent,
)
from tided.model import failpoints
from tided.model.deployments import Deployment
from tided.model.drafts import Draft, DraftOrigin
from tided.model.engines import Capability, EngineInfo
from tided.model.errors import Refused, Superseded, TideError
from tided.model.jobs import JobKind, JobSpec, JobState
from tided.model.verification import Check, CheckOutcome, Verification, VerificationPhase, VerificationState
from tided.services import acceptance, deployer, diagnosis
from tided.services.context import Context
from tided.services.diagnosis import Shape, Tapped
from tided.services.embeddings import resemble
from tided.services.monitor import EngineView
from tided.services.probing import Prober, judge, probe
from tided.services.speculator import in_force
from tided.store import aside
from tided.store.references import ReferenceStore
from tided.store.samples import Run, Split, read_runs

STATE = "verification"
PROBE_GAMMAS = (2, 3, 1)
"""Probes are drafted for, so that verification steps are tapped too; the first number that the engine takes."""
BUSY = 4
"""With more requests than this at once a step is bound by its arithmetic, and all of them are drafted for meanwhile: few tokens first."""
LISTENED_ROWS = 64
SWEEP_EVERY_S = 5.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Trust:
    """What the controller may do with an engine. `probing`: leave it alone for these seconds. `problem`: for people, or ""."""

    granted: bool
    probing: bool = False
    problem: str = ""


@dataclass(slots=True)
class _Round:
    """A round of probes that this process runs, or has run. `answered`: the engine has done its part."""

    incarnation: str
    attempt: int
    answered: bool = False
    outcome: VerificationEvent | None = None


class SelfTest:
    """Owned by the controller."""

    def __init__(self, context: Context, draft_of: Callable[[EngineView], Awaitable[Draft | None]]) -> None:
        """`draft_of` gives the stored draft that an engine serves, if it is known."""
        self._context = context
        self._draft_of = draft_of
        self._references = ReferenceStore(context.config.references_dir)
        self._verdicts: dict[str, Verification] = {}
        self._rounds: dict[str, _Round] = {}
        self._released: set[tuple[str, str]] = set()
        self._swept_s: dict[str, float] = {}
        self._tasks: TaskGroup | None = None

    async def run(self) -> None:
        """Hold the probes under way, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                await anyio.sleep_forever()
            finally:
                self._tasks = None

    def forget(self, gone: set[str]) -> None:
        """Engines are gone; what is stored about them stays."""
        for engine in gone:
            for known in (self._verdicts, self._rounds, self._swept_s):
                known.pop(engine, None)

    async def current(self, info: EngineInfo) -> Verification | None:
        """The newest verdict about this incarnation, in standby too; None if there is none, or nothing to test."""
        if not self._applies(info):
            return None
        stored = await self._context.state.get(Verification, STATE, info.engine)
        return stored if stored is not None and _is_of(stored, info) else None

    def refusal(self, info: EngineInfo) -> str:
        """Why nothing may be captured from the engine or swapped into it, or ""."""
        verdict = self._verdicts.get(info.engine)
        if not self._applies(info) or (verdict is not None and self._granted(verdict)):
            return ""
        if verdict is None or not _is_of(verdict, info):
            return f"engine {info.engine}: its self-test has not begun"
        return self._problem(verdict) or f"engine {info.engine}: its self-test is under way: {verdict.reason}"

    async def doubt(self, view: EngineView, since_ms: int, now_ms: int) -> None:
        """Its acceptance fell then: look once whether it still taps what it should. Raises `Unavailable`, `Superseded`."""
        verdict = await self.current(view.info)
        if verdict is not None and machine.may_doubt(verdict, since_ms) and not self._hindrance(view.info):
            await self._apply(view.info, verdict, Doubted(now_ms, since_ms))

    async def reconcile(self, view: EngineView, now_ms: int, done: list[str]) -> Trust:
        """Take the engine's self-test one step further. Raises `Unavailable`, `Superseded`."""
        info = view.info
        if not self._applies(info):
            self._verdicts.pop(view.engine, None)
            await self._release(info)
            return Trust(True)
        verdict = await self._current(info, now_ms)
        match verdict.phase:
            case VerificationPhase.REFERENCE:
                verdict = await self._reference(info, verdict, now_ms)
            case VerificationPhase.PROBING:
                verdict = await self._probing(view, verdict, now_ms, done)
            case VerificationPhase.LISTENING:
                verdict = await self._listening(info, verdict, now_ms)
            case VerificationPhase.DONE:
                verdict = await self._settled(view, verdict, now_ms)
        return await self._trust(view, verdict)

    async def _current(self, info: EngineInfo, now_ms: int) -> Verification:
        """The stored state, of this incarnation on this target; a new one otherwise."""
        stored = await self._context.state.get(Verification, STATE, info.engine)
        if stored is not None and _is_of(stored, info):
            self._verdicts[info.engine] = stored
            return stored
        await self._distrust(info)
        event = Connected(now_ms, info.engine, info.incarnation, info.target.digest, self._hindrance(info))
        return await self._apply(info, None, event)

    def _applies(self, info: EngineInfo) -> bool:
        """An engine that taps nothing has nothing to test: nothing of it trains."""
        return self._context.config.self_test.enabled and Capability.TAP in info.capabilities

    def _hindrance(self, info: EngineInfo) -> str:
        if not info.url:
            return "it tells no URL, so it cannot be probed"
        return "" if self._context.config.self_test.probe else "self_test.probe is off"

    async def _apply(self, info: EngineInfo, before: Verification | None, event: VerificationEvent) -> Verification:
        context, settings = self._context, self._context.config.self_test
        rules = TestRules(
            reference_wait_ms=round(settings.reference_wait_s * 1000),
            # The probes' own deadline comes first; this one is for those of a leader that is gone.
            probe_timeout_ms=round(3 * settings.probe_timeout_s * 1000),
            retry_ms=round(settings.retry_s * 1000),
        )
        after, announcements = machine.step(before, event, rules)
        if after.state is VerificationState.MISMATCH and before is not None and before.state is not after.state:
            # Before it is stored: who goes on from there must not find rows that it could train on.
            await anyio.to_thread.run_sync(context.samples.reject, info.engine, before.started_ms)
        for announcement in announcements:
            figures = [f"{check.name}: {check.outcome}: {check.measured}" for check in after.checks]
            await context.announce(announcement.kind, info.engine, announcement.message, checks=figures)
        if after != before:
            await context.state.put(STATE, info.engine, after, context.leadership.require())
            failpoints.hit(f"selftest.{after.phase}")
        self._verdicts[info.engine] = after
        return after

    # --- phases ---

    async def _reference(self, info: EngineInfo, verdict: Verification, now_ms: int) -> Verification:
        try:
            found = await self._find(info)
        except Refused as exc:
            return await self._apply(info, verdict, ReferenceFailed(now_ms, str(exc)))
        event = ReferenceFound(now_ms) if found is not None else TimePassed(now_ms)
        return await self._apply(info, verdict, event)

    async def _find(self, info: EngineInfo) -> Reference | None:
        """The target's reference: from the disk, or from its job, which is submitted if there is none yet.

        Raises `Refused` when the job has failed.
        """
        context, target = self._context, info.target
        found = await anyio.to_thread.run_sync(self._references.find, target.digest, target.vocab)
        if found is not None:
            return found
        tokens = sequences(target.vocab)
        flat = tuple(token for ids in tokens for token in ids)
        # Equal for all engines of a target and all leaders; another one for other sequences.
        job_id = f"reference-{target.digest[:24]}-{hashlib.sha256(repr(tokens).encode()).hexdigest()[:8]}"
        job = await context.jobs.get(job_id)
        if job is None:
            spec = JobSpec(
                kind=JobKind.REFERENCE,
                engine=info.engine,
                target=target.digest,
                target_dir=str(context.target_of(target).path.absolute()),
                token_ids=flat,
                options={"lengths": [len(ids) for ids in tokens]},
                priority=context.priority_of(target.digest),
            )
            job = await context.submit(spec, context.training_for(target.digest).max_attempts, job_id)
        if job.state in (JobState.FAILED, JobState.CANCELLED):
            raise Refused(f"the reference states could not be made: {job.error or f'job {job.id} was {job.state}'}")
        if job.state is not JobState.SUCCEEDED or job.result is None:
            return None
        staged = context.exchange.taken(job.result)
        return staged and await anyio.to_thread.run_sync(self._references.add, target.digest, target.vocab, staged)

    async def _probing(self, view: EngineView, verdict: Verification, now_ms: int, done: list[str]) -> Verification:
        info, context = view.info, self._context
        held = self._rounds.get(info.engine)
        if held is not None and (held.incarnation, held.attempt) == (info.incarnation, verdict.attempt):
            if held.outcome is None:
                return await self._apply(info, verdict, TimePassed(now_ms))
            del self._rounds[info.engine]  # attempts are counted anew when it is tested anew
            after = await self._apply(info, verdict, replace(held.outcome, now_ms=now_ms))
            if verdict.state is VerificationState.PENDING:
                view.restart(view.version)  # what the probes accepted says nothing about traffic
            return after
        if not self._granted(verdict):
            # Before the first row can exist. Of an engine that is trusted only the probes' own are set aside.
            await self._distrust(info)
        epoch = context.leadership.require()
        if not info.capturing:
            await view.backend.set_capture(True, context.config.capture.credit_bytes, epoch)
            done.append(f"{info.engine}: capture on, for its self-test")
            return verdict
        if self._tasks is not None:
            gamma = await self._let_draft(view, epoch, done)
            begun = self._rounds[info.engine] = _Round(info.incarnation, verdict.attempt)
            self._tasks.start_soon(self._probe, view, verdict, gamma, begun, name=f"probe {info.engine}")
            done.append(f"{info.engine}: probing, attempt {verdict.attempt}")
        return verdict

    async def _let_draft(self, view: EngineView, epoch: int, done: list[str]) -> int:
        """Have the probes drafted for, if the engine can, in every step as many tokens: gives how many, 0 if that is not so.

        What it drafts otherwise is the policy's, again, afterwards.
        """
        info = view.info
        drafted = set(in_force(info))
        if len(drafted) == 1 and all(drafted):
            return drafted.pop()
        if Capability.SCHEDULE not in info.capabilities or not info.version:
            return 0
        for gamma in sorted(PROBE_GAMMAS) if view.running > BUSY else PROBE_GAMMAS:
            if gamma <= info.gamma_max:
                try:
                    await view.backend.set_schedule((gamma,), epoch)
                except Superseded:
                    raise
                except Refused:
                    continue  # some engines can reach only some numbers
                done.append(f"{info.engine}: schedule ({gamma},), for its self-test")
                return gamma
        return 0

    async def _probe(self, view: EngineView, verdict: Verification, gamma: int, begun: _Round) -> None:
        """One round; its outcome waits for the next cycle. An engine that keeps its verdict is asked about its draft alone, unless it
        is doubted."""
        context, settings, info = self._context, self._context.config.self_test, view.info
        pending = verdict.state is VerificationState.PENDING
        tapped = pending or verdict.doubted
        try:
            target = context.target_of(info.target)
            prober = Prober(
                context.redis, view.backend, context.samples, target, settings.tolerance, settings.probe_timeout_s
            )
            found = await probe(prober, info, verdict.attempt, gamma, again=tapped)
            begun.answered = True
            checks: tuple[Check, ...] = ()
            if tapped:
                reference = await anyio.to_thread.run_sync(self._reference_of, info, verdict)
                checks = await anyio.to_thread.run_sync(judge, prober, info, reference, found.probed)
            if machine.first_failure(checks) is None:  # rows that are wrong say nothing about the draft
                draft, previous = await self._draft_of(view), await self._previous(info)
                timeout_s = settings.probe_timeout_s
                checks += (await acceptance.check(context, info, draft, previous, found.drafted, timeout_s),)
            told = any(check.name == acceptance.NAME and check.outcome is CheckOutcome.OK for check in checks)
            begun.outcome = Probed(0, verdict.attempt, checks, info.version, told)
        except Superseded as exc:
            await context.leadership.step_down(exc)
        except TideError as exc:
            _log.warning("probe-failed", engine=info.engine, why=str(exc))
            untold = Check(acceptance.NAME, CheckOutcome.SKIPPED, str(exc))
            begun.outcome = (
                ProbeFailed(0, verdict.attempt, str(exc))
                if pending
                else Probed(0, verdict.attempt, (untold,), info.version)
            )

    def _reference_of(self, info: EngineInfo, verdict: Verification) -> Reference | None:
        return self._references.find(info.target.digest, info.target.vocab) if verdict.referenced else None

    async def _previous(self, info: EngineInfo) -> str:
        """The version that the newest swap replaced by the one that serves, or ""."""
        found = await self._context.state.get(Deployment, deployer.STATE, info.engine)
        return found.previous if found is not None and found.version == info.version else ""

    async def _listening(self, info: EngineInfo, verdict: Verification, now_ms: int) -> Verification:
        """Only what is allowed to train is stored, and only that can be listened to."""
        if not self._granted(verdict):
            return verdict
        checks = await anyio.to_thread.run_sync(self._heard, info, verdict.started_ms)
        return await self._apply(info, verdict, Listened(now_ms, checks)) if checks else verdict

    def _heard(self, info: EngineInfo, since_ms: int) -> tuple[Check, ...]:
        """What the engine's first real samples show without a reference; empty while there are too few."""
        runs: list[Run] = []
        for split in (Split.TRAIN, Split.HELD_OUT):
            for shard in self._context.samples.shards(split, info.target.digest, info.engine):
                if shard.created_ms >= since_ms and sum(run.rows for run in runs) < LISTENED_ROWS:
                    runs += read_runs(shard.path)
        if sum(run.rows for run in runs) < LISTENED_ROWS:
            return ()
        tapped = [Tapped.of([run]) for run in runs]
        target = self._context.target_of(info.target)
        shape = Shape(target.info.aux_layers, Capability.LAST_HIDDEN in info.capabilities)
        emitted = diagnosis.greedy(target.path, tapped, shape, sampled=True)
        return diagnosis.finite(tapped), resemble(target.path, tapped), emitted

    async def _settled(self, view: EngineView, verdict: Verification, now_ms: int) -> Verification:
        info = view.info
        if machine.wants_draft(verdict, info.version) and self._granted(verdict) and await self._serves_for_good(view):
            return await self._apply(info, verdict, DraftServed(now_ms, info.version))
        now_s = self._context.clock()
        if now_s - self._swept_s.get(info.engine, float("-inf")) >= SWEEP_EVERY_S:
            self._swept_s[info.engine] = now_s
            await anyio.to_thread.run_sync(self._context.samples.drop_aside, info.engine)
            if verdict.state is VerificationState.UNVERIFIED and not verdict.referenced:
                try:
                    found = await self._find(info)
                except Refused:
                    found = None  # it was said when the verdict was given
                if found is not None:
                    return await self._apply(info, verdict, ReferenceFound(now_ms))
        return await self._apply(info, verdict, TimePassed(now_ms))

    async def _serves_for_good(self, view: EngineView) -> bool:
        """Whether the engine serves a trained draft, whose watch is over."""
        deployment = await self._context.state.get(Deployment, deployer.STATE, view.engine)
        if deployment is not None and not deployment.state.final:
            return False
        draft = await self._draft_of(view)
        return draft is not None and draft.origin is not DraftOrigin.INIT

    # --- what follows from it ---

    async def _trust(self, view: EngineView, verdict: Verification) -> Trust:
        held = self._rounds.get(view.engine)
        answered = held is not None and held.attempt == verdict.attempt and held.answered
        probing = verdict.phase is VerificationPhase.PROBING and not answered
        if self._granted(verdict):
            await self._release(view.info)
            return Trust(True, probing)
        return Trust(False, probing, "" if verdict.state is VerificationState.PENDING else self._problem(verdict))

    def _granted(self, verdict: Verification) -> bool:
        if verdict.state is VerificationState.UNVERIFIED:
            return self._context.config.self_test.allow_unverified
        return verdict.state is VerificationState.VERIFIED

    def _problem(self, verdict: Verification) -> str:
        """Why it is not trusted and what to do, or "" while it is tested."""
        match verdict.state:
            case VerificationState.MISMATCH:
                return (
                    f"engine {verdict.engine} failed its self-test: {verdict.reason}; no capture, no swap until it is"
                    f" restarted without this fault (tidectl doctor {verdict.engine})"
                )
            case VerificationState.UNVERIFIED:
                return (
                    f"engine {verdict.engine} is not verified: {verdict.reason}; no capture, no swap unless"
                    " self_test.allow_unverified is true"
                )
            case _:
                return ""

    async def _distrust(self, info: EngineInfo) -> None:
        """Its rows must not train from now on."""
        await aside.set_aside(self._context.redis, info.engine, info.incarnation)
        self._released.discard((info.engine, info.incarnation))

    async def _release(self, info: EngineInfo) -> None:
        """Its rows may train from now on."""
        if (info.engine, info.incarnation) not in self._released:
            await aside.release(self._context.redis, info.engine, info.incarnation)
            self._released.add((info.engine, info.incarnation))


def _is_of(verdict: Verification, info: EngineInfo) -> bool:
    return (verdict.incarnation, verdict.target) == (info.incarnation, info.target.digest)
