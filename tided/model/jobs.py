"""Jobs, what they give, and the workers that run them."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tided.model.drafts import Evaluation


class JobKind(StrEnum):
    TRAIN = "train"
    SCORE = "score"
    REFERENCE = "reference"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class Recipe(StrEnum):
    """How far the parent is from what it could be; the trainer's rates follow from it (`tided.training.options`)."""

    COLD = "cold"
    DRIFT = "drift"
    REFRESH = "refresh"


CHECKPOINT_FILE = "checkpoint.safetensors"
"""In a train job's directory while it runs: another attempt that finds it there goes on from it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft version, and the directory of its files."""

    version: str
    path: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What a worker must have to run a job. `device`: a kind as torch names it, "" for any; `memory_bytes`: of each device."""

    device: str = ""
    devices: int = 1
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A shard, a draft or reference states that tided and workers hand over by the shared storage: under `key`, `bytes` of content whose
    SHA-256 is `sha256`. `path`: its name in the job or the result that it belongs to."""

    path: str
    key: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a worker is asked to do: data only, never code. Paths are on the filesystem that hosts share; with a shared storage they are
    names, and what they name is in `objects`. `priority`: of its target, 0 to 9, higher is more urgent.

    train: from `draft`, on `shards`, evaluate parent and child on `held_out`. score: evaluate `draft` on `held_out`, and for
    each temperature of `mix` (temperature, share of the requests) where its samples have the last hidden state; with `groups` only on
    these prompts, and say where its tokens are right (`Chain`); `previous_dir`: a version that the engine served before. `candidates`
    are evaluated beside it, on the same requests.
    reference: reference states of the target for `token_ids`.
    """

    kind: JobKind
    engine: str  # the engines whose traffic this is about, by name, with commas between
    target: str  # target digest
    target_dir: str
    lineage: str = ""
    draft: str = ""  # version
    draft_dir: str = ""
    shards: tuple[str, ...] = ()
    replay: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    recipe: Recipe = Recipe.COLD
    gamma: int = 4
    mix: tuple[tuple[float, float], ...] = ()
    budget_s: float = 600.0
    token_ids: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()  # hexadecimal
    previous_dir: str = ""
    candidates: tuple[Candidate, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # trainer options, checked by tided.training
    objects: tuple[StoredObject, ...] = ()
    priority: int = 0
    needs: Needs = Needs()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running attempt is. `fraction` in 0..1; `eta_s` < 0 when unknown."""

    fraction: float
    note: str
    loss: float | None = None
    accept_length: float | None = None
    tokens_per_s: float | None = None
    eta_s: float = -1.0


class DraftFault(StrEnum):
    """How an engine may serve another draft than it says. NONE: as it should be."""

    NONE = ""
    VOCABULARY = "vocabulary"  # draft ids are taken for target ids
    FEATURES_LATE = "features-late"  # the aux states of the token before
    FEATURES_EARLY = "features-early"  # and of the one after
    FEATURES_ORDER = "features-order"  # the aux states in descending order of their layers
    PREVIOUS = "previous"  # the weights are still those of the version before
    HALF_HEAD = "half-head"  # of the new version only the head arrived
    HALF_BODY = "half-body"  # and everything but the head


@dataclass(frozen=True, slots=True)
class Chain:
    """How many tokens that a draft proposes from each generated position of one prompt on are right, before the first that is not.

    Entry 0 is the step behind the first generated token. `low` are surely right, `high` at most: near ties of the draft's logits may be
    decided either way. `fault`: what was wrong with the draft when it was asked.
    """

    group: str
    low: tuple[int, ...]
    high: tuple[int, ...]
    fault: DraftFault = DraftFault.NONE


@dataclass(frozen=True, slots=True)
class JobResult:
    """What an attempt gave. train: `staged` is the directory of the new checkpoint, evaluations are old and new. score: `candidate` is
    the evaluation of the job's draft, `scores` those of its candidates, in their order. `objects`: what `staged` names, where it was put
    into the shared storage."""

    staged: str = ""
    version: str = ""
    incumbent: Evaluation | None = None
    candidate: Evaluation | None = None
    trained_tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    chains: tuple[Chain, ...] = ()
    scores: tuple[Evaluation, ...] = ()
    objects: tuple[StoredObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """A job as stored. `attempt` counts claims and fences commits: only the newest attempt may finish."""

    id: str
    spec: JobSpec
    state: JobState
    epoch: int  # of the leader that submitted it
    attempt: int
    max_attempts: int
    created_ms: int
    not_before_ms: int
    lease_until_ms: int
    worker: str = ""
    cancelling: bool = False
    started_ms: int = 0
    finished_ms: int = 0
    progress: Progress | None = None
    result: JobResult | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's heartbeat, written by the worker under a TTL. `memory_bytes`: of each device, 0 if not known; `rate`: tokens/s of its
    newest training, 0 before the first; `draining`: what it runs ends or is given back; `cordoned`: the operator wants it to claim
    nothing, which the registry fills in."""

    worker: str
    incarnation: str
    host: str
    kinds: tuple[JobKind, ...]
    device: str
    threads: int
    job: str = ""
    draining: bool = False
    pid: int = 0
    devices: int = 1
    memory_bytes: int = 0
    rate: float = 0.0
    cordoned: bool = False


class WorkerMark(StrEnum):
    """What an operator wants of a worker, until the next time. Kept whether or not the worker is there."""

    NONE = "none"
    CORDON = "cordon"  # it gets no job
    DRAIN = "drain"  # and what it runs ends, or is given back
