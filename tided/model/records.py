"""What the parts of tided tell each other: frozen records without IO. `tided.model.codec` turns them into plain data.

Times named `*_ms` are Redis TIME in milliseconds since the epoch; durations are `*_s`. A `version` is always a draft's content
digest; an `epoch` is always the fencing number of the leader.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# --- engines ---------------------------------------------------------------------------------------------------------


class Capability(StrEnum):
    """What an engine can do at run time. The daemon never asks for what is not declared."""

    TAP = "tap"  # publishes hidden states
    LAST_HIDDEN = "last_hidden"  # samples carry the last hidden state, for soft targets
    SCHEDULE = "schedule"  # drafted tokens per batch size can be set between steps
    SWAP = "swap"  # the draft's weights can be replaced while serving
    SWAP_VOCABULARY = "swap_vocabulary"  # and so can its vocabulary map
    PROFILE = "profile"  # measures T(n) and D(b)
    FETCH = "fetch"  # drafts can be sent to it over Redis: it need not share a filesystem with tided


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """The model that is served. `digest` identifies its content (see tided.draft.target)."""

    digest: str
    name: str
    layers: int
    hidden: int
    vocab: int
    aux_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """T(n): seconds of one target forward over n tokens in all; D(b): seconds of one draft forward over a batch of b.

    `tokens` and `batches` ascend; between them the policy interpolates linearly. `idle_drafts`: draft forwards that a step runs
    which drafts nothing; 0.0 where the draft rests then, 1.0 where it is kept in step.
    """

    tokens: tuple[int, ...]
    target_s: tuple[float, ...]
    batches: tuple[int, ...]
    draft_s: tuple[float, ...]
    idle_drafts: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine's heartbeat, written by the engine under a TTL."""

    engine: str
    incarnation: str
    kind: str  # "transformers", "vllm", "sglang", or any other name for a stack that speaks the protocol
    url: str  # base URL of its HTTP server, or ""
    target: TargetInfo
    version: str  # digest of the draft served now, read back from the loaded weights' source; "" for none
    vocab_id: str
    gamma_max: int
    max_batch: int
    capabilities: tuple[Capability, ...]
    gammas: tuple[
        int, ...
    ]  # the schedule in force: drafted tokens at batch size 1, 2, ...; the last entry holds beyond
    capturing: bool
    epoch: int  # the highest epoch seen
    profile: LatencyProfile | None = None
    pid: int = 0
    build: str = ""  # of the engine itself, as it calls it: "vllm 0.32.0"


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Steps of one (batch size, gamma) since the previous report.

    `accepted[k]` counts request-steps in which exactly k of the gamma drafted tokens were accepted, so it has gamma + 1 entries.
    Emitted tokens = sum((k + 1) * accepted[k]): the bonus token is always emitted.
    """

    batch: int
    gamma: int
    steps: int
    seconds: float
    accepted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One finished request. `accepted` and `drafted` count tokens, `spec_steps` its steps with gamma > 0.

    `temperature`: what its tokens were sampled at, 0.0 for greedy; None when that is not known, or when something else (top-p,
    penalties, a grammar) shaped the target's distribution as well. `cached_tokens`: of its prompt, taken from a prefix cache; None when
    that is not known.
    """

    prompt_tokens: int
    output_tokens: int
    spec_steps: int
    drafted: int
    accepted: int
    version: str  # the draft that served its last step
    temperature: float | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TapTotals:
    """A producer's running totals, in rows (one row = one token's states) since its incarnation began.

    tapped = sent + shed + ring; "in flight" on the consumer's side is ring + (sent - stored - lost).
    """

    tapped: int = 0
    sent: int = 0
    shed: int = 0
    ring: int = 0
    skipped: int = 0  # rows of requests that opted out: never tapped, never stored


@dataclass(frozen=True, slots=True)
class Observation:
    """What an engine reports every `report_interval_s`: its counters since the previous report."""

    engine: str
    incarnation: str
    seq: int
    at_ms: int
    version: str
    running: int
    waiting: int
    steps: tuple[StepCounts, ...]
    requests: tuple[RequestStats, ...]
    tap: TapTotals


# --- drafts ----------------------------------------------------------------------------------------------------------


class DraftOrigin(StrEnum):
    INIT = "init"
    TRAINED = "trained"
    IMPORTED = "imported"


@dataclass(frozen=True, slots=True)
class SamplingScore:
    """What a draft gives on the held-out requests that were sampled at `temperature` (0.0: greedy), if the engine samples rightly.

    By prompt: `steps[i]` drafting steps are expected at the evaluation's gamma, and `accepted[i]` drafted tokens in them.
    `conditional[k]` is the probability that drafted token k is accepted given that all before it were; `likeliest[k]` the same for an
    engine that always drafts the likeliest token, and accepts it with the target's probability of it.
    """

    temperature: float
    steps: tuple[float, ...]
    accepted: tuple[float, ...]
    conditional: tuple[float, ...]
    likeliest: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Acceptance of one draft on held-out requests: what the gate reads.

    `lengths[i]` is request i's acceptance length (bonus token included) at `gamma`, `tokens[i]` the positions it was scored on;
    `conditional[k]` the probability that drafted token k is right given that all before it were. `groups` are hexadecimal.
    """

    version: str
    gamma: int
    groups: tuple[str, ...]
    lengths: tuple[float, ...]
    tokens: tuple[int, ...]
    conditional: tuple[float, ...]
    out_of_vocabulary: float = 0.0  # share of scored tokens that the draft vocabulary lacks
    sampling: tuple[SamplingScore, ...] = ()  # by temperature, where the job asked for it

    @property
    def length(self) -> float:
        """The token-weighted mean acceptance length; 0.0 when nothing was scored."""
        total = sum(self.tokens)
        return sum(value * n for value, n in zip(self.lengths, self.tokens, strict=True)) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Draft:
    """An immutable version in the draft store. `version` is the SHA-256 of its model.safetensors and config.json."""

    version: str
    lineage: str
    number: int  # counts up within the lineage, from 0; for people
    parent: str  # version, or ""
    origin: DraftOrigin
    target: str  # target digest
    vocab_id: str  # digest of its draft vocabulary
    draft_vocab: int
    bytes: int
    created_ms: int
    job: str = ""
    evaluation: Evaluation | None = None
    quarantined: str = ""  # why it must never be deployed again, or ""


# --- jobs and workers ------------------------------------------------------------------------------------------------


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


# --- the self-test ---------------------------------------------------------------------------------------------------


class CheckOutcome(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"  # it could not be made; `measured` says why


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, in words and figures, and what to do about it."""

    name: str
    outcome: CheckOutcome
    measured: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The checks about one part of an installation: `subject` is "redis", "tided", "workers" or "engine NAME"."""

    subject: str
    checks: tuple[Check, ...]


class VerificationState(StrEnum):
    PENDING = "pending"
    VERIFIED = "verified"  # what it taps is what the reference says
    UNVERIFIED = "unverified"  # nothing was found wrong, and not everything could be tested
    MISMATCH = "mismatch"  # it taps something else: no capture, no swap


class VerificationPhase(StrEnum):
    REFERENCE = "reference"  # waits for the target's reference states
    PROBING = "probing"  # probe requests are under way
    LISTENING = "listening"  # cannot be probed: its first real samples will be looked at
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Verification:
    """The self-test of one incarnation of an engine on one target. `attempt` counts rounds of probes."""

    engine: str
    incarnation: str
    target: str
    state: VerificationState
    phase: VerificationPhase
    reason: str
    started_ms: int
    updated_ms: int
    deadline_ms: int = 0  # of the phase; when DONE and not verified: when to try again, 0 for never
    attempt: int = 0
    referenced: bool = False  # whether reference states were at hand
    draft: str = ""  # the version that served when it was probed
    accepted: bool = False  # whether enough was accepted to tell that this version serves
    doubted: bool = False  # what it taps is in question again, though it has passed
    checks: tuple[Check, ...] = ()


# --- deployments, policy, events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServedSums:
    """Finished requests that drafted: sums over them of their drafting request-steps and of the drafted tokens accepted in these.

    `squares`: the sums of both squared, and of their product; the spread between requests follows from them.
    """

    requests: float = 0.0
    steps: float = 0.0
    accepted: float = 0.0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, steps: float, accepted: float) -> "ServedSums":
        """One request."""
        return cls(1.0, steps, accepted, (steps * steps, accepted * accepted, steps * accepted))

    def plus(self, other: "ServedSums", keep: float = 1.0) -> "ServedSums":
        """These, each request at the weight `keep`, and the others."""
        return ServedSums(
            keep * self.requests + other.requests,
            keep * self.steps + other.steps,
            keep * self.accepted + other.accepted,
            tuple(keep * keep * a + b for a, b in zip(self.squares, other.squares, strict=True)),  # pyright: ignore[reportArgumentType]
        )

    @property
    def length(self) -> float:
        """Mean acceptance length, bonus token included; 0.0 before the first step."""
        return 1.0 + self.accepted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class WatchPeer:
    """Another engine of the target, for what the traffic does meanwhile: its acceptance length with the version that it serves before a
    watch began, that figure's standard error, and what it served of the same version since."""

    engine: str
    version: str
    length: float
    error: float
    served: ServedSums = field(default_factory=ServedSums)


class DeploymentState(StrEnum):
    PENDING = "pending"
    SWAPPING = "swapping"
    WATCHING = "watching"
    LIVE = "live"
    RESTORING = "restoring"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (DeploymentState.LIVE, DeploymentState.ROLLED_BACK, DeploymentState.FAILED)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One version on its way onto one engine."""

    id: str
    engine: str
    version: str
    previous: str
    state: DeploymentState
    epoch: int
    created_ms: int
    updated_ms: int
    reason: str  # "gate", "pool", "shared", "operator", "rollback"
    command: str = ""  # id of the swap or restore command in flight
    deadline_ms: int = 0
    watched: ServedSums = field(default_factory=ServedSums)  # since the swap
    baseline_length: float = 0.0  # acceptance length that the incumbent had, for the live watch
    baseline_error: float = 0.0  # its standard error
    peers: tuple[WatchPeer, ...] = ()
    error: str = ""
    swap_s: float = 0.0
    proven: bool = False  # it has served well before, in other traffic: to be worse here is no blame
    trial: bool = False  # other engines wait for what this watch finds: it is the longer one
    withdrawn: bool = False  # it ended for a reason that says nothing about the version: another engine may try it


class CanaryState(StrEnum):
    CHOOSING = "choosing"
    WATCHING = "watching"
    PASSED = "passed"
    FAILED = "failed"
    WITHDRAWN = "withdrawn"  # nothing was found out about the version

    @property
    def final(self) -> bool:
        return self in (CanaryState.PASSED, CanaryState.FAILED, CanaryState.WITHDRAWN)


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that passed the gate, and the one engine of its target on which it has to prove itself before the others get it.

    `target`: its name. `incumbent`: the version that it was compared with. `deployment`: that onto `engine`. `tried`: engines that it
    was on, and that gave no answer. `absent_ms`: since when `engine` is not in order, 0 while it is. `alone`: there is no other engine
    to protect.
    """

    target: str
    version: str
    incumbent: str
    job: str
    state: CanaryState
    started_ms: int
    updated_ms: int
    deadline_ms: int  # of the choice of an engine
    engine: str = ""
    deployment: str = ""
    tried: tuple[str, ...] = ()
    absent_ms: int = 0
    alone: bool = False
    reason: str = ""


class SpeculationMode(StrEnum):
    AUTO = "auto"
    OFF = "off"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class PolicySetting:
    """What the operator set: auto, off, or a fixed number of drafted tokens."""

    mode: SpeculationMode = SpeculationMode.AUTO
    gamma: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, past tense, for `tidectl events` and the audit log. `data` is plain and small."""

    kind: str
    at_ms: int
    subject: str  # engine, job, version or worker
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    id: str = ""
