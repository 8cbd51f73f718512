"""The sizes of the bench of heterogeneous allocation, and what its predictions take from earlier reports."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.study import Parts, plan_digest

WHOLE, QUARTER = "whole", "quarter"
SPINNERS = {WHOLE: 0, QUARTER: 3}
"""By pair: processes that keep the second core busy. With three of equal weight beside it, a process has a quarter of a core."""
CALIBRATE, BEFORE, TIDED, AFTER = "calibrate", "before", "tided", "after"
PARTS = (CALIBRATE, BEFORE, TIDED, AFTER)


PREDICTED_BY = ("lengths", "trained_per_s", "job_s")
"""What of a plan only its predictions take."""


@dataclass(frozen=True)
class Plan:
    """Everything that the figures depend on.

    `concurrency` requests are in flight at each engine: 1, because the published rates are of devices that serve alone what they are
    given, and at batch size 1 decoding is bound by memory, so that the device which trains is missed most and a draft gains most.
    `calibrate_s`, `all_s`, `run_s`: how long the calibration, each run of two engines, and the run under tided last; together, with the
    starts, at most 20 minutes. Of the training: rows, held-out share, and what the gate asks for are sized by a run of minutes.

    The rest is what predictions take from earlier reports (docs/benchmarks.md). `lengths`: acceptance lengths of drafts of this target on
    code: trained from as many tokens as the run has collected when its first training begins, from twice as many, and between the two
    ("trainer"). `trained_per_s`: tokens that a whole core trains a second, and `job_s` the seconds of a whole core that a job takes
    beside that: start, reading, scores (both "trainer").
    """

    domain: str = "code"
    concurrency: int = 1
    calibrate_s: float = 80.0
    all_s: float = 110.0
    run_s: float = 720.0
    max_tokens: int = 64
    max_context: int = 512
    gamma_max: int = 4
    dtype: str = "bfloat16"
    min_rows: int = 4000
    held_out: float = 0.3
    gate_requests: int = 16
    gate_tokens: int = 600
    budget_s: float = 240.0
    shard_age_s: float = 4.0
    lengths: tuple[float, float, float] = (1.84, 2.03, 2.21)
    trained_per_s: float = 776.0
    job_s: float = 11.0

    @property
    def changes(self) -> Mapping[str, Mapping[str, Any]]:
        """Of tided's configuration, by section."""
        return {
            "training": {"min_rows": self.min_rows, "budget_s": self.budget_s, "cool_down_s": 5.0, "short_window": 24},
            "samples": {"held_out_fraction": self.held_out, "shard_age_s": self.shard_age_s, "shard_rows": 2048},
            "gate": {"min_requests": self.gate_requests, "min_tokens": self.gate_tokens},
            "speculation": {"gamma_max": self.gamma_max},
        }

    @property
    def digest(self) -> str:
        """Identifies the plan in the parts that were run under it, which know nothing of predictions."""
        return plan_digest({name: value for name, value in asdict(self).items() if name not in PREDICTED_BY})


def smoke() -> Plan:
    """A run of the whole harness that shows nothing but that it works."""
    return Plan(
        calibrate_s=2.0,
        all_s=2.0,
        run_s=12.0,
        max_tokens=12,
        max_context=384,
        dtype="float32",
        min_rows=300,
        gate_requests=2,
        gate_tokens=20,
        budget_s=3.0,
        shard_age_s=1.0,
    )


@dataclass(frozen=True)
class Places:
    """Where the bench reads and writes, and its cores: the first one's device serves in every arm."""

    model: Path
    work: Path  # state, logs and raw parts
    report: Path
    cores: tuple[int, int]

    def parts(self, plan: Plan) -> Parts:
        """The raw figures of the plan's parts."""
        return Parts(self.work, plan.digest)


def part_name(pair: str, part: str) -> str:
    """Of a part of a pair, on disk."""
    return f"{pair}-{part}"
