"""How the self-test gates an engine, on a real Valkey with a double: what is done before, during and after it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_draft, store_samples, variant
from tests.dataplane import Producer, collector_process, store_at, stored_rows, tokens_of
from tests.engine_double import EngineDouble, describe_double, running_double
from tests.support import cut_at, eventually
from tided.backends.redis import RedisBackend
from tided.draft import checkpoint
from tided.draft.reference import sequences
from tided.model.deployments import DeploymentState
from tided.model.engines import EngineInfo, RequestStats
from tided.model.errors import Refused, Unavailable
from tided.model.ids import prompt_group
from tided.model.jobs import Chain, DraftFault, JobKind, JobResult, JobSpec, JobState, WorkerInfo
from tided.model.verification import Check, CheckOutcome, VerificationState
from tided.services import acceptance, selftest
from tided.services.acceptance import Drafted
from tided.services.probing import Prober, Round
from tided.store import aside
from tided.store.client import connect
from tided.store.ledger import read_ledger
from tided.store.samples import Split
from tided.training.reference import make_reference
from tided.wire import keys

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
GOOD = tuple(
    Check(name, CheckOutcome.OK, "fine")
    for name in ("token ids", "token alignment", "layer ids", "norms", "dtype", "accuracy")
)
UNDRAFTED = Drafted()
BAD = (Check("layer ids", CheckOutcome.FAILED, "layer 3, not 2"),)


@dataclass
class Scene:
    control: Control
    engine: EngineDouble
    root: Path
    answers: "list[tuple[Check, ...] | Exception]"
    """What the next rounds of probes give; the last one for ever."""
    rounds: list[int]
    """The attempts that were probed."""

    async def state(self) -> VerificationState | None:
        await self.control.cycle()
        verdict = await self.control.controller.selftest.current(self.engine.info)
        return verdict.state if verdict else None

    async def until(self, wanted: VerificationState) -> None:
        async def reached() -> bool:
            return await self.state() is wanted

        await eventually(reached, timeout_s=60)

    async def make_reference(self) -> None:
        """Do the reference job as a worker does."""

        async def claimed() -> bool:
            await self.control.cycle()
            claim = await self.control.context.jobs.claim("w", [JobKind.REFERENCE])
            if claim is None:
                return False
            staged = self.root / "staged"
            staged.mkdir()
            result = await asyncio.to_thread(make_reference, claim.job.spec, staged, lambda _: None)
            await self.control.context.jobs.finish(claim, result)
            return True

        await eventually(claimed, timeout_s=60)


@asynccontextmanager
async def scene_of(
    valkey: Valkey,
    root: Path,
    info: EngineInfo,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    drafted: Drafted = UNDRAFTED,
    **self_test: object,
) -> AsyncGenerator[Scene]:
    """`drafted`: how the probes of every round were drafted for."""
    config = settings(root, target, self_test={"enabled": True, **self_test})
    answers: list[tuple[Check, ...] | Exception] = [GOOD]

    judged: list[tuple[Check, ...]] = []
    rounds: list[int] = []

    async def probe(_: Prober, info: EngineInfo, attempt: int, gamma: int, *, again: bool) -> Round:
        rounds.append(attempt)
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        judged[:] = [answer]
        return Round((), replace(drafted, gamma=gamma))

    monkeypatch.setattr(selftest, "probe", probe)
    monkeypatch.setattr(selftest, "judge", lambda *_: judged[0])
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(leading(valkey, config))
        engine = await stack.enter_async_context(running_double(valkey, info))
        running = asyncio.create_task(control.controller.selftest.run())
        await eventually(control.context.engines.list)
        try:
            yield Scene(control, engine, root, answers, rounds)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def with_url(target: Path, first: Path) -> EngineInfo:
    return replace(describe_double(target, first), url="http://127.0.0.1:9")


async def test_nothing_is_captured_or_swapped_before_the_verdict(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch) as scene:
        control = scene.control
        await scene.control.converge()
        assert await scene.state() is VerificationState.PENDING
        assert "SetCapture" not in scene.engine.kinds()
        [job] = await control.context.jobs.list(10, (JobState.QUEUED,))
        assert job.spec.kind is JobKind.REFERENCE
        assert job.spec.token_ids == tuple(token for ids in sequences(scene.engine.info.target.vocab) for token in ids)
        draft = await control.plane.init_draft(target, "tiny", "uid:0")
        with pytest.raises(Refused, match="under way"):
            await control.plane.deploy(draft.version, "double", "uid:0")
        [status] = await control.plane.engines()
        assert status.training.state == "off"

        await scene.make_reference()
        await scene.until(VerificationState.VERIFIED)
        found = await aside.read_aside(control.context.redis, "double")
        assert found.incarnations == frozenset(), "its rows may train"
        await scene.control.converge()
        assert scene.engine.info.capturing
        assert await control.cycle() == []
        assert [event.subject for event in await control.events("engine-verified")] == ["double"]
        [status] = await control.plane.engines()
        assert status.verification is not None
        assert status.training.state == "collecting"


async def test_during_the_probes_every_row_is_set_aside(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch) as scene:
        scene.answers[:] = [Unavailable("no answer")]
        await scene.make_reference()
        await eventually_capturing(scene)
        found = await aside.read_aside(scene.control.context.redis, "double")
        assert found.incarnations == {scene.engine.info.incarnation}
        assert set(scene.engine.info.gammas) <= {0, *selftest.PROBE_GAMMAS}
        await scene.until(VerificationState.UNVERIFIED)
        await scene.control.converge()
        assert not scene.engine.info.capturing
        [problem] = [text for text in (await scene.control.plane.status()).problems if "not verified" in text]
        assert "no answer" in problem
        assert "self_test.allow_unverified" in problem


async def eventually_capturing(scene: Scene) -> None:
    async def on() -> bool:
        await scene.control.cycle()
        return scene.engine.info.capturing

    await eventually(on, timeout_s=60)


async def test_probes_are_drafted_for_with_a_number_that_the_engine_can_reach(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    whole = RedisBackend.set_schedule

    async def only_odd(self: RedisBackend, gammas: tuple[int, ...], epoch: int) -> None:
        asked.append(gammas)
        if any(gamma == 2 for gamma in gammas):
            raise Refused("built with steps 0, 1, 3")
        await whole(self, gammas, epoch)

    monkeypatch.setattr(RedisBackend, "set_schedule", only_odd)
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch) as scene:
        await scene.make_reference()
        await scene.until(VerificationState.VERIFIED)
        assert asked[:2] == [(2,), (3,)]
        await scene.control.converge()
        assert set(scene.engine.info.gammas) == {0}, "the policy's again"


async def test_a_mismatch_fails_closed_and_a_restart_is_tested_anew(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch) as scene:
        scene.answers[:] = [BAD]
        await scene.make_reference()
        await scene.until(VerificationState.MISMATCH)
        await scene.control.converge()
        assert not scene.engine.info.capturing
        draft = await scene.control.plane.init_draft(target, "tiny", "uid:0")
        with pytest.raises(Refused, match="layer 3, not 2"):
            await scene.control.plane.deploy(draft.version, "double", "uid:0")
        scene.answers[:] = [GOOD]
        scene.engine.info = replace(scene.engine.info, incarnation="run-again", gammas=(0,))
        await scene.until(VerificationState.VERIFIED)


async def test_unverified_engines_train_only_where_that_is_allowed(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = describe_double(target, first)
    async with scene_of(valkey, tmp_path, info, target, monkeypatch) as scene:
        await scene.control.converge()
        assert await scene.state() is VerificationState.UNVERIFIED
        assert not scene.engine.info.capturing
        context = scene.control.context
        allowed = context.config.self_test.model_copy(update={"allow_unverified": True})
        context.config = context.config.model_copy(update={"self_test": allowed})
        await scene.control.converge()
        assert scene.engine.info.capturing


async def test_an_engine_that_cannot_be_probed_is_listened_to(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first real samples, whose last states predict nothing, are found out and thrown away."""
    info = describe_double(target, first)
    async with scene_of(valkey, tmp_path, info, target, monkeypatch, allow_unverified=True) as scene:
        await scene.control.converge()
        assert scene.engine.info.capturing
        context = scene.control.context
        store_samples(context.config, target, "double", 4, 2, created_ms=await context.now_ms() + 1)
        assert context.samples.rows(Split.TRAIN) == 100
        await scene.until(VerificationState.MISMATCH)
        await scene.control.converge()
        assert not scene.engine.info.capturing
        assert context.samples.rows(Split.TRAIN) == context.samples.rows(Split.HELD_OUT) == 0
        assert context.samples.ledger().tested == 150
        [event] = await scene.control.events("engine-mismatch")
        assert "do not predict the emitted tokens" in event.message


async def test_a_failed_reference_job_leaves_the_engine_unverified(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch) as scene:
        await scene.control.cycle()
        claim = await scene.control.context.jobs.claim("w", [JobKind.REFERENCE])
        assert claim is not None
        await scene.control.context.jobs.fail(claim, "rope_type unknown", retryable=False)
        await scene.until(VerificationState.UNVERIFIED)
        [event] = await scene.control.events("engine-unverified")
        assert "rope_type unknown" in event.message


async def test_a_reference_that_comes_later_is_held_against_new_rows(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = with_url(target, first)
    async with scene_of(valkey, tmp_path, info, target, monkeypatch, reference_wait_s=0.1) as scene:
        await scene.until(VerificationState.UNVERIFIED)
        assert scene.rounds == [1]
        await scene.make_reference()
        await scene.until(VerificationState.VERIFIED)
        assert scene.rounds == [1, 1], "what was seen without it says nothing about layers"


async def test_another_targets_file_is_no_reference(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch) as scene:
        await scene.control.cycle()
        claim = await scene.control.context.jobs.claim("w", [JobKind.REFERENCE])
        assert claim is not None
        staged = variant(first, tmp_path / "draft", 1) / "model.safetensors"
        await scene.control.context.jobs.finish(claim, JobResult(staged=str(staged)))
        await scene.until(VerificationState.UNVERIFIED)


async def test_the_collector_keeps_probes_from_training_and_the_account_adds_up(valkey: Valkey, tmp_path: Path) -> None:
    """Rows of a probe's prompt, and all of an incarnation that is not trusted, are stored aside at once."""
    root = tmp_path / "samples"
    redis = connect(valkey.url)
    probe = b"".join(token.to_bytes(4, "little") for token in tokens_of("probe", 14)[:5])
    await aside.set_aside(redis, "e1", groups=[prompt_group(probe)])
    await aside.set_aside(redis, "e1", incarnation="i-2")
    slow = "[samples]\nheld_out_fraction = 0.3\nshard_age_s = 3600\n"
    with collector_process(valkey.url, root, config=slow):
        trusted, doubted = Producer.start(valkey.url, "i-1"), Producer.start(valkey.url, "i-2")
        for name in ("one", "probe", "two"):
            trusted.request(name)
        doubted.request("three")
        store = store_at(root)
        await eventually(lambda: store.rows(Split.ASIDE) == 12, timeout_s=60)
        assert trusted.close()
        assert doubted.close()
        await aside.release(redis, "e1", "i-2")
        assert (await aside.read_aside(redis, "e1")).incarnations == frozenset()

        async def arrived() -> bool:
            return (await redis.xlen("tided:{e1}:samples")) > 0

        await eventually(arrived, timeout_s=60)
    with collector_process(valkey.url, root):
        await eventually(lambda: store.ledger().stored == 48, timeout_s=60)

        async def settled() -> bool:
            totals = await read_ledger(redis, "e1")
            return (totals.stored, totals.tapped, totals.lost, totals.in_flight) == (48, 48, 0, 0)

        await eventually(settled, timeout_s=60)
    trained = {request for request, _, _ in stored_rows(root)} - {"probe"}
    assert {"one", "two"} <= trained
    assert store.rows(Split.TRAIN) + store.rows(Split.HELD_OUT) + store.rows(Split.ASIDE) == 48
    assert store.drop_aside("e1").rows >= 12
    assert "probe" not in {request for request, _, _ in stored_rows(root)}
    assert store.ledger().stored == 48
    await redis.aclose()


GROUPS = ("0a" * 16, "0b" * 16)
TAKEN = tuple(Chain(group, (2,) * 11, (2,) * 11) for group in GROUPS)
"""A draft whose two drafted tokens are always right: eleven tokens in four steps, and one more that the last step may count."""


def asked(accepted: int, version: str) -> Drafted:
    """Probes of which as many tokens were accepted, each."""
    report = RequestStats(11, 12, 11 - accepted, 22, accepted, version)
    return Drafted(GROUPS, ((report,), (report,)))


async def score(scene: Scene, chains: tuple[Chain, ...]) -> JobSpec:
    """Do the score job as a worker does."""
    jobs = scene.control.context.jobs

    async def claimed() -> JobSpec | None:
        await scene.control.cycle()
        claim = await jobs.claim("w", [JobKind.SCORE])
        if claim is None:
            return None
        await jobs.finish(claim, JobResult(chains=chains))
        return claim.job.spec

    return await eventually(claimed)


async def acceptance_of(scene: Scene) -> Check:
    verdict = await scene.control.controller.selftest.current(scene.engine.info)
    assert verdict is not None
    return next(check for check in verdict.checks if check.name == acceptance.NAME)


@asynccontextmanager
async def serving_a_trained_draft(
    valkey: Valkey, root: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch, accepted: int
) -> AsyncGenerator[Scene]:
    """A worker is there, and the engine boots on a draft of the store that is not version 0."""
    trained = variant(first, root / "trained", 1)
    info = with_url(target, trained)
    async with scene_of(valkey, root, info, target, monkeypatch, asked(accepted, info.version)) as scene:
        store_draft(scene.control, trained, target)
        await scene.control.context.workers.register(WorkerInfo("w", "w-1", "host", tuple(JobKind), "cpu", 1))
        await scene.make_reference()
        yield scene


async def test_a_draft_that_accepts_what_it_must_is_verified(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_a_trained_draft(valkey, tmp_path, target, first, monkeypatch, 7) as scene:
        spec = await score(scene, TAKEN)
        assert (spec.draft, spec.groups, spec.gamma) == (scene.engine.info.version, GROUPS, 2)
        assert Path(spec.draft_dir).is_dir()
        await scene.until(VerificationState.VERIFIED)
        assert (await acceptance_of(scene)).outcome is CheckOutcome.OK


async def test_a_draft_that_accepts_something_else_fails_closed_with_its_cause(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_a_trained_draft(valkey, tmp_path, target, first, monkeypatch, 0) as scene:
        nothing = tuple(Chain(group, (0,) * 11, (0,) * 11, DraftFault.FEATURES_ORDER) for group in GROUPS)
        await score(scene, (*TAKEN, *nothing))
        await scene.until(VerificationState.MISMATCH)
        await scene.control.converge()
        assert not scene.engine.info.capturing
        [event] = await scene.control.events("engine-mismatch")
        assert "accepted 0 drafted tokens" in event.message
        assert "aux states in the wrong order" in event.message


async def test_without_a_worker_the_draft_is_not_judged_and_says_so(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_a_trained_draft(valkey, tmp_path, target, first, monkeypatch, 7) as scene:
        valkey.client.delete(keys.worker("w"))
        await scene.until(VerificationState.VERIFIED)
        check = await acceptance_of(scene)
        assert check.outcome is CheckOutcome.SKIPPED
        assert "no worker" in check.measured


async def test_version_0_is_judged_by_the_draft_that_follows_it(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified all the time; found out by the round after the first swap, and no round follows that one."""
    trained = variant(first, tmp_path / "trained", 1)
    version = checkpoint.version_of(trained)
    async with scene_of(valkey, tmp_path, with_url(target, first), target, monkeypatch, asked(7, version)) as scene:
        await scene.control.context.workers.register(WorkerInfo("w", "w-1", "host", tuple(JobKind), "cpu", 1))
        await scene.make_reference()
        await scene.until(VerificationState.VERIFIED)
        assert "after the first swap" in (await acceptance_of(scene)).measured
        store_draft(scene.control, trained, target)
        await scene.control.converge()
        await scene.control.plane.deploy(version, "double", "uid:0")

        async def watched() -> bool:
            await scene.control.cycle()
            found = await scene.control.controller.deployer.current("double")
            return found is not None and found.state is DeploymentState.WATCHING

        await eventually(watched)
        await scene.engine.report(alpha=0.6, requests=6)
        spec = await score(scene, TAKEN)
        assert spec.draft == version
        assert Path(spec.previous_dir).name == checkpoint.version_of(first)
        assert await scene.state() is VerificationState.VERIFIED

        async def told() -> bool:
            await scene.control.cycle()
            return (await acceptance_of(scene)).outcome is CheckOutcome.OK

        await eventually(told)
        await scene.control.converge()
        assert scene.engine.info.capturing
        assert len(await scene.control.events("engine-verified")) == 1


@pytest.mark.parametrize("failpoint", ["selftest.reference", "selftest.probing", "selftest.done"])
async def test_a_self_test_that_was_cut_short_goes_on(
    valkey: Valkey, tmp_path: Path, target: Path, first: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    hit = cut_at(monkeypatch, failpoint)
    info = replace(describe_double(target, first), url="http://127.0.0.1:1")
    async with scene_of(valkey, tmp_path, info, target, monkeypatch) as scene:
        await scene.make_reference()
        await scene.until(VerificationState.VERIFIED)
        assert hit == [failpoint]
        assert len(await scene.control.context.jobs.list()) == 1
