"""What tided tells people about itself: one snapshot, assembled by the control plane, shown by tidectl, /metrics and the demo.

Rates and means are over the monitor's recent window; None where nothing was measured yet. Every `reason` is one plain sentence.
"""

from dataclasses import dataclass

from tided.model.deployments import Canary, Deployment
from tided.model.engines import EngineInfo
from tided.model.jobs import Job, WorkerInfo
from tided.model.launch import LaunchState
from tided.model.policy import PolicySetting
from tided.model.verification import Verification


@dataclass(frozen=True, slots=True)
class SpeculationStatus:
    """What the speculation policy decided last. `gammas` and `predicted` are by batch size: entry b - 1 for batch size b.

    `predicted` is Eq. 5 at that gamma (1.0 where gamma is 0); `alpha` the conditional acceptance probability it used.
    """

    gammas: tuple[int, ...]
    predicted: tuple[float, ...]
    alpha: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen at one batch size. `speedups[g]` is what is predicted at g drafted tokens, over none."""

    batch: int
    gamma: int
    speedups: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The newest decision about an engine's drafted tokens, with the figures that led to it.

    `policy`: its name, or "operator". `gammas` is what was decided, by batch size; while probing it differs from the choices.
    `conditional[k]`: the acceptance of drafted token k given that all before it were accepted.
    """

    engine: str
    policy: str
    running: int
    gammas: tuple[int, ...]
    probing: bool
    reason: str
    alpha: float | None
    conditional: tuple[float, ...]
    choices: tuple[Choice, ...]
    figures: dict[str, float]
    training: str = ""  # what training of this engine's target does or waits for


@dataclass(frozen=True, slots=True)
class TrainingStatus:
    """Algorithm 1 for one engine. `state`: "collecting", "training", "scoring", "deploying", "waiting" or "off"."""

    state: str
    reason: str
    short: float | None  # EMAs of acceptance
    long: float | None
    rows: int  # stored rows that the next training would use
    rows_needed: int
    drifts: int
    trainings: int
    job: str = ""  # id of the job in flight


@dataclass(frozen=True, slots=True)
class DomainStatus:
    """A kind of traffic and the draft that served it last. `length`: the acceptance length that this scored on samples of it; `scored`: on
    those that the pool was last scored on, None if it was not among them. `reserve_rows`: stored rows that are kept to be replayed."""

    number: int
    draft: str  # "lineage@number", or ""
    version: str
    present: bool
    length: float
    scored: float | None
    used_ms: int
    uses: int
    reserve_rows: int


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A target's pool of drafts by domain. `state`: "idle", "sampling", "scoring", "switching" or "off"."""

    target: str
    state: str
    reason: str
    scored_ms: int  # when the pool was last scored; 0: never
    domains: tuple[DomainStatus, ...]


@dataclass(frozen=True, slots=True)
class SampleTotals:
    """Rows of one engine since its incarnation began: tapped = stored + purged + shed + lost + unknown + in_flight.

    Exact when drained. `purged`: discarded by an operator before they were stored.
    """

    tapped: int
    stored: int
    shed: int
    lost: int
    in_flight: int
    duplicated: int
    skipped: int  # of requests that opted out
    unknown: int = 0  # tail of killed producers, at most their ring
    stream_bytes: int = 0  # not acknowledged yet
    dead: int = 0  # entries set aside as poison; their rows are among the lost
    purged: int = 0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    info: EngineInfo
    draft: str  # "lineage@number" of the served version, or ""
    running: int
    waiting: int
    tokens_per_s: float | None
    accept_length: float | None
    speculation: SpeculationStatus
    training: TrainingStatus
    samples: SampleTotals
    deployment: Deployment | None = None  # the newest
    swaps: int = 0
    verification: Verification | None = None  # None: the self-test is off, or has not begun


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """A worker that a scheduler was asked for and that has not ended. `message`: what the scheduler says of it."""

    id: str
    state: LaunchState
    message: str


@dataclass(frozen=True, slots=True)
class LauncherStatus:
    """`kind` of scheduler; `problem`: why it starts no workers now, or ""."""

    kind: str
    problem: str
    launches: tuple[LaunchStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """`problems` is empty when all is well; each entry says what is wrong and what to do."""

    name: str
    program: str  # version of tided
    leader: bool
    epoch: int
    uptime_s: float
    redis: str  # "connected", or why not
    policy: PolicySetting
    engines: tuple[EngineStatus, ...]
    workers: tuple[WorkerInfo, ...]
    active_jobs: tuple[Job, ...]  # queued or running
    drafts: int
    problems: tuple[str, ...] = ()
    pools: tuple[PoolStatus, ...] = ()
    canaries: tuple[Canary, ...] = ()  # the newest of each target
    launcher: LauncherStatus | None = None  # None: there is none, or this tided does not lead
