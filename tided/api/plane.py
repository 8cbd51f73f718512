"""What the API asks of the control plane. `tided.services.plane.ControlPlane` is the one that runs; unit tests bring a fake.

Everything returns records (`tided.model.codec.to_plain` makes JSON of them) and raises only `TideError`; `NotFound` where what is
named does not exist. `actor` names who asked, for the audit log: "uid:1000". References to drafts are a version digest, an unambiguous
head of one (at least 6 digits), or "lineage@number".
"""

from pathlib import Path
from typing import Any, Protocol

from tided.model.deployments import Deployment
from tided.model.drafts import Draft
from tided.model.events import Event
from tided.model.jobs import Job, JobState, WorkerInfo, WorkerMark
from tided.model.policy import PolicySetting, SpeculationMode
from tided.model.status import EngineStatus, Explanation, PoolStatus, Status
from tided.model.verification import Finding


class Plane(Protocol):
    async def status(self) -> Status: ...

    async def engines(self) -> tuple[EngineStatus, ...]: ...

    async def drafts(self) -> tuple[Draft, ...]: ...

    async def draft(self, ref: str) -> Draft: ...

    async def init_draft(self, target_dir: Path, name: str, actor: str) -> Draft:
        """Write version 0 for a target and store it as lineage `name`. Takes seconds: the daemon does it in a thread."""
        ...

    async def deploy(self, ref: str, engine: str | None, actor: str) -> tuple[Deployment, ...]:
        """Begin to deploy on one engine, or on all that it fits. Returns before the swap has happened."""
        ...

    async def rollback(self, engine: str, actor: str) -> Deployment: ...

    async def jobs(self, limit: int, state: JobState | None = None) -> tuple[Job, ...]:
        """The newest, of a state or of all."""
        ...

    async def job(self, job_id: str) -> Job: ...

    async def cancel(self, job_id: str, actor: str) -> Job: ...

    async def retry(self, job_id: str, actor: str) -> Job:
        """Train again, by a new job, for what a training was about that failed or was cancelled. Raises `Conflict` when it did not."""
        ...

    async def workers(self) -> tuple[WorkerInfo, ...]: ...

    async def cordon(self, worker: str, drain: bool, actor: str) -> WorkerMark:
        """The worker gets no job until it is uncordoned; `drain`: what it runs ends or is given back."""
        ...

    async def uncordon(self, worker: str, actor: str) -> WorkerMark: ...

    async def pools(self) -> tuple[PoolStatus, ...]:
        """Of each target, its drafts by domain."""
        ...

    async def policy(self) -> PolicySetting: ...

    async def explain(self, engine: str | None) -> tuple[Explanation, ...]:
        """The newest decision about each engine's drafted tokens, or about one's. Engines that nothing was decided about are absent."""
        ...

    async def set_policy(self, mode: SpeculationMode, gamma: int, actor: str) -> PolicySetting: ...

    async def train_now(self, engine: str | None, actor: str) -> Job:
        """Submit a training job from what is stored. None: the only engine. Raises `Conflict` when one is in flight."""
        ...

    async def events(self, after: str, limit: int) -> tuple[Event, ...]:
        """Events after the id `after`, oldest first; "": the newest `limit`."""
        ...

    async def doctor(self, engine: str | None) -> tuple[Finding, ...]:
        """Look the whole installation over; with `engine`, of the engines only that one."""
        ...

    async def purge(self, engine: str | None, actor: str) -> dict[str, Any]:
        """Delete captured samples, in the stream and on disk. Returns how many rows and bytes went."""
        ...
