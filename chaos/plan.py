"""What goes wrong, and when: a sequence that follows from a seed alone, so that it can be had again."""

import random
from dataclasses import dataclass
from enum import StrEnum

DAEMONS = ("tided-a", "tided-b")
ENGINES = ("one", "two")
WORKERS = ("worker-a", "worker-b")
SERVICES = (*DAEMONS, "collector", *WORKERS, *ENGINES)
"""Processes that are started again when they end, each with a way to Valkey of its own."""
VALKEY, TRAINER, EVERYBODY = "valkey", "trainer", "everybody"

FAILPOINTS = {
    "tided": (
        "controller.reconciled",
        "collection.collecting",
        "collection.training",
        "collection.stopped",
        "dispatcher.submitting",
        "dispatcher.submitted",
        "dispatcher.stored",
        "dispatcher.pooled",
        "dispatcher.retired",
        "faults.submitting",
        "scout.submitting",
        "scout.submitted",
        "scout.switching",
        "scout.moved",
        "selftest.reference",
        "selftest.probing",
        "selftest.listening",
        "selftest.done",
        "deployer.sending",
        "deployer.sent",
        "deployer.swapping",
        "deployer.watching",
        "deployer.live",
        "deployer.restoring",
        "deployer.rolled_back",
        "deployer.failed",
        "samples.discarding",
        "canary.begun",
        "canary.placed",
        "canary.promoted",
        "canary.choosing",
        "canary.watching",
        "canary.passed",
        "canary.failed",
        "canary.withdrawn",
    ),
    "collector": (
        "collector.read",
        "collector.admitted",
        "collector.committed",
        "collector.acknowledged",
        "samples.staged",
        "samples.publishing",
    ),
    "worker": ("worker.claimed", "worker.finishing", "worker.finished"),
}
"""Where a process of each role may be told to die."""


class Kind(StrEnum):
    KILL = "kill -9"
    STOP = "SIGSTOP"
    DELAY = "slow network"
    MUTE = "replies lost"
    SWALLOW = "black hole"
    REFUSE = "connections refused"
    CUT = "connections cut"
    FAILPOINT = "failpoint"
    DISK = "disk full"
    TRAIN = "train now"
    DEPLOY = "deploy by hand"


NETWORK = (Kind.DELAY, Kind.MUTE, Kind.SWALLOW, Kind.REFUSE)


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` befalls `victim` at `at_s` of the run, for `seconds`. `detail`: a failpoint, or a draft's number; `delay_s`: of messages."""

    at_s: float
    kind: Kind
    victim: str
    seconds: float = 0.0
    detail: str = ""
    delay_s: float = 0.0


def plan(seed: int, duration_s: float, lease_s: float, pause_s: tuple[float, float] = (2.0, 12.0)) -> list[Fault]:
    """Faults with pauses between them; the last is over at `duration_s`. `lease_s`: stops and black holes last up to twice as long."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    at_s = draw.uniform(*pause_s)
    longest_s = 2.0 * lease_s
    while at_s < duration_s - longest_s:
        faults.append(_one(draw, at_s, lease_s))
        at_s += draw.uniform(*pause_s)
    return faults


def _one(draw: random.Random, at_s: float, lease_s: float) -> Fault:
    kinds = list(Kind)
    kind = draw.choices(kinds, [_WEIGHTS[kind] for kind in kinds])[0]
    long_s = draw.uniform(0.3, 2.0) * lease_s
    match kind:
        case Kind.KILL:
            return Fault(at_s, kind, draw.choice((*SERVICES, VALKEY, TRAINER)))
        case Kind.STOP:
            return Fault(at_s, kind, draw.choice((*SERVICES, VALKEY)), long_s)
        case Kind.FAILPOINT:
            victim = draw.choice((*DAEMONS, "collector", *WORKERS))
            return Fault(at_s, kind, victim, detail=draw.choice(FAILPOINTS[role(victim)]))
        case Kind.DISK:
            return Fault(at_s, kind, "collector", long_s, "samples.staged:error")
        case Kind.TRAIN | Kind.DEPLOY:
            return Fault(at_s, kind, draw.choice(ENGINES), detail=str(draw.randrange(4)))
        case _:
            victim = draw.choice((*SERVICES, EVERYBODY))
            return Fault(at_s, kind, victim, long_s, delay_s=draw.choice((0.01, 0.05, 0.3)))


_WEIGHTS = {
    Kind.KILL: 6,
    Kind.STOP: 4,
    Kind.DELAY: 2,
    Kind.MUTE: 2,
    Kind.SWALLOW: 2,
    Kind.REFUSE: 1,
    Kind.CUT: 1,
    Kind.FAILPOINT: 4,
    Kind.DISK: 1,
    Kind.TRAIN: 2,
    Kind.DEPLOY: 3,
}


def role(victim: str) -> str:
    """Whose failpoints a service has."""
    return victim.partition("-")[0]
