"""Drafts, and what they scored."""

from dataclasses import dataclass
from enum import StrEnum


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
