"""A control plane in memory, for the unit tests of the API and of tidectl: one engine, one worker, two drafts, one job."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tided.model.deployments import Deployment, DeploymentState
from tided.model.drafts import Draft, DraftOrigin, Evaluation
from tided.model.engines import Capability, EngineInfo, TargetInfo
from tided.model.errors import Conflict, InvariantBroken, NotFound, Refused, Unavailable
from tided.model.events import Event
from tided.model.jobs import Job, JobKind, JobSpec, JobState, Progress, WorkerInfo, WorkerMark
from tided.model.policy import PolicySetting, SpeculationMode
from tided.model.status import (
    Choice,
    DomainStatus,
    EngineStatus,
    Explanation,
    LauncherStatus,
    PoolStatus,
    SampleTotals,
    SpeculationStatus,
    Status,
    TrainingStatus,
)
from tided.model.verification import Check, CheckOutcome, Finding

DIGESTS = ("a1" * 32, "b2" * 32)
TARGET = TargetInfo("c3" * 32, "SmolLM2-135M-Instruct", 30, 576, 49152, (2, 15, 27))
EVALUATION = Evaluation(DIGESTS[1], 3, ("00", "01"), (2.0, 2.5), (100, 100), (0.7, 0.6, 0.5), 0.031)
INFO = EngineInfo(
    engine="local",
    incarnation="local-1",
    kind="transformers",
    url="http://127.0.0.1:8000",
    target=TARGET,
    version=DIGESTS[1],
    vocab_id="d4" * 32,
    gamma_max=4,
    max_batch=8,
    capabilities=(Capability.TAP, Capability.SCHEDULE, Capability.SWAP),
    gammas=(3, 3, 0, 0, 0, 0, 0, 0),
    capturing=True,
    epoch=1700000000000,
)
ENGINE = EngineStatus(
    info=INFO,
    draft="smollm2@1",
    running=2,
    waiting=1,
    tokens_per_s=48.25,
    accept_length=2.14,
    speculation=SpeculationStatus(
        (3, 3, 0, 0, 0, 0, 0, 0), (1.31, 1.12, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.62, "alpha 0.62 pays up to batch 2"
    ),
    training=TrainingStatus("collecting", "acceptance fell from 0.61 to 0.40", 0.4, 0.61, 12000, 20000, 1, 2),
    samples=SampleTotals(1000, 900, 50, 0, 50, 0, 12),
    swaps=2,
)
EXPLANATION = Explanation(
    engine="local",
    policy="threshold",
    running=2,
    gammas=(3, 3, 0, 0, 0, 0, 0, 0),
    probing=False,
    reason="at batch 2 drafting 3 is predicted to give 1.12x (alpha 0.62)",
    alpha=0.62,
    conditional=(0.7, 0.6, 0.5),
    choices=tuple(
        Choice(b, 3 if b < 3 else 0, (1.0, 1.4 - 0.06 * b, 1.5 - 0.08 * b, 1.51 - 0.1 * b, 1.45 - 0.12 * b))
        for b in range(1, 9)
    ),
    figures={"alpha, long memory": 0.62, "alpha, newest steps": 0.58, "seconds lost in the last minute": 0.0},
)
POOL = PoolStatus(
    target="smollm2",
    state="idle",
    reason="domain 2 is served",
    scored_ms=1_800_000_000_000,
    domains=(
        DomainStatus(1, "smollm2@0", DIGESTS[0], False, 2.31, 1.28, 1_800_000_000_000, 3, 6400),
        DomainStatus(2, "smollm2@1", DIGESTS[1], True, 2.25, 2.21, 1_800_000_100_000, 1, 0),
    ),
)
JOB = Job(
    id="train-00kd9x3j4k-1a2b3c4d5e",
    spec=JobSpec(JobKind.TRAIN, "local", TARGET.digest, "/models/smollm2", lineage="smollm2", shards=("a", "b")),
    state=JobState.RUNNING,
    epoch=1700000000000,
    attempt=1,
    max_attempts=3,
    created_ms=1_800_000_000_000,
    not_before_ms=0,
    lease_until_ms=0,
    worker="worker",
    started_ms=1_800_000_001_000,
    progress=Progress(0.43, "step 120 of 280", 2.31, 1.92, 1240.0, eta_s=80.0),
)
WORKER = WorkerInfo("worker", "worker-1", "host-a", (JobKind.TRAIN, JobKind.SCORE), "cpu", 1, job=JOB.id)


def make_draft(number: int) -> Draft:
    return Draft(
        version=DIGESTS[number],
        lineage="smollm2",
        number=number,
        parent=DIGESTS[0] if number else "",
        origin=DraftOrigin.TRAINED if number else DraftOrigin.INIT,
        target=TARGET.digest,
        vocab_id="d4" * 32,
        draft_vocab=8192,
        bytes=19_600_000,
        created_ms=1_800_000_000_000 + number,
        job=JOB.id if number else "",
        evaluation=EVALUATION if number else None,
    )


class FakePlane:
    """`calls` lists what was asked to change, with the actor; `fault`, when set, is raised by every method. `looked`: how often
    somebody asked for events."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fault: Exception | None = None
        self.log: list[Event] = []
        self.setting = PolicySetting()
        self.workers_now: tuple[WorkerInfo, ...] = (WORKER,)
        self.engines_now: tuple[EngineStatus, ...] = (ENGINE,)
        self.problems: tuple[str, ...] = ()
        self.launcher: LauncherStatus | None = None
        self.looked = 0
        self.checks_now = [Check("layer ids", CheckOutcome.OK, "layers 2, 15, 27 and the last one")]

    def _enter(self) -> None:
        if self.fault is not None:
            raise self.fault

    def happened(self, kind: str, message: str) -> None:
        self.log.append(Event(kind, 1_800_000_000_000, "local", message, {}, f"{len(self.log) + 1}-0"))

    async def status(self) -> Status:
        self._enter()
        return Status(
            name="tided",
            program="0.1.0",
            leader=True,
            epoch=1700000000000,
            uptime_s=7384.0,
            redis="connected",
            policy=self.setting,
            engines=self.engines_now,
            workers=self.workers_now,
            active_jobs=(JOB,),
            drafts=2,
            problems=self.problems,
            pools=(POOL,),
            launcher=self.launcher,
        )

    async def engines(self) -> tuple[EngineStatus, ...]:
        self._enter()
        return self.engines_now

    async def drafts(self) -> tuple[Draft, ...]:
        self._enter()
        return (make_draft(0), make_draft(1))

    async def draft(self, ref: str) -> Draft:
        self._enter()
        for item in await self.drafts():
            if ref in (f"{item.lineage}@{item.number}", item.version[: len(ref)]):
                return item
        raise NotFound(f"there is no draft {ref!r}; `tidectl drafts list` names them all")

    async def init_draft(self, target_dir: Path, name: str, actor: str) -> Draft:
        self._enter()
        self.calls.append(("init_draft", str(target_dir), name, actor))
        return replace(make_draft(0), lineage=name)

    async def deploy(self, ref: str, engine: str | None, actor: str) -> tuple[Deployment, ...]:
        draft = await self.draft(ref)
        self.calls.append(("deploy", ref, engine, actor))
        return (self._deployment(draft.version),)

    async def rollback(self, engine: str, actor: str) -> Deployment:
        self._enter()
        if engine != "local":
            raise NotFound(f"there is no engine {engine!r}")
        self.calls.append(("rollback", engine, actor))
        return self._deployment(DIGESTS[0])

    def _deployment(self, version: str) -> Deployment:
        return Deployment("deploy-1", "local", version, DIGESTS[1], DeploymentState.PENDING, 1, 0, 0, "operator")

    async def jobs(self, limit: int, state: JobState | None = None) -> tuple[Job, ...]:
        self._enter()
        return (JOB,)[:limit] if state in (None, JOB.state) else ()

    async def job(self, job_id: str) -> Job:
        self._enter()
        if job_id != JOB.id:
            raise NotFound(f"there is no job {job_id!r}")
        return JOB

    async def cancel(self, job_id: str, actor: str) -> Job:
        job = await self.job(job_id)
        self.calls.append(("cancel", job_id, actor))
        return replace(job, cancelling=True)

    async def retry(self, job_id: str, actor: str) -> Job:
        job = await self.job(job_id)
        self.calls.append(("retry", job_id, actor))
        return replace(job, state=JobState.QUEUED, attempt=0, worker="", progress=None)

    async def cordon(self, worker: str, drain: bool, actor: str) -> WorkerMark:
        self._enter()
        self.calls.append(("cordon", worker, drain, actor))
        return WorkerMark.DRAIN if drain else WorkerMark.CORDON

    async def uncordon(self, worker: str, actor: str) -> WorkerMark:
        self._enter()
        self.calls.append(("uncordon", worker, actor))
        return WorkerMark.NONE

    async def workers(self) -> tuple[WorkerInfo, ...]:
        self._enter()
        return self.workers_now

    async def pools(self) -> tuple[PoolStatus, ...]:
        self._enter()
        return (POOL,)

    async def policy(self) -> PolicySetting:
        self._enter()
        return self.setting

    async def explain(self, engine: str | None) -> tuple[Explanation, ...]:
        self._enter()
        if engine not in (None, "local"):
            raise NotFound(f"there is no engine {engine!r}")
        return (EXPLANATION,)

    async def set_policy(self, mode: SpeculationMode, gamma: int, actor: str) -> PolicySetting:
        self._enter()
        if not 0 <= gamma <= INFO.gamma_max:
            raise Refused(f"gamma {gamma} is above what the engine can draft ({INFO.gamma_max})")
        self.calls.append(("set_policy", mode, gamma, actor))
        self.setting = PolicySetting(mode, gamma)
        return self.setting

    async def train_now(self, engine: str | None, actor: str) -> Job:
        self._enter()
        self.calls.append(("train_now", engine, actor))
        return replace(JOB, state=JobState.QUEUED, attempt=0, worker="", progress=None)

    async def events(self, after: str, limit: int) -> tuple[Event, ...]:
        self._enter()
        self.looked += 1
        if not after:
            return tuple(self.log[-limit:])
        return tuple(item for item in self.log if int(item.id.partition("-")[0]) > int(after.partition("-")[0]))[:limit]

    async def doctor(self, engine: str | None) -> tuple[Finding, ...]:
        self._enter()
        if engine not in (None, "local"):
            raise NotFound(f"there is no engine {engine!r}")
        return (
            Finding("redis", (Check("server", CheckOutcome.OK, "valkey 9.1.0"),)),
            Finding("engine local", tuple(self.checks_now)),
        )

    async def purge(self, engine: str | None, actor: str) -> dict[str, Any]:
        self._enter()
        self.calls.append(("purge", engine, actor))
        return {"rows": 900, "bytes": 4_147_200}


FAULTS: dict[type[Exception], tuple[int, str, int]] = {
    NotFound: (404, "NotFound", 1),
    Refused: (400, "Refused", 1),
    Conflict: (409, "Conflict", 4),
    Unavailable: (503, "Unavailable", 3),
    InvariantBroken: (500, "InvariantBroken", 5),
}
"""What becomes of each error: HTTP status, kind, exit code of tidectl."""
