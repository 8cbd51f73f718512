"""Is it the engine? Served acceptance held against what the same draft scores on samples of the same days, for each temperature.

Acceptance falls with the traffic, which training mends, and with a fault of the engine, which it cannot: a wrong layer, a swap half
applied, a sampler that throws accepted tokens away. When enough requests of a temperature have been served, a worker scores the draft that
serves on what was captured of them: one temperature after the other, at most every `training.fault_check_s`, and at once when acceptance
falls (`tided.policies.suspicion` decides). After a fall the same job scores the pooled drafts of the target, too: if the answer is drift,
`tided.services.scout` has all that it needs to choose. What contradicts the score is announced once and stays a warning until it agrees
again; while it stands, or a fall is not explained, no training begins of itself. Engines that do not tell temperatures, or whose samples
lack the last hidden state, cannot be judged.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import anyio.to_thread

from tided.model import failpoints
from tided.model.drafts import DraftOrigin
from tided.model.engines import Capability, EngineInfo
from tided.model.ids import new_id
from tided.model.jobs import Candidate, JobKind, JobSpec, JobState
from tided.policies import slices, suspicion
from tided.policies.faults import Comparison, Verdict
from tided.policies.slices import Served, Slice
from tided.policies.suspicion import TOKENS, Cause, Expected, News, Rules, Suspicion, Wish
from tided.services.context import Context, Target
from tided.services.monitor import EngineView
from tided.store.samples import Shard, Split

STATE = "fault"
MAX_ATTEMPTS = 2
AGAIN_MS = 5_000
"""Between two scores of one question."""

Rivals = Callable[[str, str, Sequence[EngineInfo]], Awaitable[tuple[Candidate, ...]]]
"""Of a target, by digest: the drafts that all these engines could serve instead of a version."""


class FaultWatch:
    """Keeps a `Suspicion` for each engine in the leader's state. `warnings` are for the status; `held` are the engines of which nothing
    can be said unless a token is drafted in every step for a while."""

    def __init__(self, context: Context, rivals: Rivals) -> None:
        self._context = context
        self._rivals = rivals
        self.warnings: dict[str, str] = {}
        self.held: set[str] = set()

    def forget(self, engines: set[str]) -> None:
        self.held -= engines
        for engine in engines:
            self.warnings.pop(engine, None)

    async def current(self, engine: str) -> Suspicion:
        return await self._context.state.get(Suspicion, STATE, engine) or Suspicion()

    async def reconcile(
        self, view: EngineView, peers: Sequence[EngineView], target: Target, deployment: str, now_ms: int
    ) -> Suspicion:
        """Take what is known of the engine one step further. `peers`: the engines of its target; `deployment`: the newest onto it, or "".
        Raises `Unavailable`, `Superseded`."""
        context, rules = self._context, self._rules(target)
        before = await self.current(view.engine)
        state = before
        if (state.incarnation, state.version, state.deployment) != (view.info.incarnation, view.version, deployment):
            state = replace(await self._fresh(view, alone=len(peers) == 1), deployment=deployment)
        state, news = suspicion.look(state, view.served, view.falls(), now_ms, rules, judgeable=_judgeable(view))
        wanted = suspicion.wish(state, view.served, now_ms, rules) if _judgeable(view) else None
        if state.job:
            job = await context.jobs.get(state.job)
            if job is None or job.state.final:
                result = job.result if job is not None and job.state is JobState.SUCCEEDED else None
                scores = result.candidate.sampling if result is not None and result.candidate is not None else ()
                state, told = suspicion.judge(state, view.served, scores)
                news += told
        elif wanted is not None and (spec := await self._spec(view, peers, target, wanted)):
            state = suspicion.asked(state, wanted, new_id("job"), now_ms)
            # The id first: a leader that goes on from here waits for this very job, or asks anew when it never came to be.
            await context.state.put(STATE, view.engine, state, context.leadership.require())
            before = state
            failpoints.hit("faults.submitting")
            await context.submit(spec, MAX_ATTEMPTS, state.job)
        for item in news:
            await self._announce(view, peers, state, item)
        if state != before:
            await context.state.put(STATE, view.engine, state, context.leadership.require())
        self.warnings[view.engine] = _warning(view, peers, state)
        self.held = self.held | {view.engine} if state.held else self.held - {view.engine}
        return state

    def _rules(self, target: Target) -> Rules:
        settings = self._context.training_for(target.info.digest)
        return Rules(
            every_ms=round(settings.fault_check_s * 1000),
            again_ms=AGAIN_MS,
            wait_ms=round(settings.fault_wait_s * 1000),
        )

    async def _fresh(self, view: EngineView, *, alone: bool) -> Suspicion:
        """Of a version that begins to serve: its gate says what to expect of it."""
        draft = await self._context.find_draft(view.version)
        evaluation = draft.evaluation if draft is not None and draft.origin is DraftOrigin.TRAINED else None
        expected = (Expected.by_gate(evaluation, alone=alone),) if evaluation is not None and evaluation.tokens else ()
        return Suspicion(view.info.incarnation, view.version, expected=expected)

    async def _spec(
        self, view: EngineView, peers: Sequence[EngineView], target: Target, wanted: Wish
    ) -> JobSpec | None:
        """The score to ask for, if there are samples enough."""
        context = self._context
        shards = await anyio.to_thread.run_sync(self._samples, target.info.digest, view.engine, wanted.since_ms)
        mix = view.served.mix()
        if not wanted.ripe(sum(shard.runs for shard in shards), sum(shard.scored for shard in shards), mix):
            return None
        draft = await context.find_draft(view.version)
        if draft is None:
            return None
        engines = [peer.info for peer in peers]
        return JobSpec(
            kind=JobKind.SCORE,
            engine=view.engine,
            target=target.info.digest,
            target_dir=str(target.path.absolute()),
            lineage=draft.lineage,
            draft=draft.version,
            draft_dir=str(context.drafts.path(draft.version)),
            held_out=tuple(str(shard.path) for shard in shards),
            gamma=max(1, min(context.config.speculation.gamma_max, view.info.gamma_max)),
            mix=mix,
            candidates=await self._rivals(target.info.digest, draft.version, engines) if wanted.fallen else (),
            options={"held_out_tokens": TOKENS},
            priority=context.priority_of(target.info.digest),
        )

    def _samples(self, target: str, engine: str, since_ms: int) -> list[Shard]:
        """The engine's own samples of requests that ended since then, whether they are held out or not: the served draft was trained on
        none of them, and requests are judged whatever side their prompt is on."""
        shards = [
            s for split in (Split.HELD_OUT, Split.TRAIN) for s in self._context.samples.shards(split, target, engine)
        ]
        return [shard for shard in shards if shard.since_ms >= since_ms and shard.has_last]

    async def _announce(self, view: EngineView, peers: Sequence[EngineView], state: Suspicion, news: News) -> None:
        context, found = self._context, news.found
        if found is None:
            message = "acceptance fell, and no score said in time whether the draft or the engine is the cause: taken for drift"
            await context.announce(news.kind, view.engine, message, temperatures=list(state.fell))
            return
        figures = {"served": round(found.served, 3), "scored": round(found.scored, 3), "error": round(found.error, 4)}
        parts = cut(view, peers, state, found)
        message = describe(view.info.kind, found, suspicion.cause(found, state), slices.where(parts))
        await context.announce(
            news.kind,
            view.engine,
            message,
            temperature=found.temperature,
            requests=found.requests,
            **figures,
            slices=[_plain(part) for part in parts],
        )


def _judgeable(view: EngineView) -> bool:
    return {Capability.TAP, Capability.LAST_HIDDEN} <= set(view.info.capabilities)


def _warning(view: EngineView, peers: Sequence[EngineView], state: Suspicion) -> str:
    if not state.suspected:
        return ""
    told = (
        describe(view.info.kind, found, suspicion.cause(found, state), slices.where(cut(view, peers, state, found)))
        for found in state.suspected
    )
    return f"engine {view.engine}: {'; '.join(told)}. No training begins until this is mended"


def cut(view: EngineView, peers: Sequence[EngineView], state: Suspicion, found: Comparison) -> tuple[Slice, ...]:
    """The requests of that temperature since it fell, beside those of the version before and of the target's other engines."""
    at = found.temperature
    requests: list[Served] = []
    for peer in (view, *(peer for peer in peers if peer.engine != view.engine)):
        own = peer.engine == view.engine
        for version, since_ms in ((peer.served, state.onset_ms if own else 0), (peer.before, 0)):
            whole = version.classes[at].whole if at in version.classes and (own or version is peer.served) else ()
            requests += [Served(stats, peer.engine, peer.info.build) for at_ms, stats in whole if at_ms >= since_ms]
    shares, expected = dict(view.served.mix()), [item for item in state.expected if item.own]
    total = sum(shares.get(item.temperature, 0.0) for item in expected)
    positions = max((len(item.conditional) for item in expected), default=0) if total else 0
    scored = [
        sum(shares.get(item.temperature, 0.0) * item.conditional[k] for item in expected) / total
        for k in range(positions)
    ]
    by_position = slices.by_position(view.live.hits, view.live.trials, scored, found.requests)
    return by_position + slices.sliced(requests)


def _plain(part: Slice) -> dict[str, object]:
    figures = {"accepted": round(part.accepted, 3), "rest": round(part.rest, 3)}
    return {"by": part.by, "part": part.part, "requests": part.requests, **figures, "low": part.low}


def describe(kind: str, found: Comparison, cause: Cause, where: str = "") -> str:
    """One sentence: the class, the figures, what to look at, and where most is lost."""
    requests = "greedy requests" if found.temperature == 0.0 else f"requests at temperature {found.temperature:g}"
    figures = f"{requests} are served at acceptance length {found.served:.2f}, their draft scores {found.scored:.2f}"
    if found.verdict is not Verdict.FAULT:
        return f"{figures}: they agree again"
    return f"{figures}: {_suspect(kind, found, cause)}" + (f"; {where}" if where else "")


def _suspect(kind: str, found: Comparison, cause: Cause) -> str:
    engine = "the engine (layer ids, a swap half applied, its vocabulary map, its prefix cache)"
    sampler = "how the engine verifies sampled requests (temperature, top-k, uniform draws)"
    known = "; vLLM on a processor loses their temperature: TIDED_MEND_SAMPLING" if kind == "vllm" else ""
    match cause:
        case Cause.DRAFT:
            return f"suspect {engine}, not the traffic"
        case Cause.EITHER:
            return f"suspect {engine}, or {sampler}, not the traffic{known}"
        case Cause.LIKELIEST:
            option = ' ("draft_sample_method": "probabilistic" in --speculative-config)' if kind == "vllm" else ""
            how = f"the engine drafts its likeliest token instead of a sampled one: let it sample{option}"
            return f"{how}; if it does, suspect {sampler}"
        case Cause.SAMPLING:
            less = f"less than even greedy drafting would give ({found.likeliest:.2f})"
            return f"{less}: suspect {sampler}, not the traffic{known}"
