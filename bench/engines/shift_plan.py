"""The sizes of the study of shifting traffic on real servers. One plan, one report: a part that another plan ran is not reused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.study import plan_digest

NONE, STATIC, OWN, TIDED = "none", "static", "own", "tided"
ARMS = (NONE, STATIC, OWN, TIDED)


@dataclass(frozen=True)
class Part:
    """A stretch of one domain's traffic: adaptation traffic for `adapt_s` (`adapt_late_s` in the last third), then a block in which
    every arm has its turn, and so on for `seconds`."""

    name: str
    domain: str
    seconds: float
    arms: tuple[str, ...]
    adapt_s: float
    adapt_late_s: float


@dataclass(frozen=True)
class Plan:
    """Everything that the figures depend on. `turns`: prompts of one turn by its concurrency; `gamma`: drafted tokens whatever the
    figures say, or None for the policy's choice."""

    kind: str = "vllm"

    parts: tuple[Part, ...] = (
        Part("learn", "code", 540, (NONE, TIDED), 45.0, 15.0),
        Part("settled", "code", 420, ARMS, 8.0, 8.0),
        Part("drift", "french", 900, ARMS, 45.0, 10.0),
    )
    turns: Mapping[int, int] = field(default_factory=lambda: {1: 3, 8: 16, 16: 32})
    adapt_concurrency: int = 8
    gamma_max: int = 4
    gamma: int | None = None
    dtype: str = "bfloat16"
    max_tokens: int = 64
    max_batch: int = 16
    max_context: int = 512
    options: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    changes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "training": {"min_rows": 8000, "budget_s": 120.0, "cool_down_s": 5.0, "short_window": 24},
            "samples": {"held_out_fraction": 0.35, "shard_age_s": 4.0, "shard_rows": 2048},
        }
    )

    @property
    def digest(self) -> str:
        """Identifies the plan in the parts that were run under it."""
        return plan_digest(asdict(self))


def sglang() -> Plan:
    """SGLang with stand-in CPU kernels: acceptance and swaps. Its speed means nothing: no arm without speculation, and always drafting."""
    return Plan(
        kind="sglang",
        parts=(
            Part("learn", "code", 240, (TIDED,), 45.0, 20.0),
            Part("drift", "french", 300, (STATIC, TIDED), 45.0, 20.0),
        ),
        turns={1: 1, 8: 8},
        gamma_max=3,
        gamma=3,
        dtype="float32",
        max_batch=8,
        max_tokens=48,
        options={"--enable-metrics": ""},
        changes={
            "training": {"min_rows": 2000, "budget_s": 60.0, "cool_down_s": 5.0, "short_window": 24},
            "samples": {"held_out_fraction": 0.35, "shard_age_s": 4.0, "shard_rows": 512},
            "gate": {"min_requests": 15, "min_tokens": 500},
        },
    )


def smoke() -> Plan:
    """A run of the whole harness that shows nothing but that it works."""
    return Plan(
        parts=(
            Part("learn", "code", 60, (NONE, TIDED), 20.0, 5.0),
            Part("settled", "code", 20, ARMS, 2.0, 2.0),
            Part("drift", "french", 20, ARMS, 2.0, 2.0),
        ),
        turns={1: 1, 4: 4},
        max_tokens=24,
        options={"--enforce-eager": ""},
        changes={
            "training": {"min_rows": 1500, "budget_s": 10.0, "cool_down_s": 1.0},
            "samples": {"held_out_fraction": 0.35, "shard_age_s": 1.0, "shard_rows": 512},
            "gate": {"min_requests": 3, "min_tokens": 60},
        },
    )


PLANS = {"vllm": Plan, "sglang": sglang, "smoke": smoke}
