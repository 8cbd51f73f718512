"""The sizes of the study of recurring domains on a real server. One plan, one report: a part that another plan ran is not reused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.engines import shift_plan
from bench.study import plan_digest

POOL, RETRAIN = "pool", "retrain"
ARMS = (POOL, RETRAIN)
GAMMA = 3


@dataclass(frozen=True)
class Phase:
    """A stretch of one domain's traffic, which follows on the one before without a pause."""

    domain: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything that the figures depend on. `server`: how the server and its tided are started, as in the study of shifting traffic.

    `changes`: what an arm's configuration has beside that: RETRAIN has no pool and replays nothing, as the paper's TIDE.
    """

    server: shift_plan.Plan
    arms: Mapping[str, tuple[Phase, ...]]
    concurrency: int = 8
    changes: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(
        default_factory=lambda: {POOL: {}, RETRAIN: {"pool": {"enabled": False}, "training": {"replay_fraction": 0.0}}}
    )

    @property
    def digest(self) -> str:
        """Identifies the plan in the parts that were run under it."""
        return plan_digest(asdict(self))

    def started(self, arm: str) -> shift_plan.Plan:
        """How the server of one arm is started."""
        changes = {name: dict(section) for name, section in self.server.changes.items()}
        for name, section in self.changes[arm].items():
            changes.setdefault(name, {}).update(section)
        return replace(self.server, changes=changes)


def full() -> Plan:
    """The study. An arm is a part of less than 20 minutes; in it trainings are short, so that a domain's first phase holds a few."""
    changes: dict[str, Mapping[str, Any]] = {
        "training": {"min_rows": 5000, "budget_s": 60.0, "cool_down_s": 5.0, "short_window": 24},
        "samples": {"held_out_fraction": 0.35, "shard_age_s": 2.0, "shard_rows": 2048},
    }
    return Plan(
        replace(shift_plan.Plan(), parts=(), turns={8: 16}, gamma_max=GAMMA, gamma=GAMMA, changes=changes),
        {
            POOL: (Phase("code", 330), Phase("french", 360), Phase("code", 120), Phase("french", 120)),
            RETRAIN: (Phase("code", 330), Phase("french", 360), Phase("code", 210)),
        },
    )


def smoke() -> Plan:
    """A run of the whole harness that shows nothing but that it works."""
    return Plan(
        replace(shift_plan.smoke(), parts=(), turns={4: 4}, gamma_max=GAMMA, gamma=GAMMA),
        {
            POOL: (Phase("code", 50), Phase("french", 50), Phase("code", 40), Phase("french", 30)),
            RETRAIN: (Phase("code", 30), Phase("french", 30), Phase("code", 30)),
        },
        concurrency=4,
    )
