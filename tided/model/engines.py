"""What engines say of themselves, and what they count: frozen records without IO, as its neighbours. `tided.model.codec` turns them
into plain data.

Times named `*_ms` are Redis TIME in milliseconds since the epoch; durations are `*_s`. A `version` is always a draft's content
digest; an `epoch` is always the fencing number of the leader.
"""

from dataclasses import dataclass
from enum import StrEnum


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
