"""Is it the engine? Served acceptance held against what the same draft scores on samples of the same days, for each temperature.

Acceptance falls with the traffic, which training mends, and with a fault of the engine, which it cannot: a wrong layer, a swap half
applied, a sampler that throws accepted tokens away. When enough requests of a temperature have been served, a worker scores the draft
that serves on what was captured of them, one temperature after the other, at most every `training.fault_check_s`. What contradicts
the score is announced once and stays a warning until it agrees again; while it stands no training begins of itself. Engines that do
not tell temperatures, or whose samples lack the last hidden state, cannot be judged.
"""

from dataclasses import dataclass, replace

import anyio.to_thread

from tided.model import failpoints
from tided.model.errors import Refused
from tided.model.ids import new_id
from tided.model.records import Capability, JobKind, JobResult, JobSpec, JobState
from tided.policies.faults import MIN_PROMPTS, MIN_SCORED_STEPS, Comparison, Verdict, compare
from tided.services.context import Context, Target
from tided.services.monitor import EngineView
from tided.store.samples import Shard, Split

STATE = "fault"
SCORED_TOKENS = 4_000
"""Tokens that a check scores at most: seconds of one core, for it needs the target's whole head."""
MAX_ATTEMPTS = 2
RARE = 0.01
"""Share of the requests."""


@dataclass(frozen=True, slots=True)
class FaultCheck:
    """What is known of one engine's draft. `job`: the score under way. `temperature`: of the newest score that was asked for.
    `suspected`: by temperature, as last judged."""

    incarnation: str = ""
    version: str = ""
    job: str = ""
    temperature: float = -1.0
    asked_ms: int = 0
    suspected: tuple[Comparison, ...] = ()


class FaultWatch:
    """Keeps a `FaultCheck` for each engine in the leader's state. `warnings` are for the status."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.warnings: dict[str, str] = {}

    def forget(self, engines: set[str]) -> None:
        for engine in engines:
            self.warnings.pop(engine, None)

    async def reconcile(self, view: EngineView, target: Target, now_ms: int) -> str:
        """Take the engine's check one step further; why it is suspected, or "". Raises `Unavailable`, `Superseded`."""
        context = self._context
        before = await context.state.get(FaultCheck, STATE, view.engine) or FaultCheck()
        check = before
        every_ms = context.training_for(target.info.digest).fault_check_s * 1000
        if not every_ms or (check.incarnation, check.version) != (view.info.incarnation, view.version):
            check = FaultCheck(view.info.incarnation, view.version)
        if check.job:
            check = await self._scored(view, check)
        elif every_ms and now_ms - check.asked_ms >= every_ms and (due := await self._due(view, target, check)):
            temperature, spec = due
            check = replace(check, job=new_id("job"), temperature=temperature, asked_ms=now_ms)
            # The id first: a leader that goes on from here waits for this very job, or asks anew when it never came to be.
            await context.state.put(STATE, view.engine, check, context.leadership.require())
            failpoints.hit("faults.submitting")
            await context.jobs.submit(spec, context.leadership.require(), MAX_ATTEMPTS, check.job)
        check = replace(check, suspected=_not_rare(view, check.suspected))
        if check != before:
            await context.state.put(STATE, view.engine, check, context.leadership.require())
        self.warnings[view.engine] = _warning(view, check.suspected)
        return self.warnings[view.engine]

    async def _due(self, view: EngineView, target: Target, check: FaultCheck) -> tuple[float, JobSpec] | None:
        """The temperature and the score to ask for, if one could say something."""
        context = self._context
        if not {Capability.TAP, Capability.LAST_HIDDEN} <= set(view.info.capabilities):
            return None
        temperature = view.served.next_ripe(check.temperature, check.asked_ms)
        if temperature is None:
            return None
        since_ms = view.served.classes[temperature].since_ms
        shards = await anyio.to_thread.run_sync(self._held_out, target.info.digest, view.engine, since_ms)
        if sum(shard.runs for shard in shards) < MIN_PROMPTS or sum(s.scored for s in shards) < MIN_SCORED_STEPS:
            return None
        try:
            draft = await anyio.to_thread.run_sync(context.drafts.get, view.version)
        except Refused:
            return None
        return temperature, JobSpec(
            kind=JobKind.SCORE,
            engine=view.engine,
            target=target.info.digest,
            target_dir=str(target.path.absolute()),
            lineage=draft.lineage,
            draft=draft.version,
            draft_dir=str(context.drafts.path(draft.version)),
            held_out=tuple(str(shard.path) for shard in shards),
            gamma=view.info.gamma_max,
            mix=view.served.mix(),
            options={"held_out_tokens": SCORED_TOKENS},
        )

    def _held_out(self, target: str, engine: str, since_ms: int) -> list[Shard]:
        """The engine's own held-out shards since then: all, for the requests that are judged are from all of that time."""
        shards = self._context.samples.shards(Split.HELD_OUT, target, engine)
        return [shard for shard in shards if shard.created_ms >= since_ms and shard.has_last]

    async def _scored(self, view: EngineView, check: FaultCheck) -> FaultCheck:
        """Judge by the score, if it is there."""
        job = await self._context.jobs.get(check.job)
        if job is not None and not job.state.final:
            return check
        done = replace(check, job="")
        if job is None or job.state is not JobState.SUCCEEDED or job.result is None:
            return done
        found = _compared(view, check.temperature, job.result)
        suspected = {comparison.temperature: comparison for comparison in check.suspected}
        if found is not None and found.verdict is Verdict.FAULT:
            if found.temperature not in suspected:
                await self._announce("engine-fault-suspected", view, found)
            suspected[found.temperature] = found
        elif found is not None and found.verdict is Verdict.SOUND and suspected.pop(found.temperature, None):
            await self._announce("engine-fault-cleared", view, found)
        return replace(done, suspected=tuple(suspected[temperature] for temperature in sorted(suspected)))

    async def _announce(self, kind: str, view: EngineView, found: Comparison) -> None:
        figures = {"served": round(found.served, 3), "scored": round(found.scored, 3), "error": round(found.error, 4)}
        message = describe(view.info.kind, found)
        context = self._context
        await context.announce(
            kind, view.engine, message, temperature=found.temperature, requests=found.requests, **figures
        )


def _compared(view: EngineView, temperature: float, result: JobResult) -> Comparison | None:
    served = view.served.classes.get(temperature)
    scores = result.candidate.sampling if result.candidate is not None else ()
    score = next((score for score in scores if score.temperature == temperature), None)
    return compare(served, score) if served is not None and score is not None else None


def _not_rare(view: EngineView, suspected: tuple[Comparison, ...]) -> tuple[Comparison, ...]:
    """What is suspected of a temperature that is hardly served any more cannot be judged again, and keeps nothing from training."""
    rare = {temperature for temperature, share in view.served.mix() if share < RARE}
    return tuple(comparison for comparison in suspected if comparison.temperature not in rare)


def _warning(view: EngineView, suspected: tuple[Comparison, ...]) -> str:
    if not suspected:
        return ""
    found = "; ".join(describe(view.info.kind, comparison) for comparison in suspected)
    return f"engine {view.engine}: {found}. No training begins until this is mended"


def describe(kind: str, found: Comparison) -> str:
    """One sentence: the class, the figures, and what to look at."""
    requests = "greedy requests" if found.temperature == 0.0 else f"requests at temperature {found.temperature:g}"
    figures = f"{requests} are served at acceptance length {found.served:.2f}, their draft scores {found.scored:.2f}"
    if found.verdict is not Verdict.FAULT:
        return f"{figures}: they agree again"
    return f"{figures}: {_suspect(kind, found)}"


def _suspect(kind: str, found: Comparison) -> str:
    if found.temperature == 0.0:
        return "suspect the engine (layer ids, a swap half applied, its prefix cache), not the traffic"
    drafts_likeliest = abs(found.served - found.likeliest) < min(found.scored - found.served, 4.0 * found.error)
    if drafts_likeliest:
        option = ' ("draft_sample_method": "probabilistic" in --speculative-config)' if kind == "vllm" else ""
        return f"the engine drafts its likeliest token instead of a sampled one; let it sample{option}"
    cause = "how the engine verifies sampled requests (temperature, top-k, uniform draws), not the traffic"
    known = "; vLLM on a processor loses their temperature: TIDED_MEND_SAMPLING" if kind == "vllm" else ""
    return f"less than even greedy drafting would give ({found.likeliest:.2f}): suspect {cause}{known}"
