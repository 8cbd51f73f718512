"""When a scheduler (Ray, Slurm) is asked to start a worker, and when that is taken back. The jobs themselves know nothing of it: a worker
that a scheduler starts claims like any other, does one job, and ends.

There are `most` *slots*. A slot has one live launch at a time, whose id is `NAME-SLOT.NUMBER` with the number after the highest that the
scheduler knows for the slot, and its worker has the name `NAME-SLOT`. So whoever decides from the same list asks for the same launch,
which a scheduler refuses the second time: a new leader, or an old one that does not know yet, doubles nothing, and neither has anything
to remember. A worker's directory, registration and cordon are those of its slot, and stay as few as there are slots.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tided.machine.job import backoff_ms
from tided.machine.placement import Capacity, Offer, Waiting, fits
from tided.model.jobs import WorkerInfo
from tided.model.launch import Launch, LaunchState


@dataclass(frozen=True, slots=True)
class Rules:
    """`name` of the slots, `most` of them. `after_ms`: a job that is due for so long gets a worker of its own, though one that is
    registered could do it. `offer`: what a launched worker has."""

    name: str
    most: int
    after_ms: int
    offer: Offer


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen at `now_ms` (Redis TIME). `cordoned`: worker names with an operator's mark, also of workers that are not there."""

    now_ms: int
    waiting: tuple[Waiting, ...] = ()
    workers: tuple[WorkerInfo, ...] = ()
    launches: Mapping[str, Launch] = field(default_factory=dict[str, Launch])
    cordoned: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Launches:
    """What a leader keeps in mind. `judged`: launches whose end it has taken note of; `withdrawn`: those that it has cancelled and that
    live (Ray ends one only when it would begin); `failures` in a row, the newest at `failed_ms` for `reason`. A new leader begins without:
    it waits once more after a failure, and cancels once more."""

    judged: frozenset[str] = frozenset()
    withdrawn: frozenset[str] = frozenset()
    failures: int = 0
    failed_ms: int = 0
    reason: str = ""


# --- actions ---


@dataclass(frozen=True, slots=True)
class Submit:
    id: str
    worker: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nothing waits for it any more, and it has not begun."""

    id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """It has ended, and a newer one of its slot is there."""

    id: str


@dataclass(frozen=True, slots=True)
class Tell:
    """A launch failed."""

    id: str
    reason: str


LaunchAction = Submit | Cancel | Forget | Tell


def worker_name(name: str, slot: int) -> str:
    return f"{name}-{slot}"


def launch_id(name: str, slot: int, number: int) -> str:
    return f"{worker_name(name, slot)}.{number}"


def own(name: str, launches: Mapping[str, Launch]) -> dict[int, dict[int, Launch]]:
    """The launches of this name, by slot and number. What others have at the same scheduler is left alone."""
    found: dict[int, dict[int, Launch]] = {}
    pattern = re.compile(rf"{re.escape(name)}-([1-9]\d*)\.([1-9]\d*)")
    for key, launch in launches.items():
        match = pattern.fullmatch(key)
        if match is not None:
            found.setdefault(int(match[1]), {})[int(match[2])] = launch
    return found


def live(name: str, launches: Mapping[str, Launch]) -> dict[str, Launch]:
    """Those of this name that have not ended, by id."""
    return {
        launch_id(name, slot, number): launch
        for slot, numbers in sorted(own(name, launches).items())
        for number, launch in sorted(numbers.items())
        if launch.state.live
    }


def step(before: Launches, seen: Seen, rules: Rules) -> tuple[Launches, tuple[LaunchAction, ...]]:
    slots = own(rules.name, seen.launches)
    after, told = _judged(before, slots, seen.now_ms, rules.name)
    living = {slot: max(numbers) for slot, numbers in slots.items() if numbers[max(numbers)].state.live}
    ids = {slot: launch_id(rules.name, slot, number) for slot, number in living.items()}
    free = [
        slot
        for slot, number in sorted(living.items())
        if ids[slot] not in before.withdrawn and _is_free(slot, slots[slot][number], seen, rules)
    ]
    due = [job for job in seen.waiting if job.due_ms <= seen.now_ms and fits(job.kind, job.needs, rules.offer)]
    wanted = [job for job in due if _is_wanted(job, seen, rules)]
    actions: list[LaunchAction] = list(told)
    pending = [ids[slot] for slot in reversed(free) if slots[slot][living[slot]].state is LaunchState.PENDING]
    surplus = pending[: max(0, len(free) - len(due))]
    actions += [Cancel(key) for key in surplus]
    after = replace(after, withdrawn=before.withdrawn.intersection(ids.values()).union(surplus))
    if not _rests(after, seen.now_ms):
        missing = max(0, len(wanted) - len(free))
        actions += [_submission(slot, slots, rules) for slot in _open(living, seen, rules)[:missing]]
    for slot, numbers in sorted(slots.items()):
        kept = max(numbers)
        ended = sorted(number for number, launch in numbers.items() if not launch.state.live and number != kept)
        actions += [Forget(launch_id(rules.name, slot, number)) for number in ended]
    return after, tuple(actions)


def refused(before: Launches, now_ms: int, reason: str) -> Launches:
    """The scheduler would not take a launch."""
    return replace(before, failures=before.failures + 1, failed_ms=now_ms, reason=reason)


def waits(seen: Seen, rules: Rules) -> bool:
    """Whether a job is due that wants a launched worker."""
    return any(
        job.due_ms <= seen.now_ms and fits(job.kind, job.needs, rules.offer) and _is_wanted(job, seen, rules)
        for job in seen.waiting
    )


def unfit(seen: Seen, rules: Rules) -> tuple[Waiting, ...]:
    """Jobs that are due and that neither a launched nor a registered worker could do."""
    return tuple(
        job
        for job in seen.waiting
        if job.due_ms <= seen.now_ms and not fits(job.kind, job.needs, rules.offer) and not _is_able(job, seen, rules)
    )


def _judged(
    before: Launches, slots: Mapping[int, Mapping[int, Launch]], now_ms: int, name: str
) -> tuple[Launches, list[LaunchAction]]:
    """Take note of what has ended since, in the order in which it did: a success ends a row of failures."""
    ended: list[tuple[int, int, str, Launch]] = []
    for slot, numbers in slots.items():
        newest = max(numbers)
        if not numbers[newest].state.live:
            ended.append((numbers[newest].ended_ms, slot, launch_id(name, slot, newest), numbers[newest]))
    after = replace(before, judged=frozenset(key for _, _, key, _ in ended))
    told: list[LaunchAction] = []
    for _, _, key, launch in sorted(ended, key=lambda item: item[:3]):
        if key in before.judged:
            continue
        if launch.state is LaunchState.FAILED:
            after = refused(after, now_ms, launch.message)
            told.append(Tell(key, launch.message))
        elif launch.state is LaunchState.SUCCEEDED:
            after = replace(after, failures=0, failed_ms=0, reason="")
    return after, told


def _rests(state: Launches, now_ms: int) -> bool:
    return state.failures > 0 and now_ms < state.failed_ms + backoff_ms(state.failures)


def _is_free(slot: int, launch: Launch, seen: Seen, rules: Rules) -> bool:
    """Whether the launch will take a job: it has not begun, or its worker has none yet."""
    name = worker_name(rules.name, slot)
    if launch.state is LaunchState.PENDING:
        return name not in seen.cordoned
    worker = next((worker for worker in seen.workers if worker.worker == name), None)
    return name not in seen.cordoned and (worker is None or not (worker.job or worker.draining))


def _is_wanted(job: Waiting, seen: Seen, rules: Rules) -> bool:
    return seen.now_ms >= job.due_ms + rules.after_ms or not _is_able(job, seen, rules)


def _is_able(job: Waiting, seen: Seen, rules: Rules) -> bool:
    """Whether a worker that nobody here launched could do the job, now or when it has done another."""
    slot = re.compile(rf"{re.escape(rules.name)}-[1-9]\d*")
    return any(
        fits(job.kind, job.needs, _offer(worker))
        for worker in seen.workers
        if not (worker.cordoned or worker.draining or slot.fullmatch(worker.worker))
    )


def _offer(worker: WorkerInfo) -> Offer:
    has = Capacity(worker.device.partition(":")[0], worker.devices, worker.memory_bytes, worker.rate)
    return Offer(worker.kinds, has)


def _open(live: Mapping[int, int], seen: Seen, rules: Rules) -> list[int]:
    """Slots that can take a launch. No more than `most` launches live, whatever was configured before."""
    slots = [
        slot
        for slot in range(1, rules.most + 1)
        if slot not in live and worker_name(rules.name, slot) not in seen.cordoned
    ]
    return slots[: max(0, rules.most - len(live))]


def _submission(slot: int, slots: Mapping[int, Mapping[int, Launch]], rules: Rules) -> Submit:
    number = max(slots.get(slot, {0: None})) + 1
    return Submit(launch_id(rules.name, slot, number), worker_name(rules.name, slot))
