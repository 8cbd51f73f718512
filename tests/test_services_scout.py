"""Going back to a pooled draft, on a real Valkey: when drafts are scored, what is switched to, what waits, and shadow acceptance."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_draft, store_samples, variant
from tests.engine_double import EngineDouble, describe_double, running_double
from tests.support import cut_at, eventually
from tests.test_services_controller import evaluation
from tided.config import GateConfig
from tided.draft import checkpoint
from tided.machine.collection import Collection, Phase
from tided.model.deployments import Deployment, DeploymentState
from tided.model.drafts import Draft, DraftOrigin, SamplingScore
from tided.model.events import Event
from tided.model.jobs import JobKind, JobResult, JobState, Recipe
from tided.model.policy import SpeculationMode
from tided.policies.domains import Domain, Domains
from tided.policies.faults import Comparison, Verdict
from tided.policies.suspicion import Answer, Suspicion
from tided.services import dispatcher, faults, scout
from tided.services.context import Context
from tided.services.pools import POOLED, Head
from tided.services.scout import Cause, Scouting, Stage, choose
from tided.services.stock import Stockroom
from tided.store.jobs import Claim

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
ENGINE = "double"


@dataclass
class Scene:
    """`day` served in domain 1, `night` serves now, in domain 2."""

    control: Control
    engine: EngineDouble
    target: Path
    first: Path
    root: Path
    day: Draft
    night: Draft
    late: Draft | None = None  # what a training for night's traffic gave

    @property
    def digest(self) -> str:
        return self.engine.info.target.digest

    def configure(self, section: str, **values: object) -> None:
        context = self.control.context
        changed = getattr(context.config, section).model_copy(update=values)
        context.config = context.config.model_copy(update={section: changed})

    async def put(self, name: str, record: object) -> None:
        await self.control.context.state.put(name, self.digest, record, self.control.context.leadership.require())

    async def scouting(self) -> Scouting:
        return await self.control.controller.scout.current(self.digest)

    async def collection(self) -> Collection:
        return await self.control.controller.dispatcher.current(self.digest)

    async def drift(self, train: int = 20, held_out: int = 10) -> int:
        """Traffic has moved, and so much of it is stored. Since when."""
        before = await self.collection()
        now_ms = await self.control.context.now_ms()
        moved = before.phase is Phase.TRAINING
        drifted = replace(before, drifts=before.drifts + 1, moved=moved, since_ms=now_ms, rows=0)
        await self.put(dispatcher.STATE, drifted)
        self.samples(now_ms + 1, train, held_out)
        return now_ms

    def samples(self, created_ms: int, train: int = 20, held_out: int = 10) -> None:
        store_samples(self.control.context.config, self.target, ENGINE, train, held_out, created_ms)

    async def claimed(self, kind: JobKind = JobKind.SCORE) -> Claim:
        async def claim() -> Claim | None:
            await self.control.cycle()
            return await self.control.context.jobs.claim("w", [kind])

        return await eventually(claim)

    async def score(self, claim: Claim, **lengths: float) -> None:
        """Finish a score with the acceptance lengths of `day`, `night` and `late`."""
        by_version = {getattr(self, name).version: length for name, length in lengths.items()}
        spec = claim.job.spec
        scores = tuple(evaluation(other.version, by_version[other.version], 20) for other in spec.candidates)
        result = JobResult(
            version=spec.draft, candidate=evaluation(spec.draft, by_version[spec.draft], 20), scores=scores
        )
        await self.control.context.jobs.finish(claim, result)

    async def train(self) -> Claim:
        """A training for the traffic of now begins."""
        self.samples(await self.control.context.now_ms() + 1)
        return await self.claimed(JobKind.TRAIN)

    async def trained(self, claim: Claim, gain: float = 0.4) -> str:
        """It succeeds; how its cycle ended."""
        before = len(await self.control.events("training-ended"))
        staged = variant(self.first, self.root / "staged", 3)
        version = checkpoint.version_of(staged)
        old, new = evaluation(claim.job.spec.draft, 2.2, 8), evaluation(version, 2.2 + gain, 8)
        await self.control.context.jobs.finish(claim, JobResult(str(staged), version, old, new, 1000, 1.0))

        async def ended() -> bool:
            await self.control.cycle()
            found = await self.control.controller.deployer.current(ENGINE)
            if found is not None and found.state is DeploymentState.WATCHING:
                await self.engine.report(alpha=0.6, requests=6)
            return len(await self.control.events("training-ended")) > before

        await eventually(ended)
        self.late = await self.control.plane.draft(version)
        return (await self.control.events("training-ended"))[-1].message

    async def pooled(self) -> dict[int, str]:
        """The draft of each domain."""
        return {entry.number: entry.version for entry in (await self.scouting()).domains.entries}

    async def reserves(self) -> set[int]:
        """The domains of which samples were trained on."""
        return set(await Stockroom(self.control.context).reserved(self.digest))

    async def happened(self, kind: str) -> Event:
        async def seen() -> list[Event]:
            await self.control.cycle()
            return await self.control.events(kind)

        return (await eventually(seen))[-1]

    async def serves(self, draft: Draft) -> None:
        async def served() -> bool:
            await self.control.cycle()
            return self.engine.info.version == draft.version

        await eventually(served)

    async def deployment(self) -> Deployment:
        found = await self.control.controller.deployer.current(ENGINE)
        assert found is not None
        return found

    async def settles(self, alpha: float = 0.6) -> DeploymentState:
        """Traffic until the deployment under way is over, one way or the other."""

        async def over() -> bool:
            await self.control.cycle()
            if (await self.deployment()).state is DeploymentState.WATCHING:
                await self.engine.report(alpha=alpha, requests=6)
            return (await self.deployment()).state.final

        await eventually(over)
        return (await self.deployment()).state

    async def jobs(self, kind: JobKind) -> list[JobState]:
        return [job.state for job in await self.control.context.jobs.list() if job.spec.kind is kind]


@pytest.fixture
async def scene(valkey: Valkey, tmp_path: Path, target: Path, first: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        pool: dict[str, object] = {"retry_s": 600.0}
        control = await stack.enter_async_context(leading(valkey, settings(tmp_path, target, pool=pool)))
        day, night = (
            store_draft(control, variant(first, tmp_path / name, seed), target)
            for seed, name in enumerate(("day", "night"), 1)
        )
        info = describe_double(target, tmp_path / "night")
        engine = await stack.enter_async_context(running_double(valkey, info))
        await eventually(control.context.engines.list)
        scene = Scene(control, engine, target, first, tmp_path, day, night)
        entries = (Domain(1, day.version, 2.4, 100), Domain(2, night.version, 2.2, 200))
        await scene.put(scout.STATE, Scouting(Domains(2, 2, night.version, entries)))
        await scene.put(dispatcher.STATE, Collection(trainings=2, deployed=2))
        await control.converge()
        yield scene


async def test_traffic_that_comes_back_gets_its_draft_back_without_a_training(scene: Scene) -> None:
    since_ms = await scene.drift()
    claim = await scene.claimed()
    spec = claim.job.spec
    assert (spec.kind, spec.draft) == (JobKind.SCORE, scene.night.version)
    assert [candidate.version for candidate in spec.candidates] == [scene.day.version]
    assert Path(spec.candidates[0].path) == scene.control.context.drafts.path(scene.day.version)
    # Held-out and training side: nothing that new was trained on.
    names = sorted(Path(path).name for path in spec.held_out)
    assert names == [f"held-out-{since_ms + 1:013d}.safetensors", f"train-{since_ms + 1:013d}.safetensors"]
    assert await scene.jobs(JobKind.TRAIN) == []  # there are rows enough: it waits for the answer
    await scene.score(claim, day=2.3, night=1.3)
    await scene.serves(scene.day)
    deployment = await scene.deployment()
    assert (deployment.reason, deployment.proven) == (POOLED, True)
    switched = await scene.happened("pool-switched")
    assert switched.data["version"] == scene.day.version
    assert switched.data["previous"] == scene.night.version
    assert switched.data["gain"] == pytest.approx(1.0)
    assert (await scene.happened("pool-scored")).data["domain"] == 1
    assert await scene.settles() is DeploymentState.LIVE
    domains = (await scene.scouting()).domains
    assert (domains.current, domains.served) == (1, scene.day.version)
    # The drift is answered, so that the next one will be noted; training goes on from the draft that came back.
    claim = await scene.claimed(JobKind.TRAIN)
    assert (claim.job.spec.draft, claim.job.spec.recipe) == (scene.day.version, Recipe.REFRESH)
    assert not (await scene.collection()).drifting


@pytest.mark.parametrize("requests", [20, 7])
async def test_the_score_that_says_drift_has_scored_the_pool_as_well(scene: Scene, requests: int) -> None:
    """One question, one job: as soon as it is known that the traffic has moved, the head moves. On too few requests to choose by it is
    asked once more, at once."""
    await scene.engine.report(alpha=0.6, requests=60, temperature=0.0)
    await scene.control.cycle()
    now_ms = await scene.control.context.now_ms() + 1
    await scene.engine.report(alpha=0.1, requests=8, temperature=0.0, at_ms=now_ms)
    await scene.control.cycle()
    await scene.engine.report(alpha=0.1, requests=30, temperature=0.0, at_ms=now_ms)
    scene.samples(now_ms + 1)
    claim = await scene.claimed()
    assert [candidate.version for candidate in claim.job.spec.candidates] == [scene.day.version]
    assert claim.job.spec.mix == ((0.0, 1.0),)
    assert await scene.control.events("drift-detected") == []
    low = SamplingScore(0.0, (50.0,) * 20, (5.0,) * 20, (0.0909,) * 4, (0.0909,) * 4)  # as it is served: 4 in 40 steps
    serving = replace(evaluation(scene.night.version, 1.1, requests), sampling=(low,))
    scores = (evaluation(scene.day.version, 2.3, requests),)
    await scene.control.context.jobs.finish(
        claim, JobResult(version=scene.night.version, candidate=serving, scores=scores)
    )
    if requests == 7:
        scene.samples(now_ms + 2)
        await scene.score(await scene.claimed(), day=2.3, night=1.1)
    await scene.serves(scene.day)
    assert await scene.jobs(JobKind.SCORE) == [JobState.SUCCEEDED] * (1 if requests == 20 else 2)
    assert await scene.jobs(JobKind.TRAIN) == []
    kinds = [event.kind for event in await scene.control.events("drift-detected", "pool-scored", "pool-switched")]
    assert kinds == ["drift-detected", "pool-scored", "pool-switched"]
    assert (await scene.happened("pool-scored")).data["cause"] == Cause.DRIFT


async def test_where_nobody_scores_training_does_not_wait_a_second_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question why acceptance fell had no answer in its time: the pool's will have none either."""

    async def late(*_: object) -> Suspicion:
        return Suspicion(scene.engine.info.incarnation, scene.night.version, answer=Answer.LATE)

    monkeypatch.setattr(scene.control.controller.faults, "reconcile", late)
    await scene.drift()
    claim = await scene.claimed(JobKind.TRAIN)
    assert claim.job.spec.draft == scene.night.version
    assert await scene.jobs(JobKind.SCORE) != [JobState.CANCELLED]


async def test_drafts_that_no_engine_could_take_are_not_waited_for(scene: Scene) -> None:
    scene.control.context.drafts.quarantine(scene.day.version, "worse")
    scene.configure("pool", deadline_s=600.0)
    await scene.drift()
    await scene.claimed(JobKind.TRAIN)
    assert await scene.jobs(JobKind.SCORE) == []


async def test_what_fell_under_the_draft_before_is_no_drift_of_the_one_that_came_back(scene: Scene) -> None:
    await scene.drift()
    await scene.score(await scene.claimed(), day=2.3, night=1.3)
    await scene.serves(scene.day)
    fell = Suspicion(scene.engine.info.incarnation, scene.night.version, answer=Answer.DRIFT)
    context = scene.control.context
    await context.state.put(faults.STATE, ENGINE, fell, context.leadership.require())
    assert await scene.settles() is DeploymentState.LIVE
    assert await scene.control.events("drift-detected") == []


async def test_what_is_trained_on_from_it_replaces_its_domain_s_draft(scene: Scene) -> None:
    await test_traffic_that_comes_back_gets_its_draft_back_without_a_training(scene)
    (job,) = [job for job in await scene.control.context.jobs.list() if job.spec.kind is JobKind.TRAIN]
    claim = Claim(job, job.attempt)
    staged = variant(scene.first, scene.root / "staged", 3)
    version = checkpoint.version_of(staged)
    old, new = evaluation(scene.day.version, 2.3, 8), evaluation(version, 2.6, 8)
    await scene.control.context.jobs.finish(claim, JobResult(str(staged), version, old, new, 1000, 1.0))

    async def accounted() -> dict[int, str]:
        await scene.settles()
        entries = {entry.number: entry.version for entry in (await scene.scouting()).domains.entries}
        return entries if version in entries.values() else {}

    assert await eventually(accounted) == {1: version, 2: scene.night.version}


async def test_without_a_better_one_training_goes_on_from_what_serves_and_opens_a_domain(scene: Scene) -> None:
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    claim = await scene.claimed(JobKind.TRAIN)
    assert (claim.job.spec.draft, claim.job.spec.recipe) == (scene.night.version, Recipe.DRIFT)
    assert scene.engine.info.version == scene.night.version
    assert await scene.control.events("pool-switched") == []
    domains = (await scene.scouting()).domains
    assert (domains.current, domains.here) == (0, 3)


async def test_a_small_gain_that_may_be_chance_is_none(scene: Scene) -> None:
    await scene.drift()
    claim = await scene.claimed()
    old, new = (evaluation(draft.version, 1.5, 20) for draft in (scene.night, scene.day))
    lengths = tuple(1.5 + (0.4 if i % 2 else -0.35) for i in range(20))
    scores = (replace(new, lengths=lengths),)
    await scene.control.context.jobs.finish(claim, JobResult(version=old.version, candidate=old, scores=scores))
    await scene.happened("pool-scored")
    assert await scene.control.events("pool-switched") == []


async def test_a_missing_worker_holds_training_up_to_the_deadline_only(scene: Scene) -> None:
    scene.configure("pool", deadline_s=0.5)
    await scene.drift()

    async def asked() -> list[JobState]:
        await scene.control.cycle()
        return await scene.jobs(JobKind.SCORE)

    await eventually(asked)
    claim = await scene.claimed(JobKind.TRAIN)
    assert claim.job.spec.draft == scene.night.version
    assert await scene.jobs(JobKind.SCORE) == [JobState.CANCELLED]
    assert (await scene.scouting()).stage is Stage.IDLE


async def test_it_waits_for_enough_requests_and_captures_meanwhile(scene: Scene) -> None:
    scene.configure("training", enabled=False)
    await scene.control.converge()
    assert not scene.engine.info.capturing
    since_ms = await scene.drift(train=3, held_out=2)

    async def captures() -> bool:
        await scene.control.cycle()
        return scene.engine.info.capturing

    await eventually(captures)
    assert await scene.jobs(JobKind.SCORE) == []
    scene.samples(since_ms + 2)
    claim = await scene.claimed()
    await scene.score(claim, day=1.0, night=1.0)
    await scene.control.converge()
    assert not scene.engine.info.capturing


async def test_while_a_fault_is_suspected_nothing_is_scored(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def suspected(*_: object) -> Suspicion:
        return Suspicion(suspected=(Comparison(0.0, 1.1, 2.0, 2.0, 0.05, 40, 20, Verdict.FAULT),))

    monkeypatch.setattr(scene.control.controller.faults, "reconcile", suspected)
    await scene.drift()
    for _ in range(4):
        await scene.control.cycle()
    assert (await scene.scouting()).stage is Stage.SAMPLING
    assert await scene.jobs(JobKind.SCORE) == []


async def test_the_pool_can_be_switched_off(scene: Scene) -> None:
    scene.configure("pool", enabled=False)
    await scene.drift()
    claim = await scene.claimed(JobKind.TRAIN)
    assert claim.job.spec.draft == scene.night.version
    assert await scene.jobs(JobKind.SCORE) == []
    scene.configure("pool", enabled=True)
    for _ in range(3):
        await scene.control.cycle()
    assert await scene.jobs(JobKind.SCORE) == []  # a drift of before is not asked about


async def test_a_pooled_draft_that_does_not_hold_goes_and_is_not_blamed(scene: Scene) -> None:
    for _ in range(3):
        await scene.engine.report(alpha=0.6, requests=4)
    await scene.drift()
    await scene.score(await scene.claimed(), day=2.3, night=2.1)
    await scene.serves(scene.day)
    assert (await scene.deployment()).baseline_length == pytest.approx(2.1 + 0.095)  # the lower of served and scored
    assert await scene.settles(alpha=0.1) is DeploymentState.ROLLED_BACK
    undone = await scene.happened("pool-switch-undone")
    assert undone.data["version"] == scene.day.version
    await scene.control.converge()
    assert scene.engine.info.version == scene.night.version
    assert (await scene.control.plane.draft(scene.day.version)).quarantined == ""
    scouting = await scene.scouting()
    assert (scouting.stage, scouting.domains.current) == (Stage.IDLE, 0)
    assert scene.day.version in scouting.domains.others(scene.night.version)  # at home it is as good as ever
    head = await scene.control.controller.heads.current(scene.digest)
    assert head is not None
    assert head.version == scene.night.version


async def test_an_unanswered_drift_is_looked_at_again_and_holds_no_training_then(scene: Scene) -> None:
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    await scene.happened("pool-scored")
    scene.configure("pool", retry_s=0.001)

    async def again() -> bool:
        await scene.control.cycle()
        return (await scene.scouting()).cause is Cause.UNANSWERED

    await eventually(again)
    await scene.claimed(JobKind.TRAIN)
    scene.samples(await scene.control.context.now_ms() + 1)
    await scene.score(await scene.claimed(), day=2.4, night=1.3)
    await scene.serves(scene.day)


async def test_a_second_fall_before_the_drift_is_answered_is_looked_at_once_its_score_is_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.drift()
    first = await scene.claimed()
    await scene.score(first, day=1.2, night=1.3)
    await scene.happened("pool-scored")
    await scene.control.context.submit(first.job.spec, 1, "job-again")
    claim = await scene.control.context.jobs.claim("w", [JobKind.SCORE])
    assert claim is not None
    await scene.score(claim, day=2.4, night=1.3)
    found = Suspicion(scene.engine.info.incarnation, scene.night.version, answer=Answer.DRIFT, answered_by=claim.job.id)

    async def told(*_: object) -> Suspicion:
        return found

    monkeypatch.setattr(scene.control.controller.faults, "reconcile", told)
    await scene.serves(scene.day)
    assert (await scene.scouting()).heard == claim.job.id
    assert (await scene.happened("pool-scored")).data["cause"] == Cause.UNANSWERED


async def test_acceptance_that_rises_asks_the_pool_too_and_holds_no_training(scene: Scene) -> None:
    scene.configure("pool", retry_s=0.0)
    await scene.engine.report(alpha=0.4, requests=60, temperature=0.0)
    await scene.engine.report(alpha=0.8, requests=10, temperature=0.0)

    async def asked() -> bool:
        await scene.control.cycle()
        return (await scene.scouting()).stage is Stage.SAMPLING

    await eventually(asked)
    assert (await scene.scouting()).cause is Cause.RISE
    scene.samples(await scene.control.context.now_ms() + 1)
    claim = await scene.claimed()
    assert [candidate.version for candidate in claim.job.spec.candidates] == [scene.day.version]
    await scene.claimed(JobKind.TRAIN)
    assert (await scene.collection()).drifts == 0
    await scene.score(claim, day=2.9, night=2.5)
    await scene.serves(scene.day)
    assert (await scene.happened("pool-scored")).data["cause"] == "rise"


async def test_a_drift_that_comes_while_drafts_are_scored_is_the_one_that_counts(scene: Scene) -> None:
    await scene.drift()
    claim = await scene.claimed()
    await scene.put(dispatcher.STATE, replace(await scene.collection(), drifts=2))
    await scene.control.cycle()
    assert (await scene.scouting()).job != claim.job.id


@pytest.mark.parametrize("stage", ["submitting", "switching"])
async def test_who_takes_over_in_between_goes_on(scene: Scene, stage: str) -> None:
    """A leader that died behind the write: its state is there, and what it would have done next is not."""
    since_ms = await scene.drift()
    domains = Domains(0, 2, scene.night.version, (await scene.scouting()).domains.entries)
    now_ms = await scene.control.context.now_ms()
    common = Scouting(domains, drifts=1, since_ms=since_ms, deadline_ms=now_ms + 60_000, serving=scene.night.version)
    if stage == "submitting":
        await scene.put(scout.STATE, replace(common, stage=Stage.SCORING, job="job-that-never-came-to-be"))
        await scene.score(await scene.claimed(), day=2.3, night=1.3)
    else:
        resumed = domains.scored({scene.day.version: 2.3}, scene.day.version, now_ms)
        switching = replace(common, stage=Stage.SWITCHING, winner=scene.day.version, over=1.3, domains=resumed)
        await scene.put(scout.STATE, switching)
    await scene.serves(scene.day)
    assert await scene.settles() is DeploymentState.LIVE
    await scene.control.converge()
    assert (await scene.scouting()).domains.current == 1
    assert scene.engine.kinds().count("Swap") == 1


async def test_an_operator_s_word_ends_a_switch(scene: Scene) -> None:
    await scene.drift()
    await scene.score(await scene.claimed(), day=2.3, night=1.3)
    await scene.serves(scene.day)
    now_ms = await scene.control.context.now_ms()
    await scene.control.controller.heads.move(scene.digest, Head(scene.night.version, now_ms))
    await scene.control.cycle()
    assert (await scene.scouting()).stage is Stage.IDLE


async def test_deployments_make_the_domains(scene: Scene) -> None:
    await scene.put(scout.STATE, Scouting())
    await scene.control.cycle()
    domains = (await scene.scouting()).domains
    assert [(entry.number, entry.version) for entry in domains.entries] == [(1, scene.night.version)]
    await scene.put(dispatcher.STATE, replace(await scene.collection(), drifts=1))
    await scene.control.cycle()
    assert (await scene.scouting()).domains.current == 0
    await scene.control.plane.deploy(scene.day.version, None, "uid:1")
    await scene.settles()
    await scene.control.converge()
    domains = (await scene.scouting()).domains
    assert [entry.version for entry in domains.entries] == [scene.night.version, scene.day.version]
    assert domains.current == 2


async def test_a_draft_for_traffic_that_has_gone_is_kept_for_it_and_asked_about_at_once(scene: Scene) -> None:
    scene.configure("training", cool_down_s=600.0)
    claim = await scene.train()
    assert (await scene.collection()).domain == 2
    since_ms = await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    message = await scene.trained(claim)
    assert scene.late is not None
    assert message.startswith("pooled: tiny@")
    assert "domain 2: traffic is of domain 3 now" in message
    assert "Swap" not in scene.engine.kinds()
    assert await scene.pooled() == {1: scene.day.version, 2: scene.late.version}
    assert await scene.reserves() == {2}
    collection = await scene.collection()
    assert (collection.drifting, collection.not_before_ms, len(collection.spent)) == (True, 0, 1)
    again = await scene.claimed()  # retry_s is ten minutes
    assert {candidate.version for candidate in again.job.spec.candidates} == {scene.day.version, scene.late.version}
    assert [Path(path).name for path in again.job.spec.held_out if f"{since_ms + 1:013d}" in path] != []
    fresh = await scene.claimed(JobKind.TRAIN)  # for the traffic of now, without a cool-down
    assert (fresh.job.spec.draft, fresh.job.spec.recipe) == (scene.night.version, Recipe.DRIFT)
    assert (await scene.collection()).domain == 3
    await scene.score(again, day=1.2, night=1.3, late=1.9)
    await scene.serves(scene.late)
    assert (await scene.scouting()).domains.current == 0  # the best start only


async def test_traffic_that_was_known_to_nobody_gets_its_domain_though_it_has_gone(scene: Scene) -> None:
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    claim = await scene.claimed(JobKind.TRAIN)
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.1, night=1.2)
    assert (await scene.trained(claim)).startswith("pooled")
    assert scene.late is not None
    assert await scene.pooled() == {1: scene.day.version, 2: scene.night.version, 3: scene.late.version}
    assert (await scene.scouting()).domains.here == 4
    assert await scene.reserves() == {3}


@pytest.mark.parametrize("cause", [Cause.DRIFT, Cause.RISE])
async def test_a_pooled_draft_that_answers_the_change_stays_and_the_training_s_goes_to_its_own_domain(
    scene: Scene, cause: Cause
) -> None:
    claim = await scene.train()
    if cause is Cause.DRIFT:
        await scene.drift()
    else:
        now_ms = await scene.control.context.now_ms()
        scene.samples(now_ms + 1)
        asking = Scouting((await scene.scouting()).domains, Stage.SAMPLING, cause, since_ms=now_ms)
        await scene.put(scout.STATE, replace(asking, asked_ms=now_ms, deadline_ms=now_ms + 60_000))
    await scene.score(await scene.claimed(), day=2.3, night=1.3)
    await scene.serves(scene.day)
    assert await scene.settles() is DeploymentState.LIVE
    await scene.control.converge()
    assert (await scene.trained(claim)).startswith("pooled")
    assert scene.late is not None
    assert await scene.pooled() == {1: scene.day.version, 2: scene.late.version}
    assert scene.engine.info.version == scene.day.version
    assert scene.engine.kinds().count("Swap") == 1


async def test_while_it_is_not_known_why_acceptance_fell_no_new_draft_is_deployed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Suspicion(scene.engine.info.incarnation, scene.night.version)

    async def told(*_: object) -> Suspicion:
        return found

    monkeypatch.setattr(scene.control.controller.faults, "reconcile", told)
    claim = await scene.train()
    found = replace(found, answer=Answer.OPEN)
    staged = variant(scene.first, scene.root / "staged", 3)
    old, new = evaluation(scene.night.version, 2.2, 8), evaluation(checkpoint.version_of(staged), 2.6, 8)
    await scene.control.context.jobs.finish(claim, JobResult(str(staged), new.version, old, new, 1000, 1.0))
    await scene.happened("draft-added")
    for _ in range(3):
        await scene.control.cycle()
    assert "Swap" not in scene.engine.kinds()
    found = replace(found, answer=Answer.DRIFT)
    await scene.happened("drift-detected")
    scene.samples(await scene.control.context.now_ms() + 1)
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    assert (await scene.happened("training-ended")).message.startswith("pooled")
    assert "Swap" not in scene.engine.kinds()


async def test_traffic_that_came_back_before_the_training_ended_gets_its_draft(scene: Scene) -> None:
    claim = await scene.train()
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=2.2)  # as at home
    assert (await scene.trained(claim)).startswith("deployed")
    assert scene.late is not None
    await scene.control.converge()
    assert scene.engine.info.version == scene.late.version
    assert await scene.pooled() == {1: scene.day.version, 2: scene.late.version}


@pytest.mark.parametrize("reason", ["no pool", "version 0"])
async def test_where_nothing_else_would_be_better_the_draft_is_deployed_all_the_same(
    scene: Scene, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no pool":
        scene.configure("pool", enabled=False)
    find = Context.find_draft

    async def initial(context: Context, version: str) -> Draft | None:
        draft = await find(context, version)
        first = draft is not None and version == scene.night.version
        return replace(draft, origin=DraftOrigin.INIT) if draft is not None and first else draft

    claim = await scene.train()
    await scene.drift()
    if reason == "version 0":
        await scene.score(await scene.claimed(), day=1.2, night=1.3)
        monkeypatch.setattr(Context, "find_draft", initial)
    assert (await scene.trained(claim)).startswith("deployed")


async def test_a_worse_draft_for_traffic_that_has_gone_leaves_its_samples_to_its_domain(scene: Scene) -> None:
    claim = await scene.train()
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    assert (await scene.trained(claim, gain=-0.2)).startswith("worse")
    assert await scene.reserves() == {2}
    assert (await scene.collection()).drifting


@pytest.mark.parametrize("failpoint", ["dispatcher.stored", "dispatcher.pooled", "dispatcher.retired"])
async def test_who_takes_over_while_a_draft_is_kept_keeps_it_once(
    scene: Scene, failpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = await scene.train()
    await scene.drift()
    await scene.score(await scene.claimed(), day=1.2, night=1.3)
    hit = cut_at(monkeypatch, failpoint)
    assert (await scene.trained(claim)).startswith("pooled")
    assert hit == [failpoint]
    assert scene.late is not None
    assert await scene.pooled() == {1: scene.day.version, 2: scene.late.version}
    assert len(await scene.control.events("training-ended")) == 1


async def rests(scene: Scene) -> bool:
    """Traffic without a drafted token; whether the engine taps."""
    await scene.engine.report(alpha=0.0, requests=2, gamma=0)
    await scene.control.cycle()
    return scene.engine.info.capturing


async def test_gamma_0_is_left_again_by_shadow_acceptance(scene: Scene) -> None:
    """Probes are not to be afforded here; what the draft would accept is found out on tapped states."""
    scene.configure("training", enabled=False)
    scene.configure("speculation", probe_every_s=1e6, shadow_every_s=0.001)
    for _ in range(3):
        await scene.engine.report(alpha=0.01, requests=4)  # the draft is useless
    await scene.control.converge()
    assert set(scene.engine.info.gammas) == {0}
    await eventually(lambda: rests(scene))
    assert (await scene.scouting()).cause is Cause.SHADOW
    scene.samples(await scene.control.context.now_ms() + 1)
    scene.configure("speculation", shadow_every_s=600.0)
    await scene.score(await scene.claimed(), day=2.1, night=2.3)

    async def drafts() -> bool:
        await scene.control.cycle()
        return scene.engine.info.gammas[0] > 0

    await eventually(drafts)
    await scene.control.converge()
    assert not scene.engine.info.capturing  # only while it was wanted
    assert await scene.control.events("pool-switched") == []
    [explained] = await scene.control.plane.explain(ENGINE)
    assert explained.alpha is not None
    assert explained.alpha > 0.3


async def test_a_pooled_draft_that_wins_in_the_shadow_is_switched_to(scene: Scene) -> None:
    scene.configure("speculation", probe_every_s=1e6, shadow_every_s=0.001)
    await eventually(lambda: rests(scene))

    async def shadowed() -> bool:
        await rests(scene)
        return (await scene.scouting()).cause is Cause.SHADOW

    await eventually(shadowed)
    scene.samples(await scene.control.context.now_ms() + 1)
    await scene.score(await scene.claimed(), day=2.3, night=1.0)
    await scene.serves(scene.day)


@pytest.mark.parametrize("reason", ["never", "operator", "idle"])
async def test_no_shadow_where_none_is_wanted(scene: Scene, reason: str) -> None:
    scene.configure("training", enabled=False)
    scene.configure("speculation", probe_every_s=1e6, shadow_every_s=0.0 if reason == "never" else 0.001)
    if reason == "operator":
        await scene.control.plane.set_policy(SpeculationMode.OFF, 0, "uid:1")
    for _ in range(5):
        running = 0 if reason == "idle" else 1
        await scene.engine.report(alpha=0.0, requests=2, gamma=0, running=running)
        await scene.control.cycle()
    assert (await scene.scouting()).stage is Stage.IDLE
    assert not scene.engine.info.capturing


def test_a_choice_among_many_takes_more_certainty() -> None:
    config = GateConfig(min_requests=10, min_tokens=100)
    old = evaluation("0" * 64, 1.5, 12)
    lengths = tuple(1.7 + 0.01 * i + (0.35 if i % 2 else -0.35) for i in range(12))
    close = [replace(evaluation(f"{n}" * 64, 1.5, 12), lengths=lengths) for n in range(1, 9)]
    assert choose(old, close[:1], config).winner is close[0]
    assert choose(old, close, config).winner is None
    better = evaluation("9" * 64, 2.0, 12)
    found = choose(old, [*close, better], config)
    assert found.winner is better
    assert len(found.decisions) == 9
