"""The control cycle on a real Valkey: from samples to a served draft, idempotence, leadership, engines in doubt."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_samples, variant
from tests.engine_double import EngineDouble, describe_double, running_double
from tests.support import eventually
from tests.tiny import make_target
from tided.config import TargetConfig
from tided.draft import checkpoint
from tided.machine.collection import Collection, Phase
from tided.machine.placement import Capacity
from tided.model.deployments import DeploymentState
from tided.model.drafts import Evaluation
from tided.model.errors import Conflict, NotFound, Refused, Superseded, Unavailable
from tided.model.jobs import Job, JobKind, JobResult, JobSpec, JobState, Needs, Recipe, WorkerInfo, WorkerMark
from tided.model.policy import PolicySetting, SpeculationMode
from tided.services.context import Context
from tided.services.dispatcher import Dispatcher
from tided.store.jobs import Claim
from tided.store.samples import Split
from tided.wire import keys

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
ENGINE = "double"


@dataclass
class Scene:
    control: Control
    engine: EngineDouble
    target: Path
    first: Path
    root: Path

    def samples(self, train: int = 20, held_out: int = 10, created_ms: int = 1_000) -> None:
        store_samples(self.control.context.config, self.target, ENGINE, train, held_out, created_ms)

    async def claimed(self) -> Claim:
        """The training job, claimed as a worker does."""

        async def claim() -> Claim | None:
            await self.control.cycle()
            return await self.control.context.jobs.claim("w", [JobKind.TRAIN])

        return await eventually(claim)

    async def finish(self, claim: Claim, *, gain: float, requests: int = 8, seed: int = 1) -> str:
        """Finish a training with a draft that is better by `gain`; its version."""
        staged = variant(self.first, self.root / f"staged-{seed}", seed)
        version = checkpoint.version_of(staged)
        old = evaluation(claim.job.spec.draft, 1.5, requests)
        new = evaluation(version, 1.5 + gain, requests)
        await self.control.context.jobs.finish(claim, JobResult(str(staged), version, old, new, 1000, 1.0))
        return version

    async def rows(self, count: int) -> bool:
        """Whether, a cycle later, so many rows are shown as stored for the next training."""
        await self.control.cycle()
        [status] = await self.control.plane.engines()
        return status.training.rows == count

    async def phase(self) -> Phase:
        return (await self.collection()).phase

    async def collection(self) -> Collection:
        return await self.control.controller.dispatcher.current(self.engine.info.target.digest)


def evaluation(version: str, length: float, requests: int) -> Evaluation:
    groups = tuple(f"{i:032x}" for i in range(requests))
    lengths = tuple(length + 0.01 * i for i in range(requests))
    return Evaluation(version, 4, groups, lengths, (30,) * requests, (0.6, 0.5, 0.4, 0.3))


@pytest.fixture
async def scene(valkey: Valkey, tmp_path: Path, target: Path, first: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(leading(valkey, settings(tmp_path, target)))
        engine = await stack.enter_async_context(running_double(valkey, describe_double(target, first)))
        await eventually(control.context.engines.list)
        yield Scene(control, engine, target, first, tmp_path)


async def test_an_engine_on_its_own_version_0_is_adopted_and_captured(scene: Scene) -> None:
    await scene.control.converge()
    assert scene.engine.info.capturing
    assert "Swap" not in scene.engine.kinds()
    [status] = await scene.control.plane.engines()
    assert status.draft == "tiny@0"
    assert status.training.state == "collecting"
    assert set(status.info.gammas) == {0}
    assert await scene.control.cycle() == []  # reconcile(converged) == []


async def test_an_engine_without_a_draft_gets_version_0(valkey: Valkey, tmp_path: Path, target: Path) -> None:
    async with (
        leading(valkey, settings(tmp_path, target)) as control,
        running_double(valkey, describe_double(target, None)) as engine,
    ):

        async def served() -> str:
            await control.cycle()
            return engine.info.version

        version = await eventually(served)
        assert (await control.plane.draft(version)).number == 0


async def test_the_loop_from_samples_to_the_served_draft(scene: Scene) -> None:
    await scene.control.converge()
    scene.samples()
    claim = await scene.claimed()
    spec = claim.job.spec
    assert spec.recipe is Recipe.COLD
    assert (len(spec.shards), len(spec.held_out), spec.replay) == (1, 1, ())
    assert spec.draft == scene.engine.info.version
    version = await scene.finish(claim, gain=0.5)

    async def serving() -> bool:
        await scene.control.cycle()
        return scene.engine.info.version == version

    await eventually(serving)
    # Its gate's evaluation is the prior: it drafts before anything was served.
    await scene.control.converge()
    assert scene.engine.info.gammas[0] > 0
    [explained] = await scene.control.plane.explain(ENGINE)
    assert explained.policy == "threshold"
    assert explained.gammas == scene.engine.info.gammas
    assert explained.choices[0].speedups[explained.choices[0].gamma] > 1.0
    assert len(explained.conditional) > 0
    with pytest.raises(NotFound):
        await scene.control.plane.explain("other")
    await scene.engine.report(alpha=0.6, requests=6)

    async def live() -> bool:
        await scene.control.cycle()
        found = await scene.control.controller.deployer.current(ENGINE)
        return found is not None and found.state is DeploymentState.LIVE and await scene.phase() is Phase.COLLECTING

    await eventually(live)
    collection = await scene.collection()
    assert (collection.deployed, collection.trainings, collection.job) == (1, 1, "")
    draft = await scene.control.plane.draft(version)
    assert (draft.number, draft.parent, draft.job) == (1, spec.draft, claim.job.id)
    gate = (await scene.control.events("gate-decided"))[0]
    assert gate.data["verdict"] == "pass"
    assert gate.data["gain"] == pytest.approx(0.5)
    # Consumed: nothing fresh is left to train on; held-out shards stay for ever.
    await eventually(lambda: scene.rows(0))
    assert scene.control.context.samples.rows(Split.HELD_OUT) > 0


async def test_a_worse_draft_is_not_deployed(scene: Scene) -> None:
    await scene.control.converge()
    before = scene.engine.info.version
    scene.samples()
    await scene.finish(await scene.claimed(), gain=-0.2)

    async def judged() -> bool:
        await scene.control.cycle()
        return bool(await scene.control.events("training-ended"))

    await eventually(judged)
    await scene.control.converge()
    assert scene.engine.info.version == before
    assert "Swap" not in scene.engine.kinds()
    assert "worse" in (await scene.control.events("training-ended"))[0].message


async def test_training_waits_for_enough_held_out_requests(scene: Scene) -> None:
    await scene.control.converge()
    scene.samples(train=40, held_out=2)
    await eventually(lambda: scene.rows(1000))
    [status] = await scene.control.plane.engines()
    assert status.training.state == "collecting"
    assert "held-out" in status.training.reason


async def test_a_job_that_fails_for_good_costs_a_cool_down_only(scene: Scene) -> None:
    await scene.control.converge()
    scene.samples()
    claim = await scene.claimed()
    await scene.control.context.jobs.fail(claim, "no such target", retryable=False)
    again = await scene.claimed()
    assert again.job.id != claim.job.id
    ended = (await scene.control.events("training-ended"))[0]
    assert "no such target" in ended.message


async def test_a_dead_worker_s_job_is_taken_back_and_one_attempt_takes_effect(scene: Scene) -> None:
    await scene.control.converge()
    scene.samples()
    jobs = scene.control.context.jobs
    claim = await scene.claimed()
    jobs.lease_s, jobs._lease_ms = 0.05, 50  # pyright: ignore[reportPrivateUsage]
    await jobs.renew(claim)
    jobs.lease_s, jobs._lease_ms = 15.0, 15_000  # pyright: ignore[reportPrivateUsage]
    scene.control.context.clock = lambda: 1e9

    async def requeued() -> bool:
        scene.control.controller._reaped_s = float("-inf")  # pyright: ignore[reportPrivateUsage]
        await scene.control.cycle()
        job = await jobs.get(claim.job.id)
        return job is not None and job.state is JobState.QUEUED

    await eventually(requeued)
    assert (await scene.control.events("job-requeued"))[0].subject == claim.job.id


async def test_train_now_and_its_refusals(scene: Scene) -> None:
    await scene.control.converge()
    with pytest.raises(Refused, match="no samples"):
        await scene.control.plane.train_now(ENGINE, "uid:1")
    scene.samples(train=2, held_out=1)
    await scene.control.cycle()
    scene.control.controller.dispatcher._stockroom._cached.clear()  # pyright: ignore[reportPrivateUsage]
    job = await scene.control.plane.train_now(ENGINE, "uid:1")
    assert job.state is JobState.QUEUED
    assert await scene.phase() is Phase.TRAINING
    cancelled = await scene.control.plane.cancel(job.id, "uid:1")
    assert cancelled.state is JobState.CANCELLED
    assert [e.data["action"] for e in await scene.control.events("audit")] == ["train", "train", "cancel"]


async def test_a_repeated_submission_is_one_job(scene: Scene) -> None:
    """A leader that died between storing the job's id and submitting it: the next one submits the same job."""
    await scene.control.converge()
    scene.samples()

    async def training() -> bool:
        await scene.control.cycle()
        return await scene.phase() is Phase.TRAINING

    await eventually(training)
    before = await scene.collection()
    controller = scene.control.controller
    controller.dispatcher = Dispatcher(scene.control.context, controller.heads, controller.canaries, controller.scout)
    for _ in range(3):
        await scene.control.cycle()
    assert [job.id for job in await scene.control.plane.jobs(10)] == [before.job]


async def test_the_policy_setting_is_obeyed(scene: Scene) -> None:
    await scene.control.converge()
    plane = scene.control.plane
    assert await plane.set_policy(SpeculationMode.FIXED, 3, "uid:1") == PolicySetting(SpeculationMode.FIXED, 3)
    await scene.control.converge()
    assert set(scene.engine.info.gammas) == {3}
    [explained] = await plane.explain(None)
    assert (explained.policy, set(explained.gammas)) == ("operator", {3})
    await plane.set_policy(SpeculationMode.OFF, 0, "uid:1")
    await scene.control.converge()
    assert set(scene.engine.info.gammas) == {0}
    with pytest.raises(Refused, match="gamma 9"):
        await plane.set_policy(SpeculationMode.FIXED, 9, "uid:1")


async def test_an_engine_with_another_target_is_left_alone(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_target(tmp_path_factory.mktemp("other") / "other", seed=1)
    async with (
        leading(valkey, settings(tmp_path, target)) as control,
        running_double(valkey, describe_double(other, first)) as engine,
    ):
        await eventually(control.context.engines.list)
        assert await control.cycle() == []
        assert engine.commands == []
        status = await control.plane.status()
        assert "is none of the configured" in " ".join(status.problems)
        assert status.engines[0].training.state == "off"


async def test_a_missing_target_is_said_and_nothing_is_done(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path
) -> None:
    config = settings(tmp_path, tmp_path / "nowhere")
    async with leading(valkey, config) as control, running_double(valkey, describe_double(target, first)) as engine:
        await eventually(control.context.engines.list)
        assert await control.cycle() == []
        assert engine.commands == []
        assert any("target.path" in problem for problem in (await control.plane.status()).problems)


async def test_a_superseded_leader_changes_nothing(scene: Scene, valkey: Valkey) -> None:
    await scene.control.converge()
    control = scene.control
    old = control.context.leadership.require()
    valkey.client.set("tided:{ctl}:epoch", old + 5)
    with pytest.raises(Superseded):
        await control.plane.set_policy(SpeculationMode.OFF, 0, "uid:1")
    scene.samples()

    async def stepped_down() -> bool:
        await control.cycle()
        return control.context.leadership.epoch is None

    await eventually(stepped_down)
    assert await control.cycle() == []
    with pytest.raises(Unavailable, match="standby"):
        await control.plane.set_policy(SpeculationMode.OFF, 0, "uid:1")
    assert await control.plane.jobs(10) == ()


async def test_an_engine_that_has_seen_a_newer_epoch_makes_us_step_down(scene: Scene) -> None:
    await scene.control.converge()
    epoch = scene.control.context.leadership.require()
    scene.engine.info = replace(scene.engine.info, epoch=epoch + 1000, capturing=False)

    async def stepped_down() -> bool:
        await scene.control.cycle()
        return scene.control.context.leadership.epoch is None

    await eventually(stepped_down)
    highest = max(info.epoch for info in await scene.control.context.engines.list())
    assert (
        await scene.control.lease.acquire(highest) == highest + 1
        or scene.control.context.leadership.require() > highest
    )
    await scene.control.converge()
    assert scene.engine.info.capturing


async def test_drift_starts_a_drift_training_on_new_samples_only(scene: Scene) -> None:
    await test_the_loop_from_samples_to_the_served_draft(scene)
    for _ in range(12):
        await scene.engine.report(alpha=0.7, requests=4)
    await scene.control.cycle()
    scene.samples(created_ms=2_000)  # of before the drift
    for _ in range(3):
        await scene.engine.report(alpha=0.05, requests=4)

    async def noticed() -> bool:
        await scene.control.cycle()
        return bool(await scene.control.events("drift-detected"))

    await eventually(noticed)
    since_ms = (await scene.collection()).since_ms
    later = since_ms + 1000
    scene.samples(created_ms=later)
    claim = await scene.claimed()
    spec = claim.job.spec
    assert spec.recipe is Recipe.DRIFT
    assert [Path(path).name for path in spec.shards] == [f"train-{later:013d}.safetensors"]
    assert [Path(path).name for path in spec.held_out] == [f"held-out-{later:013d}.safetensors"]


async def test_a_training_that_failed_for_good_is_told_kept_and_done_again_by_a_new_job(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = scene.control
    await control.converge()
    scene.samples()
    claim = await scene.claimed()
    on_demand = control.context.config.training.model_copy(update={"enabled": False})
    monkeypatch.setattr(Context, "training_for", lambda *_: on_demand)  # or the next cycle would begin one by itself
    with pytest.raises(Conflict, match="is running"):
        await control.plane.retry(claim.job.id, "uid:1")
    await control.context.jobs.fail(claim, "shard 7 is not readable", retryable=False)
    await control.controller.dispatcher.reap()
    await control.controller.dispatcher.reap()
    assert [(event.subject, event.message) for event in await control.events("job-failed")] == [
        (claim.job.id, "shard 7 is not readable")
    ]
    assert [job.id for job in await control.plane.jobs(10, JobState.FAILED)] == [claim.job.id]
    if await scene.phase() is Phase.TRAINING:
        await control.cycle()
    again = await control.plane.retry(claim.job.id, "uid:1")
    assert again.id != claim.job.id
    assert (again.state, again.spec.shards) == (JobState.QUEUED, claim.job.spec.shards)
    assert (await scene.collection()).job == again.id, "its draft will be taken"


async def test_only_a_training_is_done_again(scene: Scene) -> None:
    control = scene.control
    spec = JobSpec(JobKind.SCORE, ENGINE, scene.engine.info.target.digest, str(scene.target))
    job = await control.context.jobs.submit(spec, control.context.leadership.require())
    await control.plane.cancel(job.id, "uid:1")
    with pytest.raises(Refused, match="asks again by itself"):
        await control.plane.retry(job.id, "uid:1")
    with pytest.raises(NotFound):
        await control.plane.retry("job-none", "uid:1")


async def test_a_worker_is_cordoned_by_name_and_uncordoned_also_when_it_is_away(scene: Scene) -> None:
    control = scene.control
    workers, plane = control.context.workers, control.plane
    info = WorkerInfo("w1", "w-1", "host", (JobKind.TRAIN,), "cpu", 1)
    await workers.register(info)
    with pytest.raises(NotFound, match="no worker w2"):
        await plane.cordon("w2", False, "uid:1")
    assert await plane.cordon("w1", True, "uid:1") is WorkerMark.DRAIN
    assert await plane.cordon("w1", False, "uid:1") is WorkerMark.CORDON
    await workers.remove(info)
    assert await workers.marked("w1") is WorkerMark.CORDON
    assert await plane.uncordon("w1", "uid:1") is WorkerMark.NONE
    actions = [event.data["action"] for event in await control.events("audit")]
    assert actions == ["cordon", "drain", "cordon", "uncordon"]


async def test_jobs_carry_what_their_target_s_configuration_says(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path
) -> None:
    needs = {"device": "cuda", "devices": 2, "memory_bytes": 8 << 30}
    one = TargetConfig(path=target, priority=7, training={**needs, "batch_tokens": 4096})
    config = settings(tmp_path, target).model_copy(update={"target": (one,)})
    async with (
        leading(valkey, config) as control,
        running_double(valkey, describe_double(target, first)) as engine,
    ):
        await eventually(control.context.engines.list)
        scene = Scene(control, engine, target, first, tmp_path)
        await control.converge()
        scene.samples()

        async def queued() -> Job | None:
            await control.cycle()
            return next(iter(await control.context.jobs.list(states=[JobState.QUEUED])), None)

        spec = (await eventually(queued)).spec
        assert (spec.priority, spec.needs) == (7, Needs("cuda", 2, 8 << 30))
        assert spec.options["batch_tokens"] == 4096
        assert await control.context.jobs.claim("w", [JobKind.TRAIN]) is None
        assert await control.context.jobs.claim("w", [JobKind.TRAIN], Capacity("cuda", 2, 8 << 30)) is not None


async def test_what_happens_to_workers_is_told_once(scene: Scene, valkey: Valkey) -> None:
    control, workforce = scene.control, scene.control.controller.workforce
    workers = control.context.workers

    def worker(name: str, incarnation: str = "i1") -> WorkerInfo:
        return WorkerInfo(name, incarnation, "host", (JobKind.TRAIN,), "cpu", 1)

    await workers.register(worker("old"))
    await workforce.look(now_ms=1_000)
    for name in ("stays", "leaves", "dies"):
        await workers.register(worker(name))
    await workforce.look(now_ms=2_000)
    await workers.register(worker("stays", "i2"))
    await workers.remove(worker("leaves"))
    valkey.client.delete(keys.worker("dies"))
    for now_ms in (3_000, 10_000, 20_000, 30_000):
        await workforce.look(now_ms)
    told = [(event.kind, event.subject) for event in await control.events() if event.kind.startswith("worker-")]
    assert sorted(told) == [
        ("worker-joined", "dies"),
        ("worker-joined", "leaves"),
        ("worker-joined", "stays"),
        ("worker-left", "leaves"),
        ("worker-lost", "dies"),
        ("worker-restarted", "stays"),
    ]
