"""The sizes of the study of shifting traffic. One plan, one report: a part that was run under another plan is not reused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.study import Parts, plan_digest

ARMS = ("none", "static", "tided")


@dataclass(frozen=True)
class Phase:
    """A stretch of one domain's traffic."""

    name: str
    domain: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything that the study's figures depend on.

    In each phase adaptation traffic (`concurrency`, training prompts, tided's engine only) runs for `adapt_s`, in the last third of
    the phase for `adapt_late_s`; then a block of `block` (`block_late`) measurement prompts goes to every arm in turn, at
    concurrency 1. What is collected, trained and measured was sized by what one core generates, and the other trains, a minute.
    """

    phases: tuple[Phase, ...] = (
        Phase("1", "code", 540),
        Phase("2", "french", 620),
        Phase("3", "code", 280),
    )
    concurrency: int = 8
    block: int = 3
    block_late: int = 5
    adapt_s: float = 45.0
    adapt_late_s: float = 10.0
    gamma_max: int = 4
    dtype: str = "bfloat16"
    max_tokens: int = 64
    max_context: int = 512
    identity_prompts: int = 120
    identity_tokens: int = 48
    changes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "training": {"min_rows": 7000, "budget_s": 120.0, "cool_down_s": 5.0, "short_window": 24},
            "samples": {"held_out_fraction": 0.35, "shard_age_s": 4.0, "shard_rows": 2048},
            "speculation": {"probe_every_s": 10.0},
        }
    )

    @property
    def digest(self) -> str:
        """Identifies the plan in the parts that were run under it."""
        return plan_digest(asdict(self))


def smoke(domains: tuple[str, str], seconds: float) -> Plan:
    """A run of the whole harness that shows nothing but that it works."""
    a, b = domains
    return Plan(
        phases=(Phase("1", a, seconds), Phase("2", b, seconds), Phase("3", a, seconds)),
        block=2,
        block_late=2,
        concurrency=4,
        max_context=384,
        adapt_s=1.0,
        adapt_late_s=1.0,
        max_tokens=12,
        identity_prompts=6,
        identity_tokens=8,
        dtype="float32",
        changes={
            "training": {"min_rows": 300, "budget_s": 3.0, "cool_down_s": 1.0},
            "samples": {"shard_age_s": 1.0, "shard_rows": 256},
            "gate": {"min_requests": 2, "min_tokens": 20},
        },
    )


@dataclass(frozen=True)
class Places:
    """Where the study reads and writes."""

    model: Path
    work: Path  # state, logs and raw parts
    report: Path

    def parts(self, plan: Plan) -> Parts:
        """The raw figures of the plan's parts."""
        return Parts(self.work, plan.digest)
