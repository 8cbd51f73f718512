"""What tidectl shows: rich tables that stay readable at 80 columns. Imported only by the commands that show one."""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tided.ctl import words
from tided.model.deployments import Canary, Deployment
from tided.model.drafts import Draft
from tided.model.engines import EngineInfo
from tided.model.events import Event
from tided.model.jobs import Job, JobState, WorkerInfo
from tided.model.status import EngineStatus, Explanation, PoolStatus, Status

LABEL_WIDTH = 11


def plain(data: Any) -> None:
    """The API's answer as it came."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def json_line(data: Any) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    _console().print(Text(text))


def status(snapshot: Status) -> None:
    console = _console()
    console.print(Text(words.headline(snapshot), style="bold"))
    console.print(Text(f"policy {words.policy(snapshot.policy)}; {words.count(snapshot.drafts, 'draft')} stored"))
    for engine in snapshot.engines:
        console.print()
        _engine(console, engine)
    if not snapshot.engines:
        console.print(Text("\nno engine is connected: start tide-engine with the same redis.url"))
    console.print()
    for worker in snapshot.workers:
        _line(console, "worker", f"{worker.worker}: {words.doing(worker)}")
    launcher = snapshot.launcher
    for launch in launcher.launches if launcher is not None else ():
        _line(console, "launch", words.launch(launch))
    if not snapshot.workers and launcher is None:
        _line(console, "worker", "none is connected: nothing can be trained")
    elif not snapshot.workers and launcher is not None:
        _line(console, "worker", f"none is connected: one is asked of {launcher.kind} when a job waits")
    for job in snapshot.active_jobs:
        _line(console, "job", f"{job.spec.kind} {job.id}: {words.job_progress(job)}")
    for canary in snapshot.canaries:
        if not canary.state.final:
            _line(console, "canary", words.canary(canary))
    for text in snapshot.problems:
        _line(console, "PROBLEM", text, "bold red")


def _engine(console: Console, engine: EngineStatus) -> None:
    info = engine.info
    console.print(
        Text(f"engine {info.engine}: {info.kind}, {info.target.name}" + (f", {info.url}" if info.url else ""))
    )
    rate = "-" if engine.tokens_per_s is None else f"{engine.tokens_per_s:.1f}"
    _line(console, "  serving", f"{engine.running} running, {engine.waiting} waiting, {rate} tokens/s")
    _line(console, "  drafting", words.speculation(engine))
    _line(console, "", engine.speculation.reason)
    accepted = f"acceptance length {words.number(engine.accept_length)}, alpha {words.number(engine.speculation.alpha)}"
    _line(console, "  draft", f"{engine.draft or 'none'} ({words.short(info.version)}), {accepted}")
    if engine.deployment is not None and not engine.deployment.state.final:
        _line(console, "  swap", words.deployment(engine.deployment))
    if engine.verification is not None:
        _line(console, "  tested", words.verification(engine.verification))
    _line(console, "  training", words.training(engine.training))
    _line(console, "", words.training_reason(engine.training))
    _line(console, "  samples", words.samples(engine.samples))


def _line(console: Console, label: str, text: str, style: str = "") -> None:
    """A label and text that wraps under itself."""
    if not text:
        return
    grid = Table.grid(padding=(0, 0))
    grid.add_column(width=LABEL_WIDTH)
    grid.add_column()
    grid.add_row(Text(label, style=style), Text(text, style=style))
    console.print(grid)


def engines(items: Sequence[EngineStatus]) -> None:
    table = _table("ENGINE", "KIND", "DRAFT", ">RUN", ">WAIT", ">TOK/S", ">LENGTH", "TESTED", "DRAFTING")
    for item in items:
        info = item.info
        cells = (info.engine, info.kind, item.draft or words.short(info.version), str(item.running), str(item.waiting))
        tested = item.verification.state.value if item.verification is not None else "-"
        rates = (words.number(item.tokens_per_s, 1), words.number(item.accept_length))
        table.add_row(*cells, *rates, tested, words.gammas(info.gammas))
    _show(table, items, "no engine is connected")


def drafts(items: Sequence[Draft], served: Sequence[EngineInfo], canaries: Sequence[Canary] = ()) -> None:
    """Newest last. `served` marks what engines serve now, `canaries` what has to prove itself."""
    table = _table("DRAFT", "VERSION", "ORIGIN", ">LENGTH", ">SIZE", ">AGE", "STATE")
    by_version: dict[str, list[str]] = {}
    for info in served:
        by_version.setdefault(info.version, []).append(info.engine)
    on_trial = {canary.version: canary.engine for canary in canaries if canary.engine and not canary.state.final}
    for item in sorted(items, key=lambda draft: (draft.created_ms, draft.number)):
        length = words.number(item.evaluation.length if item.evaluation else None)
        state = f"quarantined: {item.quarantined}" if item.quarantined else ""
        if item.version in by_version:
            state = "served by " + ", ".join(by_version[item.version])
        if item.version in on_trial:
            state = f"canary on {on_trial[item.version]}"
        name = f"{item.lineage}@{item.number}"
        table.add_row(
            name, words.short(item.version), item.origin, length, words.size(item.bytes), _age(item.created_ms), state
        )
    _show(table, items, "no draft is stored: tidectl drafts init TARGET_DIR makes the first")


def draft(item: Draft) -> None:
    rows = {
        "draft": f"{item.lineage}@{item.number}",
        "version": item.version,
        "parent": item.parent or "-",
        "origin": f"{item.origin}" + (f", job {item.job}" if item.job else ""),
        "target": item.target,
        "vocabulary": f"{item.draft_vocab:,} tokens ({words.short(item.vocab_id)})",
        "size": words.size(item.bytes),
        "created": _clock(item.created_ms),
    }
    if item.evaluation is not None:
        evaluation = item.evaluation
        rows["length"] = (
            f"{evaluation.length:.3f} at gamma {evaluation.gamma}, {len(evaluation.lengths)} held-out requests"
        )
        rows["by step"] = ", ".join(f"{value:.3f}" for value in evaluation.conditional) + " (conditional acceptance)"
        rows["outside"] = f"{evaluation.out_of_vocabulary:.1%} of tokens are not in the draft vocabulary"
    if item.quarantined:
        rows["quarantined"] = item.quarantined
    _facts(rows)


def explanations(items: Sequence[Explanation]) -> None:
    """Each decision: what was decided, why, what was looked at, and the predicted speedups at some batch sizes."""
    if not items:
        say("nothing was decided yet: no engine is connected, or this tided does not lead")
    console = _console()
    for item in items:
        console.print(Text(f"engine {item.engine}: {item.policy}, {item.running} running", style="bold"))
        _line(console, "  drafting", words.gammas(item.gammas) + (" (probing)" if item.probing else ""))
        _line(console, "", item.reason)
        positions = ", ".join(words.number(value, 3) for value in item.conditional) or "-"
        _line(console, "  alpha", f"{words.number(item.alpha)}; by position {positions}")
        figures = _table("  FIGURE", ">VALUE")
        for name, value in item.figures.items():
            figures.add_row(f"  {name}", f"{value:.4g}")
        console.print(figures)
        most = max((len(choice.speedups) for choice in item.choices), default=0)
        speedups = _table("  BATCH", *(f">GAMMA {gamma}" for gamma in range(most)))
        for choice in item.choices:
            if choice.batch.bit_count() == 1 or choice.batch in (item.running, len(item.choices)):
                marks = ("*" if gamma == choice.gamma else " " for gamma in range(most))
                cells = (f"{value:.2f}{mark}" for value, mark in zip(choice.speedups, marks, strict=False))
                speedups.add_row(f"  {choice.batch}", *cells)
        if most:
            console.print(speedups)
            _line(console, "", "predicted speedup over no speculation; * is chosen")
        if item.training:
            _line(console, "  training", item.training)


def jobs(items: Sequence[Job]) -> None:
    table = _table("JOB", "KIND", "STATE", ">TOOK", "NOTE")
    for item in items:
        table.add_row(item.id, item.spec.kind, item.state, _took(item), words.job_progress(item))
    _show(table, items, "no job is known")


def job(item: Job) -> None:
    rows = {
        "job": item.id,
        "kind": f"{item.spec.kind}" + (f" ({item.spec.recipe})" if item.spec.lineage else ""),
        "state": f"{item.state}" + (f", {words.job_progress(item)}" if words.job_progress(item) else ""),
        "engine": item.spec.engine,
        "draft": words.short(item.spec.draft),
        "attempt": f"{item.attempt} of at most {item.max_attempts}" + (f", on {item.worker}" if item.worker else ""),
        "samples": f"{len(item.spec.shards)} shards, {len(item.spec.replay)} to replay, {len(item.spec.held_out)} held out",
        "created": _clock(item.created_ms),
        "took": _took(item),
    }
    if item.progress is not None and item.state is JobState.RUNNING:
        rows["progress"] = words.measured(item.progress) or "nothing measured yet"
    if item.spec.priority:
        rows["priority"] = str(item.spec.priority)
    if needed := words.needs(item.spec.needs):
        rows["needs"] = needed
    if item.result is not None:
        rows["trained"] = f"{item.result.trained_tokens:,} tokens in {words.duration(item.result.seconds)}"
        rows["version"] = words.short(item.result.version)
    _facts(rows)


def workers(items: Sequence[WorkerInfo]) -> None:
    table = _table("WORKER", "HOST", "KINDS", "DEVICE", ">MEMORY", ">TOK/S", "DOING")
    for item in items:
        device = f"{item.devices} x {item.device}" if item.devices > 1 else item.device
        memory = words.size(item.memory_bytes) if item.memory_bytes else "-"
        rate = f"{item.rate:,.0f}" if item.rate else "-"
        table.add_row(item.worker, item.host, ", ".join(item.kinds), device, memory, rate, words.doing(item))
    _show(table, items, "no worker is connected")


def pools(items: Sequence[PoolStatus]) -> None:
    if not items:
        say("no target is configured, or none can be read")
    console = _console()
    for item in items:
        console.print(Text(f"{item.target}: {item.state}: {item.reason}", style="bold"))
        if item.scored_ms:
            console.print(Text(f"scored {_age(item.scored_ms)} ago"))
        if not item.domains:
            continue
        table = _table("DOMAIN", "DRAFT", "VERSION", ">LENGTH", ">SCORED", ">USES", ">LAST USED", ">RESERVE")
        for domain in item.domains:
            table.add_row(
                f"{domain.number}{'*' if domain.present else ''}",
                domain.draft or "-",
                words.short(domain.version),
                words.number(domain.length or None),
                words.number(domain.scored),
                str(domain.uses),
                _age(domain.used_ms),
                f"{domain.reserve_rows:,}",
            )
        console.print(table)


def deployments(items: Sequence[Deployment]) -> None:
    for item in items:
        say(f"{item.engine}: {item.state} {words.short(item.version)} (was {words.short(item.previous)}), {item.id}")


def event(item: Event) -> None:
    _console().print(Text(f"{_clock(item.at_ms)}  {item.kind:<20} {item.subject}  {item.message}"), soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False)


def _table(*headers: str) -> Table:
    """A table without lines; a header that starts with ">" is aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        right = header.startswith(">")
        table.add_column(header.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _show(table: Table, items: Sequence[object], nothing: str) -> None:
    _console().print(table if items else Text(nothing))


def _facts(rows: dict[str, str]) -> None:
    console = _console()
    for label, text in rows.items():
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=LABEL_WIDTH)
        grid.add_column(overflow="fold")
        grid.add_row(label, Text(text))
        console.print(grid)


def _took(item: Job) -> str:
    if not item.started_ms:
        return "-"
    end_ms = item.finished_ms or time.time() * 1000
    return words.duration((end_ms - item.started_ms) / 1000)


def _age(at_ms: int) -> str:
    return words.duration(time.time() - at_ms / 1000)


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")
