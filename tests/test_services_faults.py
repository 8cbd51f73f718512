"""The fault watch on a real Valkey: when a draft is scored, what is announced and when no more, and that a fault trains nothing."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_samples
from tests.engine_double import EngineDouble, describe_double, running_double
from tests.support import cut_at, eventually
from tided.model.deployments import Deployment, DeploymentState
from tided.model.drafts import Evaluation, SamplingScore
from tided.model.engines import Capability
from tided.model.jobs import Job, JobKind, JobResult, JobState
from tided.model.policy import SpeculationMode
from tided.policies.faults import WINDOW, Comparison, Verdict
from tided.policies.speedup import expected_length
from tided.policies.suspicion import TOKENS, Suspicion, cause
from tided.services import deployer
from tided.services.faults import AGAIN_MS, STATE, describe
from tided.services.monitor import EngineView

pytestmark = pytest.mark.real

ENGINE = "double"
HOUR_MS = 3_600_000
NOW_MS = 1_700_000_000_000
"""When the double's requests are reported: long ago, so that "since" is theirs."""


pytest_plugins = ("tests.tiny_fixtures",)


@dataclass
class Scene:
    control: Control
    engine: EngineDouble
    target: Path

    @property
    def view(self) -> EngineView:
        return self.control.controller.monitor.views[ENGINE]

    def samples(self, train: int = 20, held_out: int = 60, created_ms: int = NOW_MS + 1000) -> None:
        store_samples(self.control.context.config, self.target, ENGINE, train, held_out, created_ms)

    def switch_off(self) -> None:
        self.training(fault_check_s=0.0)

    def training(self, **changed: float) -> None:
        config = self.control.context.config
        training = config.training.model_copy(update=changed)
        self.control.context.config = config.model_copy(update={"training": training})

    async def captures(self) -> bool:
        await self.control.cycle()
        return ENGINE in self.control.controller.monitor.views and self.view.info.capturing

    async def scores(self) -> list[Job]:
        return [job for job in await self.control.context.jobs.list() if job.spec.kind is JobKind.SCORE]

    async def served(
        self, alpha: float, requests: int = WINDOW, temperature: float | None = 0.7, at_ms: int = NOW_MS
    ) -> None:
        """Reported and seen."""
        await self.engine.report(alpha=alpha, requests=requests, temperature=temperature, at_ms=at_ms)
        await self.control.cycle()

    async def served_now(self, alpha: float, requests: int = WINDOW) -> None:
        """After what was asked so far, with samples of it."""
        now_ms = await self.control.context.now_ms() + 1
        self.samples(train=1, created_ms=now_ms + 1)
        await self.served(alpha, requests, at_ms=now_ms)

    async def judge(self, **alphas: float) -> None:
        """The score that is asked for next says so, by temperature ("t07")."""

        async def asked() -> list[Job]:
            await self.control.cycle()
            return [job for job in await self.scores() if not job.state.final]

        (job,) = await eventually(asked)
        claim = await self.control.context.jobs.claim("w", [JobKind.SCORE])
        assert claim is not None
        assert claim.job.id == job.id
        sampling = tuple(score(int(name[1:]) / 10, alpha) for name, alpha in alphas.items())
        found = Evaluation(job.spec.draft, 4, (), (), (), (), sampling=sampling)
        await self.control.context.jobs.finish(claim, JobResult(version=job.spec.draft, candidate=found))
        await self.control.cycle()

    async def warnings(self) -> list[str]:
        return [problem for problem in (await self.control.plane.status()).problems if "acceptance length" in problem]


def score(temperature: float, alpha: float, likeliest: float = 0.0) -> SamplingScore:
    accepted = 50.0 * (expected_length(alpha, 4) - 1)
    return SamplingScore(temperature, (50.0,) * 20, (accepted,) * 20, (alpha,) * 4, (likeliest,) * 4)


@pytest.fixture
async def scene(valkey: Valkey, tmp_path: Path, target: Path, first: Path) -> AsyncIterator[Scene]:
    training: dict[str, object] = {"min_rows": 400, "fault_check_s": 0.001}
    async with AsyncExitStack() as stack:
        config = settings(tmp_path, target, training=training, samples={"shard_age_s": 0.001})
        control = await stack.enter_async_context(leading(valkey, config))
        engine = await stack.enter_async_context(running_double(valkey, describe_double(target, first)))
        scene = Scene(control, engine, target)
        await eventually(scene.captures)
        yield scene


async def test_a_fault_is_told_once_stays_a_warning_and_trains_nothing(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.6, temperature=0.0)
    await scene.judge(t00=0.6)
    assert await scene.warnings() == []
    await scene.served_now(0.25)
    await scene.judge(t00=0.6, t07=0.6)
    (event,) = await scene.control.events("engine-fault-suspected")
    assert event.subject == ENGINE
    assert event.data["temperature"] == 0.7
    assert (event.data["served"], event.data["scored"]) == (
        1.325,
        pytest.approx(2.3056, abs=0.001),
    )
    (warning,) = await scene.warnings()
    assert "requests at temperature 0.7 are served at acceptance length 1.32, their draft scores 2.31" in warning
    await scene.served_now(0.25)
    await scene.judge(t00=0.6, t07=0.6)
    assert len(await scene.control.events("engine-fault-suspected")) == 1
    scene.samples(created_ms=NOW_MS + 2000)  # as many rows as a training needs

    async def rich() -> bool:
        await scene.control.cycle()
        [status] = await scene.control.plane.engines()
        return status.training.rows >= status.training.rows_needed

    await eventually(rich)
    await scene.control.cycle()
    assert {job.spec.kind for job in await scene.control.context.jobs.list()} == {JobKind.SCORE}
    [status] = await scene.control.plane.engines()
    assert f"not training while a fault of {ENGINE} is suspected" in status.training.reason


async def test_it_is_cleared_when_they_agree_again_and_then_training_goes_on(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.25)
    await scene.judge(t07=0.6)
    assert await scene.warnings()
    await scene.served_now(0.6)
    await scene.judge(t07=0.6)
    assert await scene.warnings() == []
    (event,) = await scene.control.events("engine-fault-cleared")
    assert "agree again" in event.message
    scene.samples(created_ms=NOW_MS + 2000)

    async def trains() -> bool:
        await scene.control.cycle()
        return JobKind.TRAIN in {job.spec.kind for job in await scene.control.context.jobs.list()}

    await eventually(trains)


async def test_what_falls_at_a_suspected_engine_is_no_drift(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.4)
    await scene.judge(t07=0.6)
    await scene.served(0.05, 8)
    assert scene.view.trend.drifting
    await scene.control.cycle()
    assert await scene.control.events("drift-detected") == []


async def test_the_score_is_of_what_serves_on_what_was_served_meanwhile(scene: Scene) -> None:
    scene.samples(created_ms=NOW_MS - HOUR_MS)
    await scene.served(0.5)
    await scene.served(0.5, requests=3, temperature=0.3)
    await scene.control.cycle()
    assert await scene.scores() == []  # what is stored is older than any of these requests
    scene.samples(created_ms=NOW_MS + 2000)
    await scene.control.cycle()
    (job,) = await scene.scores()
    spec = job.spec
    assert spec.draft == scene.engine.info.version
    assert {Path(path).name for path in spec.held_out} == {
        f"{s}-{NOW_MS + 2000}.safetensors" for s in ("held-out", "train")
    }
    assert (spec.gamma, spec.options) == (4, {"held_out_tokens": TOKENS})
    assert [temperature for temperature, _ in spec.mix] == [0.3, 0.7]
    assert sum(share for _, share in spec.mix) == pytest.approx(1.0)
    assert spec.mix[0][1] < 0.05
    for _ in range(3):
        await scene.control.cycle()
    assert len(await scene.scores()) == 1


async def test_a_failed_score_says_nothing_and_the_next_waits_for_new_requests(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.25)
    await eventually(scene.scores)
    claim = await scene.control.context.jobs.claim("w", [JobKind.SCORE])
    assert claim is not None
    await scene.control.context.jobs.fail(claim, "broken", retryable=False)
    for _ in range(3):
        await scene.control.cycle()
    (job,) = await scene.scores()
    assert job.state is JobState.FAILED
    assert await scene.warnings() == []


@pytest.mark.parametrize("lacking", ["temperature", "last_hidden", "requests", "held_out", "switched_off"])
async def test_nothing_is_scored_that_could_say_nothing(scene: Scene, lacking: str) -> None:
    if lacking == "last_hidden":
        others = tuple(set(Capability) - {Capability.LAST_HIDDEN})
        scene.engine.info = replace(scene.engine.info, capabilities=others)

        async def known() -> bool:
            await scene.control.cycle()
            return scene.view.info.capabilities == others

        await eventually(known)  # with its next heartbeat
    if lacking == "switched_off":
        scene.switch_off()
    scene.samples(train=1, held_out=4 if lacking == "held_out" else 60)
    await scene.served(0.25, 8 if lacking == "requests" else WINDOW, None if lacking == "temperature" else 0.7)
    for _ in range(3):
        await scene.control.cycle()
    assert await scene.scores() == []


async def test_a_change_of_the_mix_is_no_drift(scene: Scene) -> None:
    """Greedy requests first, then sampled ones, which accept less: each keeps to its own level."""
    for temperature, alpha in ((0.0, 0.8), (1.0, 0.4), (0.0, 0.8)):
        await scene.served(alpha, 60, temperature)
        assert not scene.view.trend.drifting
    for _ in range(2):
        await scene.served(0.1, 5, 1.0)
    assert scene.view.trend.drifting


async def test_another_version_or_another_life_begins_without_suspicion(scene: Scene, valkey: Valkey) -> None:
    scene.samples(train=1)
    await scene.served(0.25)
    await scene.judge(t07=0.6)
    assert await scene.warnings()
    scene.engine.info = replace(scene.engine.info, incarnation="another-life")

    async def clear() -> bool:
        await scene.control.cycle()
        return await scene.warnings() == []

    await eventually(clear)


async def test_a_version_that_a_rollback_brought_back_serves_anew(scene: Scene) -> None:
    """What it scored before says nothing of the traffic of now, by which the other one may have failed."""
    scene.samples(train=1)
    await scene.served(0.6, temperature=0.0)
    await scene.judge(t00=0.6)
    watch, context = scene.control.controller.faults, scene.control.context
    before = await watch.current(ENGINE)
    assert [expected.own for expected in before.expected] == [True]
    epoch, rolled_back = context.leadership.require(), DeploymentState.ROLLED_BACK
    back = Deployment("dep-1", ENGINE, "e" * 64, before.version, rolled_back, epoch, NOW_MS, NOW_MS, "gate")
    await context.state.put(deployer.STATE, ENGINE, back, epoch)
    await scene.control.cycle()
    after = await watch.current(ENGINE)
    assert (after.version, after.deployment, after.expected) == (before.version, "dep-1", ())


async def test_what_is_hardly_served_any_more_keeps_nothing_from_training(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.25)
    await scene.judge(t07=0.6)
    assert await scene.warnings()
    for _ in range(10):
        await scene.served(0.6, WINDOW, temperature=0.0)
    assert await scene.warnings() == []


async def test_whoever_switches_the_check_off_is_heard(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.25)
    await scene.judge(t07=0.6)
    assert await scene.warnings()
    scene.switch_off()
    await scene.control.cycle()
    assert await scene.warnings() == []


def test_what_to_look_at_is_named() -> None:
    def told(kind: str, temperature: float, served: float, *sound: float) -> str:
        found = Comparison(temperature, served, 2.2, 1.81, 0.02, 99, 20, Verdict.FAULT)
        return describe(kind, found, cause(found, Suspicion(suspected=(found,), sound=sound)))

    assert '"draft_sample_method": "probabilistic"' in told("vllm", 0.7, 1.8, 0.0)
    assert "drafts its likeliest token" in told("redis", 0.7, 1.8, 0.0)
    assert "TIDED_MEND_SAMPLING" in told("vllm", 0.7, 1.3, 0.0)
    assert "draft_sample_method" not in told("vllm", 0.7, 1.3, 0.0)
    assert "layer ids" not in told("vllm", 0.7, 1.3, 0.0)
    assert "layer ids" in told("vllm", 0.0, 1.3)
    # Nobody knows whether greedy requests are served well.
    assert "layer ids" in told("vllm", 0.7, 1.3)
    assert "verifies sampled requests" in told("vllm", 0.7, 1.3)


async def drifting(scene: Scene, alpha: float) -> None:
    """Steady at first, scored as it serves; then lower, with new samples."""
    scene.samples(train=1)
    await scene.served(0.6)
    await scene.judge(t07=0.6)
    now_ms = await scene.control.context.now_ms() + 1
    await scene.served(alpha, 8, at_ms=now_ms)
    assert scene.view.trend.drifting
    scene.samples(created_ms=now_ms + 1)
    await scene.served(alpha, 40, at_ms=now_ms)


async def test_a_fall_is_no_drift_and_trains_nothing_before_a_score_has_said_so(scene: Scene) -> None:
    await drifting(scene, 0.3)
    await scene.control.cycle()
    assert await scene.control.events("drift-detected", "training-started") == []
    [status] = await scene.control.plane.engines()
    assert f"not training until a score says why the acceptance of {ENGINE} has fallen" in status.training.reason
    [explained] = await scene.control.plane.explain(None)
    assert explained.training == status.training.reason
    assert scene.view.info.capturing
    await scene.judge(t07=0.3)
    assert await scene.control.events("engine-fault-suspected") == []

    async def trains() -> bool:
        await scene.control.cycle()
        return JobKind.TRAIN in {job.spec.kind for job in await scene.control.context.jobs.list()}

    await eventually(trains)
    assert len(await scene.control.events("drift-detected")) == 1


async def test_a_fall_that_the_score_does_not_have_is_a_fault_and_no_drift(scene: Scene) -> None:
    await drifting(scene, 0.25)
    await scene.judge(t07=0.6)
    (event,) = await scene.control.events("engine-fault-suspected")
    assert {part["by"] for part in event.data["slices"]} >= {"position"}
    assert await scene.control.events("drift-detected", "training-started") == []


async def test_the_score_that_explains_a_fall_does_not_wait_for_the_next_check(scene: Scene) -> None:
    scene.samples(train=1)
    await scene.served(0.6)
    await scene.judge(t07=0.6)
    scene.training(fault_check_s=3600.0)
    await scene.served_now(0.6)
    count = len(await scene.scores())
    context = scene.control.context
    state = await scene.control.controller.faults.current(ENGINE)
    earlier = replace(state, asked_ms=state.asked_ms - AGAIN_MS)
    await context.state.put(STATE, ENGINE, earlier, context.leadership.require())
    await scene.control.cycle()
    assert len(await scene.scores()) == count
    await scene.served_now(0.25, 40)
    await scene.control.cycle()
    assert len(await scene.scores()) == count + 1


async def test_an_engine_of_which_too_little_is_drafted_drafts_until_it_is_known_why(scene: Scene) -> None:
    await drifting(scene, 0.25)
    faults, context = scene.control.controller.faults, scene.control.context
    state = replace(await faults.current(ENGINE), held=True)
    assert state.questioned
    scene.training(fault_check_s=3600.0)
    await context.state.put(STATE, ENGINE, state, context.leadership.require())

    async def drafts() -> bool:
        await scene.control.cycle()
        return min(scene.view.info.gammas) >= 1

    await eventually(drafts)
    await scene.control.plane.set_policy(SpeculationMode.OFF, 0, "test")

    async def obeys() -> bool:
        await scene.control.cycle()
        return not any(scene.view.info.gammas)

    await eventually(obeys)


async def test_a_missing_worker_keeps_training_waiting_no_longer_than_configured(scene: Scene) -> None:
    scene.training(fault_wait_s=0.5)
    await drifting(scene, 0.3)

    async def trains() -> bool:
        await scene.control.cycle()
        return JobKind.TRAIN in {job.spec.kind for job in await scene.control.context.jobs.list()}

    await eventually(trains)
    (told,) = await scene.control.events("acceptance-unexplained")
    assert "taken for drift" in told.message
    assert await scene.control.events("drift-detected")


async def test_a_score_whose_submission_was_cut_short_is_asked_for_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit = cut_at(monkeypatch, "faults.submitting")
    scene.samples(train=1)
    await scene.served(0.6, temperature=0.0)

    async def cut() -> bool:
        await scene.control.cycle()
        return bool(hit)

    await eventually(cut)
    await scene.control.cycle()
    assert (await scene.control.controller.faults.current(ENGINE)).job == ""
    assert await scene.scores() == []
    await scene.served_now(0.6)
    await scene.judge(t07=0.6)
    assert len(await scene.scores()) == 1
    assert await scene.warnings() == []
