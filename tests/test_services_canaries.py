"""A trained draft on its canary, engines that do not behave, and people in between: what the other engines get, and what they never get."""

from contextlib import suppress
from dataclasses import dataclass, replace

import pytest

from tests.engine_double import EngineDouble
from tests.pool_scene import Scene
from tests.support import eventually
from tided.machine.collection import Phase
from tided.model.deployments import Canary, CanaryState, DeploymentState
from tided.model.errors import Conflict, Refused, Unavailable
from tided.services.context import Context
from tided.services.controller import Controller
from tided.services.plane import ControlPlane

pytest_plugins = ("tests.pool_fixtures",)
pytestmark = pytest.mark.real
WATCHED = 12
"""Requests of a canary's watch; any other takes five."""


@dataclass
class Trial:
    """Engines that serve a trained draft, `before`, and accept alike; b is the busiest."""

    scene: Scene
    before: str
    ahead_ms: int = 0
    trainings: int = 0

    def __getattr__(self, name: str) -> EngineDouble:
        return self.scene.engines[name]

    async def candidate(self, seed: int = 2) -> str:
        """A draft that passes the gate; its version."""
        dispatcher, digest = self.scene.control.controller.dispatcher, self.a.info.target.digest
        self.trainings += 1
        created_ms = (await dispatcher.current(digest)).since_ms + 1_000 * (1 + self.trainings)
        self.scene.samples("a", self.scene.models.first, created_ms)
        if (await dispatcher.current(digest)).phase is Phase.STOPPED:
            await eventually(self.asked_to_train)
        return await self.scene.finish(await self.scene.claimed(), seed=seed)

    async def asked_to_train(self) -> bool:
        """After a draft that was no good nothing is trained until traffic drifts, or somebody asks for it."""
        await self.scene.control.cycle()
        with suppress(Refused):
            await self.scene.control.plane.train_now(None, "uid:1")
            return True
        return False

    async def canary(self) -> Canary:
        found = await self.scene.control.controller.canaries.current(self.a.info.target.digest)
        assert found is not None
        return found

    async def reaches(self, state: CanaryState, engine: str | None = None) -> Canary:
        async def reached() -> Canary | None:
            await self.scene.control.cycle()
            found = await self.scene.control.controller.canaries.current(self.a.info.target.digest)
            wanted = found is not None and found.state is state and engine in (None, found.engine)
            return found if wanted else None

        return await eventually(reached)

    async def on_trial(self, version: str, engine: str) -> None:
        """Once the version is watched on its canary."""
        await self.scene.serves(engine, version)
        await self.scene.reaches(engine, DeploymentState.WATCHING)
        assert (await self.canary()).engine == engine

    async def serve(self, requests: int = WATCHED, **alphas: float) -> None:
        """Requests that engines finish, at an acceptance each; seen by tided."""
        for name, alpha in alphas.items():
            await self.scene.engines[name].report(alpha=alpha, requests=requests)
        for _ in range(2):
            await self.scene.control.cycle()

    async def cycles(self, count: int = 5) -> None:
        for _ in range(count):
            await self.scene.control.cycle()

    def wait_out(self) -> None:
        """The clock that tided reads goes on by a canary's longest watch."""
        self.ahead_ms += round(self.scene.control.context.config.deployment.canary_s * 1000) + 1

    def swaps(self, name: str) -> int:
        return self.scene.engines[name].kinds().count("Swap")

    async def events(self) -> list[str]:
        kinds = [event.kind for event in await self.scene.control.events()]
        return [kind.removeprefix("canary-") for kind in kinds if kind.startswith("canary-")]


@pytest.fixture
async def trial(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Trial:
    context = scene.control.context
    deployment = context.config.deployment.model_copy(update={"canary_requests": WATCHED, "canary_s": 900.0})
    context.config = context.config.model_copy(update={"deployment": deployment})
    for name in "abc":
        await scene.connect(name, scene.models.first)
    found, true_ms = Trial(scene, await scene.trained()), Context.now_ms

    async def now_ms(context: Context) -> int:
        return await true_ms(context) + found.ahead_ms

    monkeypatch.setattr(Context, "now_ms", now_ms)
    await found.serve(8, a=0.7, c=0.7)
    await found.serve(20, b=0.7)
    return found


async def test_the_others_get_it_when_its_watch_has_passed(trial: Trial) -> None:
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    await trial.serve(WATCHED - 1, b=0.8)
    await trial.cycles()
    assert {trial.a.info.version, trial.c.info.version} == {trial.before}
    (shown,) = (await trial.scene.control.plane.status()).canaries
    assert (shown.version, shown.engine, shown.state) == (version, "b", CanaryState.WATCHING)
    await trial.serve(1, b=0.8)
    await trial.reaches(CanaryState.PASSED)
    for name in "ac":
        await trial.scene.serves(name, version)
    assert await trial.events() == ["started", "passed", "started", "passed"]  # the first: that of version 1
    for name in "ac":
        shared = await trial.scene.deployment(name)
        assert shared is not None
        assert (shared.reason, shared.trial) == ("shared", False)


async def test_one_that_serves_worse_never_reaches_the_others_and_never_comes_again(trial: Trial) -> None:
    swaps = {name: trial.swaps(name) for name in "ac"}
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    await trial.serve(5, a=0.7, b=0.2, c=0.7)  # so bad that nobody needs to see more
    failed = await trial.reaches(CanaryState.FAILED)
    assert "the incumbent had" in failed.reason
    assert trial.b.info.version == trial.before
    assert (await trial.scene.control.plane.draft(version)).quarantined
    # The same content again, from another job, and better than ever by the gate.
    assert await trial.candidate(seed=2) == version
    again = await trial.reaches(CanaryState.FAILED)
    assert (again.engine, again.job) != (failed.engine, failed.job)
    assert "is in quarantine" in again.reason
    await trial.cycles()
    assert {trial.scene.engines[name].info.version for name in "abc"} == {trial.before}
    assert {name: trial.swaps(name) for name in "ac"} == swaps
    assert (await trial.events())[-3:] == ["started", "failed", "failed"]


async def test_traffic_that_moves_for_all_is_nobody_s_fault(trial: Trial) -> None:
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    await trial.cycles(1)
    await trial.serve(a=0.35, c=0.35)
    await trial.serve(b=0.35)
    await trial.reaches(CanaryState.PASSED)
    assert not (await trial.scene.control.plane.draft(version)).quarantined
    deployment = await trial.scene.deployment("b")
    assert deployment is not None
    assert {peer.engine: peer.served.requests for peer in deployment.peers} == {"a": WATCHED, "c": WATCHED}


async def test_a_draft_whose_engines_die_does_not_go_round_all_of_them(trial: Trial) -> None:
    swaps = trial.swaps("c")
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    trial.b.dead = True
    await trial.on_trial(version, "a")
    assert (await trial.canary()).tried == ("b",)
    trial.a.dead = True
    withdrawn = await trial.reaches(CanaryState.WITHDRAWN)
    assert "neither b nor a" in withdrawn.reason
    await trial.cycles()
    assert (trial.c.info.version, trial.swaps("c")) == (trial.before, swaps)
    assert not (await trial.scene.control.plane.draft(version)).quarantined
    assert (await trial.events())[-5:] == ["started", "lost", "started", "lost", "withdrawn"]
    assert "failed: neither" in (await trial.scene.control.events("training-ended"))[-1].message


async def test_one_that_was_given_up_and_comes_back_goes_back(trial: Trial) -> None:
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    returning = trial.b.info
    trial.b.dead = True
    await trial.on_trial(version, "a")
    back = await trial.scene.connect("b", trial.scene.models.first)
    back.info = replace(returning, incarnation="run-again", version=version)  # it was never gone, only its heartbeat
    await trial.scene.reaches("b", DeploymentState.ROLLED_BACK)
    assert back.info.version == trial.before
    assert not (await trial.scene.control.plane.draft(version)).quarantined
    await trial.serve(a=0.8)
    await trial.reaches(CanaryState.PASSED)
    trial.wait_out()  # an engine that failed to take a version is not asked again at once
    await trial.scene.serves("b", version)


async def test_an_engine_without_requests_is_no_canary_where_others_have_some(trial: Trial) -> None:
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    await trial.cycles(1)
    await trial.serve(5, a=0.7, c=0.7)
    trial.wait_out()
    await trial.on_trial(version, "a")
    assert trial.b.info.version == trial.before
    assert (await trial.events())[-3:] == ["started", "lost", "started"]


async def test_without_any_traffic_nothing_speaks_against_it(trial: Trial) -> None:
    version = await trial.candidate()
    await trial.on_trial(version, "b")
    await trial.cycles(1)
    trial.wait_out()
    await trial.reaches(CanaryState.PASSED)
    await trial.scene.serves("a", version)


async def test_an_operator_can_end_it_either_way(trial: Trial) -> None:
    plane = trial.scene.control.plane
    bad = await trial.candidate()
    await trial.on_trial(bad, "b")
    with pytest.raises(Conflict, match="rollback b"):
        await plane.deploy((await plane.drafts())[0].version, None, "uid:1")
    assert not [
        event for event in await trial.scene.control.events("deployment-started") if event.data["reason"] == "operator"
    ]
    await plane.rollback("b", "uid:1")
    failed = await trial.reaches(CanaryState.FAILED)
    assert "uid:1" in failed.reason
    assert trial.b.info.version == trial.before
    for _ in range(2):  # in the first report after a swap two versions are mixed
        await trial.serve(20, b=0.7)
    good = await trial.candidate(seed=3)
    await trial.on_trial(good, "b")
    begun = await plane.deploy(good, None, "uid:1")
    assert sorted(deployment.engine for deployment in begun) == ["a", "c"]
    await trial.reaches(CanaryState.PASSED)
    for name in "ac":
        await trial.scene.serves(name, good)
    # Its watch goes on, and what it finds still holds for all.
    await trial.serve(b=0.1)
    for name in "abc":
        await trial.scene.serves(name, trial.before)
    assert (await plane.draft(good)).quarantined


@pytest.mark.parametrize(
    "place", ["canary.begun", "canary.placed", "canary.watching", "canary.promoted", "canary.passed"]
)
async def test_a_leader_that_takes_over_in_the_middle_goes_on(
    trial: Trial, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[str] = []
    engines: set[str] = set()

    def hit(name: str) -> None:
        if name == place and not died:
            died.append(name)
            raise Unavailable("the leader dies here")

    monkeypatch.setattr("tided.model.failpoints.hit", hit)
    version = await trial.candidate()

    async def over() -> bool:
        control = trial.scene.control
        if died and control.controller.cycles == 0:
            control.controller = Controller(control.context)  # what it knew by itself is gone
            control.controller.cycles = 1
            control.plane = ControlPlane(control.controller)
        await control.cycle()
        canary = await control.controller.canaries.current(trial.a.info.target.digest)
        if canary is not None and canary.version == version and canary.engine:
            engines.add(canary.engine)
            deployment = await trial.scene.deployment(canary.engine)
            if deployment is not None and deployment.state is DeploymentState.WATCHING:
                await trial.scene.engines[canary.engine].report(alpha=0.8, requests=3)
        return canary is not None and canary.version == version and canary.state is CanaryState.PASSED

    await eventually(over)
    assert died == [place]
    for name in "abc":
        await trial.scene.serves(name, version)
    (engine,) = engines
    assert trial.swaps(engine) == 2  # this, and version 1
    assert [event.message for event in await trial.scene.control.events("training-ended")][-1].startswith("deployed")


async def test_the_only_engine_waits_for_nobody(scene: Scene) -> None:
    await scene.connect("a", scene.models.first)
    context = scene.control.context
    deployment = context.config.deployment.model_copy(update={"canary_requests": 1_000})
    context.config = context.config.model_copy(update={"deployment": deployment})
    only = Trial(scene, await scene.trained())
    version = await only.candidate()
    await scene.serves("a", version)
    await scene.watched("a", alpha=0.8)
    await scene.reaches("a", DeploymentState.LIVE)
    assert await only.events() == []
    assert (await only.reaches(CanaryState.PASSED)).alone
