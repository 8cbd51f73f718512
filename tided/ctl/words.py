"""Records in plain words: what tided is doing and why. Pure functions, no output."""

from collections.abc import Sequence
from itertools import groupby

from tided.model.deployments import Canary, Deployment
from tided.model.jobs import Job, JobState, Needs, Progress, WorkerInfo
from tided.model.policy import PolicySetting, SpeculationMode
from tided.model.status import EngineStatus, LaunchStatus, SampleTotals, Status, TrainingStatus
from tided.model.verification import Verification


def duration(seconds: float) -> str:
    """ "8 s", "3 min 20 s", "2 h 5 min", "4 d 2 h": two units at most."""
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    for unit, size, small, part in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        if left < size * (60 if unit == "min" else 24) or unit == "d":
            whole, rest = divmod(left, size)
            return f"{whole} {unit} {rest // part} {small}" if rest // part else f"{whole} {unit}"
    raise AssertionError(seconds)


def size(in_bytes: float) -> str:
    """Bytes in powers of 1,024."""
    value = float(in_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def short(version: str) -> str:
    """A version's head: enough to name it to tidectl."""
    return version[:12] if version else "-"


def count(things: int, name: str) -> str:
    return f"{things:,} {name}" + ("" if things == 1 else "s")


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def gammas(values: Sequence[int]) -> str:
    """Drafted tokens by batch size: "3 tokens at batch 1-2, off above"."""
    runs: list[tuple[int, int, int]] = []
    first = 1
    for gamma, group in groupby(values):
        length = len(list(group))
        runs.append((gamma, first, first + length - 1))
        first += length
    if not runs or (len(runs) == 1 and runs[0][0] == 0):
        return "off"
    if len(runs) == 1:
        return f"{_tokens(runs[0][0])} at every batch size"
    parts = [f"{_tokens(gamma)} at batch {low}" + (f"-{high}" if high > low else "") for gamma, low, high in runs[:-1]]
    return ", ".join([*parts, f"{_tokens(runs[-1][0])} above"])


def _tokens(gamma: int) -> str:
    return count(gamma, "token") if gamma else "off"


def speculation(engine: EngineStatus) -> str:
    """ "speculating with 3 tokens at batch 1-2, off above: predicted 1.31x at batch 1"."""
    schedule = gammas(engine.info.gammas)
    if schedule == "off":
        return "not speculating"
    text = f"speculating with {schedule}"
    best = max(enumerate(engine.speculation.predicted, 1), key=lambda item: item[1], default=None)
    # A schedule that an operator set, or that probes, promises nothing.
    return f"{text}: predicted {best[1]:.2f}x at batch {best[0]}" if best is not None and best[1] > 1.0 else text


def verification(item: Verification) -> str:
    """ "verified: what it taps is what the reference says"."""
    return f"{item.state}: {item.reason}" if item.reason else item.state.value


def deployment(item: Deployment) -> str:
    """ "watching b2b2b2b2b2b2, 12 requests so far: acceptance length 2.21, 1.98 before"."""
    text = f"{item.state} {short(item.version)}" + (", other engines wait for it" if item.trial else "")
    if not item.watched.requests:
        return text
    before = f", {number(item.baseline_length)} before" if item.baseline_length else ""
    return (
        f"{text}, {count(round(item.watched.requests), 'request')} so far: "
        f"acceptance length {number(item.watched.length)}{before}"
    )


def canary(item: Canary) -> str:
    """ "smollm2: b2b2b2b2b2b2 is watched on a; the others wait"."""
    where = f"is watched on {item.engine}" if item.engine else "waits for an engine"
    lost = f", {' and '.join(item.tried)} said nothing about it" if item.tried else ""
    return f"{item.target}: {short(item.version)} {where}" + ("" if item.alone else "; the others wait") + lost


def training(status: TrainingStatus) -> str:
    """ "collecting, 12,000 of 20,000 rows; 1 drift, 2 trainings so far"."""
    return (
        f"{status.state}, {status.rows:,} of {status.rows_needed:,} rows; "
        f"{count(status.drifts, 'drift')}, {count(status.trainings, 'training')} so far"
    )


def training_reason(status: TrainingStatus) -> str:
    """Why, where the line above does not say it already."""
    return status.reason.removeprefix(f"{status.rows} of {status.rows_needed} rows").removeprefix(", ")


def samples(totals: SampleTotals) -> str:
    """The sum that must hold, and what is beside it when there is something."""
    parts = [f"{totals.stored:,} stored", f"{totals.shed:,} shed", f"{totals.lost:,} lost"]
    for name, rows in (("unknown", totals.unknown), ("purged", totals.purged)):
        if rows:
            parts.append(f"{rows:,} {name}")
    text = f"{totals.tapped:,} tapped = {' + '.join(parts)} + {totals.in_flight:,} in flight"
    beside = {"duplicated": totals.duplicated, "opted out": totals.skipped}
    extra = ", ".join(f"{rows:,} {name}" for name, rows in beside.items() if rows)
    return f"{text} ({extra})" if extra else text


def policy(setting: PolicySetting) -> str:
    if setting.mode is SpeculationMode.FIXED:
        return f"gamma={setting.gamma} (set by an operator)"
    return "off (set by an operator)" if setting.mode is SpeculationMode.OFF else "auto"


def headline(status: Status) -> str:
    """One sentence about the daemon itself."""
    about = f"{status.name} {status.program}"
    up = f"up {duration(status.uptime_s)}"
    if status.redis != "connected":
        return f"{about} is degraded, {up}: {status.redis}"
    role = f"leads (epoch {status.epoch})" if status.leader else "stands by, another one leads"
    return f"{about} {role}, {up}, Redis connected"


def doing(worker: WorkerInfo) -> str:
    """ "idle", "job-1", "job-1, draining", "cordoned"."""
    mark = "draining" if worker.draining else "cordoned" if worker.cordoned else ""
    return ", ".join(part for part in (worker.job, mark) if part) or "idle"


def launch(item: LaunchStatus) -> str:
    """ "launched-1.4: pending: it waits for devices"."""
    return f"{item.id}: {item.state}" + (f": {item.message}" if item.message else "")


def measured(progress: Progress) -> str:
    """ "loss 2.31, length 1.92, 1,240 tokens/s": what a running attempt has measured so far."""
    parts = (
        f"loss {progress.loss:.2f}" if progress.loss is not None else "",
        f"length {progress.accept_length:.2f}" if progress.accept_length is not None else "",
        f"{progress.tokens_per_s:,.0f} tokens/s" if progress.tokens_per_s is not None else "",
    )
    return ", ".join(part for part in parts if part)


def needs(item: Needs) -> str:
    """ "2 x cuda, 80.0 GiB each"; "" for what any worker has."""
    devices = f"{item.devices} x {item.device or 'any device'}" if item.devices > 1 else item.device
    memory = f"{size(item.memory_bytes)} each" if item.memory_bytes else ""
    return ", ".join(part for part in (devices, memory) if part)


def job_progress(job: Job) -> str:
    """ "43%, 1 min 20 s left: training"."""
    if job.state is JobState.QUEUED:
        return "waiting for a worker" if job.attempt == 0 else f"waiting for attempt {job.attempt + 1}"
    if job.state is JobState.RUNNING:
        if job.cancelling:
            return "being cancelled"
        if job.progress is None:
            return "started"
        eta = f", {duration(job.progress.eta_s)} left" if job.progress.eta_s >= 0 else ""
        figures = measured(job.progress)
        return f"{job.progress.fraction:.0%}{eta}: {job.progress.note}{f' ({figures})' if figures else ''}"
    if job.error:
        return job.error
    if job.result is not None and job.result.candidate is not None:
        old = job.result.incumbent
        before = f"{old.length:.2f} -> " if old is not None else ""
        return f"acceptance length {before}{job.result.candidate.length:.2f}"
    return ""
