"""Several engines and targets under one tided, on a real Valkey: what engines of one target share, and what each keeps."""

from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import leading, settings, store_draft, variant
from tests.engine_double import describe_double
from tests.pool_scene import Models, Scene
from tests.support import eventually
from tests.tiny import make_draft
from tided.config import TargetConfig
from tided.draft import checkpoint
from tided.machine.collection import Phase
from tided.model.deployments import DeploymentState
from tided.model.engines import Capability
from tided.model.errors import Refused
from tided.model.jobs import JobKind, Recipe

pytest_plugins = ("tests.pool_fixtures",)
pytestmark = pytest.mark.real


async def test_each_target_has_its_own_lineage_samples_and_training(scene: Scene) -> None:
    for name, target in (("a", scene.models.first), ("b", scene.models.first), ("c", scene.models.second)):
        await scene.connect(name, target)
    await scene.control.converge()
    assert [(await scene.status(name)).draft for name in "abc"] == ["first@0", "first@0", "other@0"]
    scene.samples("a", scene.models.first, 1_000, train=12, held_out=6)
    scene.samples("b", scene.models.first, 2_000, train=12, held_out=6)
    scene.samples("c", scene.models.second, 3_000, train=12, held_out=6)
    claim = await scene.claimed()
    spec = claim.job.spec
    assert (spec.engine, spec.lineage, spec.target_dir) == ("a,b", "first", str(scene.models.first))
    assert sorted(Path(path).name for path in spec.shards) == [f"train-{ms:013d}.safetensors" for ms in (1_000, 2_000)]
    assert len(spec.held_out) == 2
    # One decision for both, and none for the other, which asks for more rows.
    for _ in range(3):
        await scene.control.cycle()
    assert await scene.control.context.jobs.claim("w", [JobKind.TRAIN]) is None
    status = await scene.status("c")
    assert (status.training.state, status.training.rows, status.training.rows_needed) == ("collecting", 300, 400)
    assert {(await scene.status(name)).training.job for name in "ab"} == {claim.job.id}


async def test_two_targets_train_side_by_side(scene: Scene) -> None:
    await scene.connect("a", scene.models.first)
    await scene.connect("c", scene.models.second)
    await scene.control.converge()
    scene.samples("a", scene.models.first, 1_000)
    scene.samples("c", scene.models.second, 2_000)
    claims = [await scene.claimed(), await scene.claimed()]
    assert {claim.job.spec.lineage for claim in claims} == {"first", "other"}
    versions = {
        claim.job.spec.lineage: await scene.finish(claim, seed=seed) for seed, claim in enumerate(claims, start=1)
    }
    await scene.serves("a", versions["first"])
    await scene.serves("c", versions["other"])
    for name in "ac":
        await scene.watched(name)
        await scene.reaches(name, DeploymentState.LIVE)
    assert [(await scene.status(name)).draft for name in "ac"] == ["first@1", "other@1"]


async def test_a_draft_is_proved_on_one_engine_before_the_others_get_it(scene: Scene) -> None:
    a, b = await scene.connect("a", scene.models.first), await scene.connect("b", scene.models.first)
    await scene.control.converge()
    before = a.info.version
    await b.report(alpha=0.3, requests=4)  # b is the busier one
    scene.samples("a", scene.models.first, 1_000)
    version = await scene.finish(await scene.claimed())
    await scene.serves("b", version)
    for _ in range(5):
        await scene.control.cycle()
    assert a.info.version == before
    await scene.watched("b")
    await scene.reaches("b", DeploymentState.LIVE)
    await scene.serves("a", version)
    shared = await scene.deployment("a")
    assert shared is not None
    assert shared.reason == "shared"
    await scene.watched("a")
    await scene.reaches("a", DeploymentState.LIVE)
    assert [len(await scene.control.events(kind)) for kind in ("training-ended", "gate-decided", "draft-live")] == [
        1,
        1,
        2,
    ]
    await scene.control.converge()
    assert [engine.kinds().count("Swap") for engine in (a, b)] == [1, 1]


async def test_engines_keep_their_own_schedule(scene: Scene) -> None:
    a = await scene.connect("a", scene.models.first)
    b = await scene.connect("b", scene.models.first, gamma_max=2, max_batch=2)
    await scene.trained()
    await scene.control.converge()
    assert 0 < a.info.gammas[0] <= 4
    assert 0 < b.info.gammas[0] <= 2
    assert (len(a.info.gammas), len(b.info.gammas)) == (4, 2)


async def test_a_version_that_serves_worse_anywhere_is_taken_back_everywhere(scene: Scene) -> None:
    a, b = await scene.connect("a", scene.models.first), await scene.connect("b", scene.models.first)
    await scene.control.converge()
    before = a.info.version
    for _ in range(3):
        await b.report(alpha=0.8, requests=4)
    await scene.control.cycle()
    await a.report(alpha=0.1, requests=40)  # the busier one
    scene.samples("a", scene.models.first, 1_000)
    version = await scene.finish(await scene.claimed())
    await scene.serves("a", version)
    await scene.watched("a")
    await scene.serves("b", version)
    await scene.watched("b", alpha=0.1)
    await scene.reaches("b", DeploymentState.ROLLED_BACK)
    await scene.serves("a", before)
    assert b.info.version == before
    deployment = await scene.deployment("a")
    assert deployment is not None
    assert (deployment.reason, deployment.version, deployment.baseline_length) == ("rollback", before, 0.0)
    assert (await scene.control.plane.draft(version)).quarantined
    await scene.watched("a", alpha=0.01)  # worse than the version that it comes from: it stays all the same
    await scene.reaches("a", DeploymentState.LIVE)
    await scene.control.converge()
    assert {a.info.version, b.info.version} == {before}
    assert not (await scene.control.plane.draft(before)).quarantined


async def test_an_operator_s_rollback_of_one_holds_for_all(scene: Scene) -> None:
    a, b = await scene.connect("a", scene.models.first), await scene.connect("b", scene.models.first)
    await scene.control.converge()
    before = a.info.version
    version = await scene.trained()
    await scene.control.plane.rollback("a", "uid:1")
    await scene.serves("a", before)
    await scene.serves("b", before)
    assert (await scene.control.plane.draft(version)).quarantined
    assert b.info.version == before


async def test_one_that_joins_later_or_comes_back_gets_the_shared_draft(scene: Scene) -> None:
    await scene.connect("a", scene.models.first)
    version = await scene.trained()
    bare = await scene.connect("late", scene.models.first, version="", vocab_id="")
    await scene.serves("late", version)
    assert (await scene.control.events("deployment-started"))[-1].data["reason"] == "shared"
    await scene.watched("late")
    await scene.reaches("late", DeploymentState.LIVE)
    first = describe_double(scene.models.first, scene.models.drafts[scene.models.first], "late")
    bare.info = first  # another incarnation, on version 0
    await scene.serves("late", version)
    assert (await scene.control.events("deployment-started"))[-1].data["reason"] == "restart"


async def test_one_that_cannot_take_the_shared_draft_goes_on_with_its_own_and_says_so(
    scene: Scene, tmp_path: Path
) -> None:
    await scene.connect("a", scene.models.first)
    version = await scene.trained()
    smaller = make_draft(scene.models.first, tmp_path / "smaller", draft_vocab=32)
    store_draft(scene.control, smaller, scene.models.first)
    fixed = tuple(capability for capability in Capability if capability is not Capability.SWAP_VOCABULARY)
    odd = await scene.connect("odd", scene.models.first, smaller, capabilities=fixed)
    await scene.control.converge()
    assert odd.info.version == checkpoint.version_of(smaller) != version
    assert odd.info.capturing  # what it serves is as good to train on as the others' is
    problems = (await scene.control.plane.status()).problems
    assert any("engine odd cannot share" in problem and "vocabulary" in problem for problem in problems)
    scene.samples("odd", scene.models.first, 5_000)
    spec = (await scene.claimed()).job.spec
    assert spec.draft == version
    assert spec.options == {"adapt_vocabulary": False}


async def test_drift_on_one_engine_is_one_training_for_all(scene: Scene) -> None:
    a, b = await scene.connect("a", scene.models.first), await scene.connect("b", scene.models.first)
    await scene.trained()
    for engine in (a, b):
        for _ in range(12):
            await engine.report(alpha=0.7, requests=4)
    await scene.control.cycle()
    for _ in range(3):
        await b.report(alpha=0.05, requests=4)

    async def noticed() -> bool:
        await scene.control.cycle()
        return bool(await scene.control.events("drift-detected"))

    await eventually(noticed)
    assert [event.subject for event in await scene.control.events("drift-detected")] == ["b"]
    collection = await scene.control.controller.dispatcher.current(a.info.target.digest)
    assert (collection.low, collection.drifts, collection.phase) == (("b",), 1, Phase.COLLECTING)
    scene.samples("a", scene.models.first, collection.since_ms + 1_000, train=10, held_out=5)
    scene.samples("b", scene.models.first, collection.since_ms + 2_000, train=10, held_out=5)
    claim = await scene.claimed()
    assert claim.job.spec.recipe is Recipe.DRIFT
    assert len(claim.job.spec.shards) == 2
    # The canary's verdict answers the drift; that b still serves the old draft for a moment is not another one.
    version = await scene.finish(claim, seed=2)
    canary = await scene.canary(version)
    for name in sorted("ab", key=lambda name: name != canary):
        await scene.watched(name, alpha=0.8)
        await scene.reaches(name, DeploymentState.LIVE)
    assert len(await scene.control.events("drift-detected")) == 1


async def test_a_canary_that_dies_is_replaced(scene: Scene) -> None:
    a, b = await scene.connect("a", scene.models.first), await scene.connect("b", scene.models.first)
    await scene.control.converge()
    await b.report(alpha=0.3, requests=4)
    scene.samples("a", scene.models.first, 1_000)
    version = await scene.finish(await scene.claimed())
    await scene.serves("b", version)
    b.dead = True
    await scene.serves("a", version)
    await scene.watched("a")
    await scene.reaches("a", DeploymentState.LIVE)
    assert a.info.version == version
    assert "deployed" in (await scene.control.events("training-ended"))[0].message


async def test_what_an_operator_deploys_onto_all_is_what_joins_get(scene: Scene, tmp_path: Path) -> None:
    await scene.connect("a", scene.models.first)
    await scene.connect("c", scene.models.second)
    await scene.control.converge()
    mine = store_draft(
        scene.control, variant(scene.models.drafts[scene.models.first], tmp_path / "mine", 3), scene.models.first
    )
    await scene.connect("has-it", scene.models.first, tmp_path / "mine")
    await scene.control.converge()
    begun = await scene.control.plane.deploy(mine.version, None, "uid:1")
    assert [deployment.engine for deployment in begun] == ["a"]  # the only one that fits and serves another
    await scene.serves("a", mine.version)
    await scene.connect("late", scene.models.first)
    await scene.serves("late", mine.version)
    assert scene.engines["c"].kinds().count("Swap") == 0


async def test_train_now_needs_a_name_only_where_targets_differ(scene: Scene) -> None:
    await scene.connect("a", scene.models.first)
    await scene.connect("b", scene.models.first)
    await scene.control.converge()
    scene.samples("b", scene.models.first, 1_000, train=2, held_out=1)

    async def counted() -> bool:
        await scene.control.cycle()
        return (await scene.status("a")).training.rows == 50

    await eventually(counted)
    job = await scene.control.plane.train_now(None, "uid:1")
    assert job.spec.engine == "a,b"
    await scene.control.plane.cancel(job.id, "uid:1")
    await scene.connect("c", scene.models.second)
    await scene.control.converge()
    with pytest.raises(Refused, match="name the engine: a, b, c"):
        await scene.control.plane.train_now(None, "uid:1")


async def test_the_same_model_configured_twice_is_said(valkey: Valkey, tmp_path: Path, models: Models) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(models.first)
    config = settings(tmp_path, models.first).model_copy(
        update={"target": (TargetConfig(path=models.first), TargetConfig(path=twin, name="twin"))}
    )
    async with leading(valkey, config) as control:
        await control.cycle()
        assert any("is the same model as target first" in text for text in (await control.plane.status()).problems)
