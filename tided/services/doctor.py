"""Looks over a whole installation, in plain words: what `tidectl doctor` shows. Reads only; nothing here changes anything."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio.to_thread

from tided.model.engines import Capability
from tided.model.errors import Refused, TideError
from tided.model.jobs import JobKind
from tided.model.verification import Check, CheckOutcome, Finding, VerificationState
from tided.services.controller import Controller
from tided.services.monitor import EngineView
from tided.store.client import check_server, shown, translated
from tided.store.ledger import read_ledger

CREDIT_SHARE = 0.9
LEAST_FREE_BYTES = 1 << 30
LAG_S = 10.0
"""A report that is older says that an engine's agent is stuck: it comes at least every 5 s."""

_OK, _FAILED, _SKIPPED = CheckOutcome.OK, CheckOutcome.FAILED, CheckOutcome.SKIPPED


async def look_over(controller: Controller, views: list[EngineView]) -> tuple[Finding, ...]:
    """Every check of Redis, tided, the workers, and these engines. Answers in every condition."""
    context = controller.context
    found = [
        Finding("redis", await _guarded("server", lambda: _redis(controller))),
        Finding("tided", await _guarded("tided", lambda: _tided(controller))),
        Finding("workers", await _guarded("workers", lambda: _workers(controller))),
    ]
    for name, why in context.engines.unreadable.items():
        engine = name.partition("{")[2].partition("}")[0] or name
        check = Check("heartbeat", _FAILED, why, "upgrade that engine's tided: it speaks another version")
        found.append(Finding(f"engine {engine}", (check,)))
    for view in views:
        look = await _guarded("engine", lambda view=view: _engine(controller, view))
        found.append(Finding(f"engine {view.engine}", look))
    return tuple(found)


async def _guarded(what: str, look: Callable[[], Awaitable[list[Check]]]) -> tuple[Check, ...]:
    """What cannot be looked at is a finding too."""
    try:
        return tuple(await look())
    except TideError as exc:
        return (Check(what, _FAILED, str(exc), "see Troubleshooting in docs/operations.md"),)


async def _redis(controller: Controller) -> list[Check]:
    context = controller.context
    checks = [Check("server", _OK, f"{await check_server(context.redis)} at {shown(context.config.redis_url)}")]
    with translated("INFO"):
        memory = await context.redis.info("memory")
        persistence = await context.redis.info("persistence")
    policy = str(memory.get("maxmemory_policy", ""))
    checks.append(
        _check("eviction", policy == "noeviction", f"maxmemory-policy {policy}", "set maxmemory-policy noeviction")
    )
    limit, used = int(memory.get("maxmemory", 0)), int(memory.get("used_memory", 0))
    credit = context.config.capture.credit_bytes * max(1, len(controller.monitor.views))
    if limit:
        checks.append(
            _check(
                "memory",
                limit >= 2 * credit and used < CREDIT_SHARE * limit,
                f"{used / 2**20:.0f} of {limit / 2**20:.0f} MiB used; samples may take {credit / 2**20:.0f} MiB",
                "raise maxmemory to twice the engines' capture.credit_bytes, or lower those",
            )
        )
    else:
        checks.append(Check("memory", _FAILED, "maxmemory is not set", "set it, or Redis takes all there is"))
    aof = bool(int(persistence.get("aof_enabled", 0)))
    written = persistence.get("aof_last_write_status", "ok") == "ok"
    measured = ("written" if written else "failing") if aof else "off"
    advice = "set appendonly yes, or a crash loses samples; look at the disk if writing fails"
    checks.append(_check("append-only file", aof and written, f"append-only file {measured}", advice))
    return checks


async def _tided(controller: Controller) -> list[Check]:
    context = controller.context
    checks: list[Check] = []
    if context.leadership.leads:
        checks.append(Check("leader", _OK, f"this tided leads, epoch {context.leadership.epoch}"))
    else:
        why = context.leadership.problem or "another tided leads; ask that one for the engines' state"
        outcome = _FAILED if context.leadership.problem else _SKIPPED
        checks.append(Check("leader", outcome, why))
    for target in context.targets.values():
        checks.append(Check("target", _OK, f"{target.name}: {target.info.name} ({target.info.digest[:12]})"))
    for why in context.target_problems.values():
        checks.append(Check("target", _FAILED, why, "correct target.path"))
    state_dir, room = context.config.daemon.state_dir, context.config.samples.max_bytes
    free = await anyio.to_thread.run_sync(_free_bytes, state_dir)
    held = await anyio.to_thread.run_sync(context.samples.held_bytes)
    needed = max(0, room - held) + LEAST_FREE_BYTES
    checks.append(
        _check(
            "disk",
            free >= needed,
            f"{free / 2**30:.1f} GiB free in {state_dir}; samples may still take {max(0, room - held) / 2**30:.1f} GiB",
            "free space, or lower samples.max_bytes",
        )
    )
    if context.config.storage.is_shared:
        found, problem = await context.exchange.contents()
        advice = "check storage.url, its credentials, and that they may list, read, write and remove there"
        checks.append(_check("storage", not problem, problem or found, advice))
    return checks


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


async def _workers(controller: Controller) -> list[Check]:
    context = controller.context
    workers = await context.workers.list()
    launcher, kind_of_launcher = controller.launching.status, context.config.launcher.kind
    checks: list[Check] = []
    if launcher is not None:
        found = f"{launcher.kind}: {len(launcher.launches)} of at most {context.config.launcher.max_workers} launched"
        checks.append(_check("launcher", not launcher.problem, launcher.problem or found, "see [launcher]"))
    for kind in (JobKind.TRAIN, JobKind.REFERENCE):
        able = [
            worker.worker for worker in workers if kind in worker.kinds and not worker.draining and not worker.cordoned
        ]
        if not able and kind_of_launcher:
            checks.append(Check(f"{kind} jobs", _OK, f"a worker is asked of {kind_of_launcher} when one is due"))
            continue
        checks.append(
            _check(
                f"{kind} jobs",
                bool(able),
                f"taken by {', '.join(able)}" if able else "no live worker takes them",
                "start a tide-worker with this kind, on the same Redis",
            )
        )
    return checks


async def _engine(controller: Controller, view: EngineView) -> list[Check]:
    context, info = controller.context, view.info
    checks = [Check("heartbeat", _OK, f"{info.kind}, incarnation {info.incarnation}, wire version 1")]
    problem = controller.mismatch(view)
    checks.append(_check("target", not problem, problem or f"{info.target.name} ({info.target.digest[:12]})"))
    age_s = None if view.last_report_s is None else context.clock() - view.last_report_s
    checks.append(
        _check(
            "reports",
            age_s is not None and age_s < LAG_S,
            "none seen yet" if age_s is None else f"the newest {age_s:.0f} s ago",
            "look at the engine's log: its agent sends one every 5 s at least",
        )
    )
    needed = (Capability.TAP, Capability.SCHEDULE, Capability.SWAP)
    missing = [capability.value for capability in needed if capability not in info.capabilities]
    has = ", ".join(capability.value for capability in info.capabilities) or "none"
    checks.append(
        Check(
            "capabilities",
            _SKIPPED if missing else _OK,
            f"{has}" + (f"; without {', '.join(missing)}" if missing else ""),
            "what an engine does not declare is never asked of it" if missing else "",
        )
    )
    checks.append(await _profile(controller, view))
    checks.append(await _draft(controller, view))
    checks += await _samples(controller, view)
    return checks + await _selftest(controller, view)


async def _profile(controller: Controller, view: EngineView) -> Check:
    if view.info.profile is not None:
        return Check("latency profile", _OK, "measured")
    if await controller.speculator.profiles.of(view.info) is not None:
        return Check("latency profile", _OK, "measured before its restart")
    return Check("latency profile", _SKIPPED, "not measured", "without it the policy cannot predict speedup")


async def _draft(controller: Controller, view: EngineView) -> Check:
    """The served version and its vocabulary map are those of the store."""
    info, name = view.info, "draft vocabulary"
    if not info.version:
        return Check(name, _SKIPPED, "no draft is served")
    try:
        draft = await anyio.to_thread.run_sync(controller.context.drafts.get, info.version)
    except Refused:
        advice = "tidectl drafts deploy puts a known one in"
        return Check(name, _FAILED, f"serves {info.version[:12]}, which is not in the draft store", advice)
    served = f"{draft.lineage}@{draft.number} ({draft.version[:12]})"
    return _check(
        name,
        info.vocab_id == draft.vocab_id,
        f"serves {served}"
        + (
            ""
            if info.vocab_id == draft.vocab_id
            else ", and maps its draft tokens by another vocabulary than the draft's"
        ),
        "the vocabulary map differs: restart the engine on this draft",
    )


async def _samples(controller: Controller, view: EngineView) -> list[Check]:
    context = controller.context
    totals = await read_ledger(context.redis, view.engine)
    credit = context.config.capture.credit_bytes
    account = (
        f"{totals.tapped:,} tapped = {totals.stored:,} stored + {totals.shed:,} shed + {totals.lost:,} lost"
        f" + {totals.unknown:,} unknown + {totals.in_flight:,} in flight"
    )
    return [
        _check(
            "backlog",
            totals.stream_bytes < CREDIT_SHARE * credit,
            f"{totals.stream_bytes / 2**20:.1f} of {credit / 2**20:.0f} MiB credit in use",
            "the collector is down or slow: look at tided-collector and at the disk",
        ),
        _check(
            "samples",
            totals.lost == totals.dead == 0,
            account + (f"; {totals.dead:,} entries set aside as poison" if totals.dead else ""),
            "somebody trimmed the stream, or the engine sends what does not decode: see its log",
        ),
    ]


async def _selftest(controller: Controller, view: EngineView) -> list[Check]:
    verdict = await controller.selftest.current(view.info)
    if verdict is None:
        off = not controller.context.config.self_test.enabled
        why = "self_test.enabled is false" if off else "not begun, or the engine taps nothing"
        return [Check("self-test", _SKIPPED, why)]
    allowed = controller.context.config.self_test.allow_unverified
    outcome = {
        VerificationState.VERIFIED: _OK,
        VerificationState.PENDING: _SKIPPED,
        VerificationState.UNVERIFIED: _SKIPPED if allowed else _FAILED,
        VerificationState.MISMATCH: _FAILED,
    }[verdict.state]
    advice = {
        VerificationState.UNVERIFIED: "" if allowed else "see The self-test in docs/operations.md",
        VerificationState.MISMATCH: "mend the engine and restart it: the next incarnation is tested anew",
    }.get(verdict.state, "")
    head = Check("self-test", outcome, f"{verdict.state}: {verdict.reason}", advice)
    return [head, *verdict.checks]


def _check(name: str, fine: bool, measured: str, advice: str = "") -> Check:
    return Check(name, _OK if fine else _FAILED, measured, "" if fine else advice)
