"""Whether the draft that serves accepts what the same weights accept offline, on the self-test's own greedy requests.

Greedy requests leave no choice: behind every token the draft's favourites are right so and so often in a row, and the engine's steps
follow from that one by one. A score job on a worker says how often (`Chain`); the engine's reports say in how many steps it accepted
how many tokens. If these do not fit, the engine serves other weights, another vocabulary map or other features than it should.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio

from tided.model.drafts import Draft, DraftOrigin
from tided.model.engines import EngineInfo, RequestStats
from tided.model.errors import Conflict
from tided.model.ids import new_id
from tided.model.jobs import Chain, DraftFault, JobKind, JobSpec, JobState
from tided.model.verification import Check, CheckOutcome
from tided.services.context import Context

NAME = "draft acceptance"
LEAST = 6
"""Drafts that accept fewer tokens than this on all probes cannot be told apart."""
SLACK = 0.1
"""Share of the accepted tokens, at least one, by which an engine may differ. A trained draft of SmolLM2-135M in BF16 never left what
float32 with open ties allows, in 63 rounds; fed the features of another position it was off in all of them."""
POLL_S = 0.2

CAUSES = {
    DraftFault.VOCABULARY: "the vocabulary map is not applied (draft ids are taken for token ids)",
    DraftFault.FEATURES_LATE: "the features fed to the draft are one position late",
    DraftFault.FEATURES_EARLY: "the features fed to the draft are one position early",
    DraftFault.FEATURES_ORDER: "the draft is fed the aux states in the wrong order",
    DraftFault.PREVIOUS: "the weights are still those of the version before",
    DraftFault.HALF_HEAD: "the swap was half applied: only the head is the new version's",
    DraftFault.HALF_BODY: "the swap was half applied: the head is the old version's",
}


@dataclass(frozen=True, slots=True)
class Drafted:
    """What is known of one round of probes. `groups`: of their prompts; `reports`: of each, the finished requests that may be it;
    `whole`: whether rows of all positions arrived; `gamma`: drafted tokens in each step, 0 if that is not sure."""

    groups: tuple[str, ...] = ()
    reports: tuple[tuple[RequestStats, ...], ...] = ()
    shards: tuple[str, ...] = ()
    whole: bool = True
    gamma: int = 0


async def check(
    context: Context, info: EngineInfo, draft: Draft | None, previous: str, drafted: Drafted, timeout_s: float
) -> Check:
    """Score the draft on the probes and judge. `previous`: the version that served before, or "". Raises `Superseded`."""
    why = _hindrance(info, draft, drafted)
    if why or draft is None:
        return Check(NAME, CheckOutcome.SKIPPED, why)
    workers = await context.workers.list()
    if not context.config.launcher.kind and not any(
        JobKind.SCORE in worker.kinds and not worker.draining for worker in workers
    ):
        return Check(NAME, CheckOutcome.SKIPPED, "no worker takes score jobs, so the draft cannot be scored offline")
    try:
        chains = await _scored(context, info, draft, previous, drafted, timeout_s)
    except TimeoutError:
        return Check(NAME, CheckOutcome.SKIPPED, f"no worker scored the draft within {timeout_s:g} s")
    if isinstance(chains, str):
        return Check(NAME, CheckOutcome.SKIPPED, f"the draft could not be scored offline: {chains}")
    return judge(f"{draft.lineage}@{draft.number}", chains, drafted)


def _hindrance(info: EngineInfo, draft: Draft | None, drafted: Drafted) -> str:
    """Why nothing can be compared, or ""."""
    if not info.version:
        return "the engine serves no draft"
    if draft is None:
        return f"the draft that serves ({info.version[:12]}) is not in the draft store"
    if draft.origin is DraftOrigin.INIT:
        return "version 0 accepts next to nothing: the check is made after the first swap"
    if not drafted.gamma:
        return "the probes were not drafted for at one number of tokens"
    if not drafted.whole:
        return "a prefix cache had the beginnings of the probes: their rows do not say what the draft was fed"
    if not all(drafted.reports):
        return "the engine's reports do not name the probes' requests"
    return ""


async def _scored(
    context: Context, info: EngineInfo, draft: Draft, previous: str, drafted: Drafted, timeout_s: float
) -> Sequence[Chain] | str:
    """The chains that a worker found, or why it found none. Raises `TimeoutError`."""
    spec = JobSpec(
        kind=JobKind.SCORE,
        engine=info.engine,
        target=info.target.digest,
        target_dir=str(context.target_of(info.target).path.absolute()),
        lineage=draft.lineage,
        draft=draft.version,
        draft_dir=str(context.drafts.path(draft.version)),
        held_out=drafted.shards,
        gamma=drafted.gamma,
        groups=drafted.groups,
        previous_dir=str(context.drafts.path(previous)) if previous else "",
        priority=context.priority_of(info.target.digest),
    )
    attempts = context.training_for(info.target.digest).max_attempts
    job = await context.submit(spec, attempts, new_id("job"))
    try:
        with anyio.fail_after(timeout_s):
            while job is not None and not job.state.final:
                await anyio.sleep(POLL_S)
                job = await context.jobs.get(job.id)
    except TimeoutError:
        if job is not None:
            with suppress(Conflict):  # it has just ended
                await context.jobs.cancel(job.id, context.leadership.require())
        raise
    if job is None or job.state is not JobState.SUCCEEDED or job.result is None:
        return (job.error or f"job {job.id} was {job.state}") if job is not None else "its job is gone"
    return job.result.chains


def judge(name: str, chains: Iterable[Chain], drafted: Drafted) -> Check:
    """Whether what was served follows from the draft; if not, from which faults it would."""
    by_fault: dict[DraftFault, dict[str, Chain]] = {}
    for chain in chains:
        by_fault.setdefault(chain.fault, {})[chain.group] = chain
    sound = by_fault.get(DraftFault.NONE, {})
    if any(group not in sound for group in drafted.groups):
        return Check(NAME, CheckOutcome.SKIPPED, "the rows of the probes do not hold their whole answers")
    expected = sum(_accepted(sound[group]) for group in drafted.groups)
    slack = max(1, round(SLACK * expected))
    off, served = _distance(sound, drafted)
    measured = f"the engine accepted {served} drafted tokens of {name} on the probes, offline it accepts {expected}"
    if off <= slack:
        if expected < LEAST:
            return Check(NAME, CheckOutcome.SKIPPED, f"{measured}: too few to tell drafts apart")
        return Check(NAME, CheckOutcome.OK, measured)
    fits = [CAUSES[fault] for fault, found in by_fault.items() if fault and _distance(found, drafted)[0] <= slack]
    cause = "; or ".join(fits) if fits else "neither another version's weights, vocabulary map nor features explain it"
    return Check(
        NAME,
        CheckOutcome.FAILED,
        f"{measured}: {cause}",
        "mend how the engine loads and feeds its draft, and restart it; tidectl drafts deploy after that",
    )


def _distance(chains: dict[str, Chain], drafted: Drafted) -> tuple[int, int]:
    """How far, in steps and tokens of all probes, what was served is from anything that the chains allow; and the tokens served."""
    off = served = 0
    for group, reports in zip(drafted.groups, drafted.reports, strict=True):
        allowed = reachable(chains[group], drafted.gamma)
        nearest = min(
            (abs(report.spec_steps - steps) + abs(report.accepted - accepted), report.accepted)
            for report in reports
            for steps, accepted in allowed
        )
        off, served = off + nearest[0], served + nearest[1]
    return off, served


def _accepted(chain: Chain) -> int:
    """Tokens that are surely accepted, step by step behind one another."""
    at = accepted = 0
    while at < len(chain.low):
        accepted += chain.low[at]
        at += chain.low[at] + 1
    return accepted


def reachable(chain: Chain, gamma: int) -> frozenset[tuple[int, int]]:
    """Every (drafting steps, accepted tokens) with which a greedy request can have come to its end.

    A step may draft nothing. What the last step accepts beyond the request's length is unknown, and engines count it or do not.
    """
    length = len(chain.low)
    found: list[set[tuple[int, int]]] = [{(0, 0)}, *(set[tuple[int, int]]() for _ in range(length))]
    for at in range(length):
        room = length - at
        most = gamma if chain.high[at] >= room else chain.high[at]
        for steps, accepted in found[at]:
            found[at + 1].add((steps, accepted))
            for right in range(chain.low[at], most + 1):
                counts = range(min(right, room - 1), right + 1)
                found[min(at + right + 1, length)].update((steps + 1, accepted + counted) for counted in counts)
    return frozenset(found[length])
