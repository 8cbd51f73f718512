"""Deployments against an engine that behaves, refuses, lies, dies or serves worse: always the last good version in the end."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_draft, variant
from tests.dataplane import settings as tap_settings
from tests.engine_double import EngineDouble, Swaps, describe_double, running_double
from tests.support import cut_at, eventually
from tests.test_agent import FakeEngine
from tided.draft import checkpoint
from tided.engine.agent import EngineAgent
from tided.engine.tap import Tap
from tided.model.deployments import Deployment, DeploymentState
from tided.model.drafts import Draft
from tided.model.engines import EngineInfo
from tided.model.errors import Conflict, Refused
from tided.services.context import Context
from tided.wire import keys
from tided.wire.control import Body, Swap

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
ENGINE = "double"


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory, first: Path) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("drafts")
    return first, variant(first, root / "1", 1), variant(first, root / "2", 2)


@dataclass
class Scene:
    control: Control
    engine: EngineDouble
    old: Draft
    new: Draft
    ahead_ms: int = 0

    async def miss_the_deadline(self) -> None:
        """Once the swap was sent, let more time pass than it has; the clock that tided reads goes ahead."""

        async def sent() -> bool:
            await self.control.cycle()
            return "Swap" in self.engine.kinds()

        await eventually(sent)
        self.ahead_ms += round(self.control.context.config.deployment.swap_deadline_s * 1000) + 1

    async def deploy(self) -> Deployment:
        await self.control.cycle()
        (begun,) = await self.control.plane.deploy(self.new.version, ENGINE, "uid:7")
        assert begun.state is DeploymentState.PENDING
        return begun

    async def until(self, *states: DeploymentState) -> Deployment:
        async def reached() -> Deployment | None:
            await self.control.cycle()
            found = await self.control.controller.deployer.current(ENGINE)
            return found if found is not None and found.state in states else None

        return await eventually(reached)

    async def ended(self) -> Deployment:
        return await self.until(DeploymentState.LIVE, DeploymentState.ROLLED_BACK, DeploymentState.FAILED)

    async def serve(self, alpha: float, requests: int = 6) -> None:
        await self.engine.report(alpha=alpha, requests=requests)


@pytest.fixture
async def scene(
    valkey: Valkey, tmp_path: Path, target: Path, drafts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    config = settings(tmp_path, target)
    async with leading(valkey, config) as control:
        old, new = (store_draft(control, directory, target) for directory in drafts[:2])
        async with running_double(valkey, describe_double(target, drafts[0])) as engine:
            await eventually(lambda: control.context.engines.list())
            found, true_ms = Scene(control, engine, old, new), Context.now_ms

            async def now_ms(context: Context) -> int:
                return await true_ms(context) + found.ahead_ms

            monkeypatch.setattr(Context, "now_ms", now_ms)
            yield found


async def test_a_good_swap_goes_live_and_is_read_back(scene: Scene) -> None:
    await scene.deploy()
    watching = await scene.until(DeploymentState.WATCHING)
    assert scene.engine.info.version == scene.new.version
    assert watching.swap_s == pytest.approx(0.01)
    await scene.serve(0.7)
    live = await scene.ended()
    assert live.state is DeploymentState.LIVE
    assert live.watched.requests == 6
    assert scene.engine.kinds().count("Swap") == 1
    assert (await scene.control.plane.engines())[0].swaps == 1
    assert [e.kind for e in await scene.control.events("deployment-started", "draft-swapped", "draft-live")] == [
        "deployment-started",
        "draft-swapped",
        "draft-live",
    ]


@pytest.mark.parametrize("swaps", [Swaps.REFUSING, Swaps.LYING_REPLY, Swaps.LYING_BEAT])
async def test_a_swap_that_fails_or_is_a_lie_ends_on_the_old_version(scene: Scene, swaps: Swaps) -> None:
    scene.engine.swaps = swaps
    await scene.deploy()
    if swaps is Swaps.LYING_BEAT:
        await scene.miss_the_deadline()
    ended = await scene.ended()
    assert ended.state is DeploymentState.ROLLED_BACK
    assert scene.engine.info.version == scene.old.version
    expected = {
        Swaps.REFUSING: "does not load",
        Swaps.LYING_REPLY: "it reads back 000000000000",
        Swaps.LYING_BEAT: "did not report the new version",
    }
    assert expected[swaps] in ended.error
    assert (await scene.control.events("draft-rolled-back"))[0].subject == ENGINE


async def test_a_version_that_serves_worse_is_rolled_back_and_never_again(scene: Scene) -> None:
    await scene.control.cycle()
    await scene.serve(0.7)
    await scene.deploy()
    await scene.until(DeploymentState.WATCHING)
    await scene.serve(0.1)
    ended = await scene.ended()
    assert ended.state is DeploymentState.ROLLED_BACK
    assert scene.engine.info.version == scene.old.version
    assert "the incumbent had" in ended.error
    with pytest.raises(Refused, match="quarantine"):
        await scene.control.plane.deploy(scene.new.version, ENGINE, "uid:7")
    assert (await scene.control.plane.draft(scene.new.version)).quarantined


async def test_a_superseded_leader_puts_nothing_into_quarantine(scene: Scene, valkey: Valkey) -> None:
    """Its word would hold for ever: the disk knows no epochs."""
    await scene.control.cycle()
    await scene.serve(0.7)
    await scene.deploy()
    await scene.until(DeploymentState.WATCHING)
    epoch = scene.control.context.leadership.require()
    valkey.client.set(keys.epoch(), epoch + 5)
    await scene.serve(0.1)

    async def stepped_down() -> bool:
        await scene.control.cycle()
        return scene.control.context.leadership.epoch is None

    await eventually(stepped_down)
    assert not scene.control.context.drafts.get(scene.new.version).quarantined
    assert await scene.control.events("draft-quarantined") == []


@pytest.mark.parametrize("failpoint", ["deployer.restoring", "deployer.rolled_back"])
async def test_a_rollback_that_its_leader_does_not_survive_is_finished_by_the_next(
    scene: Scene, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    await scene.control.cycle()
    await scene.serve(0.7)
    await scene.deploy()
    await scene.until(DeploymentState.WATCHING)
    await scene.serve(0.1)
    hit = cut_at(monkeypatch, failpoint)

    async def cut() -> bool:
        await scene.control.cycle()
        return bool(hit)

    await eventually(cut)
    await scene.control.lease.release()
    async with leading(valkey, scene.control.context.config, "next") as scene.control:
        ended = await scene.ended()
    assert ended.state is DeploymentState.ROLLED_BACK
    assert scene.engine.info.version == scene.old.version
    assert scene.control.context.drafts.get(scene.new.version).quarantined
    assert scene.engine.kinds().count("Swap") == 2


async def test_an_engine_that_dies_in_mid_swap_gets_its_last_good_version_back(
    scene: Scene, valkey: Valkey, target: Path, drafts: tuple[Path, Path, Path]
) -> None:
    scene.engine.swaps = Swaps.DYING
    await scene.deploy()
    await scene.miss_the_deadline()
    await eventually(lambda: scene.engine.dead)
    async with running_double(valkey, describe_double(target, drafts[2])) as again:
        ended = await scene.ended()
        assert ended.state is DeploymentState.ROLLED_BACK
        assert again.info.version == scene.old.version
        assert not (await scene.control.plane.draft(scene.new.version)).quarantined  # the engine died, not the draft


async def test_an_engine_that_was_restarted_is_put_back_onto_its_version(
    scene: Scene, valkey: Valkey, target: Path, drafts: tuple[Path, Path, Path]
) -> None:
    await scene.deploy()
    await scene.until(DeploymentState.WATCHING)
    await scene.serve(0.7)
    await scene.ended()
    scene.engine.dead = True
    await eventually(lambda: not valkey.client.keys("*:info"))
    async with running_double(valkey, describe_double(target, drafts[0])) as again:
        await scene.until(DeploymentState.WATCHING)
        assert again.info.version == scene.new.version


async def test_a_draft_that_was_changed_on_disk_is_not_sent(scene: Scene) -> None:
    weights = scene.control.context.drafts.path(scene.new.version) / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    await scene.deploy()
    ended = await scene.ended()
    assert ended.state is DeploymentState.FAILED
    assert "changed on disk" in ended.error or "t2d" in ended.error
    assert "Swap" not in scene.engine.kinds()


async def test_engines_that_come_together_share_a_reading_of_the_draft(
    scene: Scene, valkey: Valkey, target: Path, drafts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = scene.control.context.drafts
    verify, readings, at_once = store.verify, list[int](), 0

    def counted(version: str) -> None:
        nonlocal at_once
        at_once += 1
        readings.append(at_once)
        verify(version)
        at_once -= 1

    monkeypatch.setattr(store, "verify", counted)
    async with contextlib.AsyncExitStack() as stack:
        doubles = [
            await stack.enter_async_context(running_double(valkey, describe_double(target, drafts[0], f"other-{i}")))
            for i in range(5)
        ]

        async def seen() -> bool:
            await scene.control.cycle()
            return len(scene.control.controller.monitor.views) == 6

        await eventually(seen)
        await scene.control.plane.deploy(scene.new.version, None, "uid:7")

        async def swapped() -> bool:
            await scene.control.cycle()
            return all(double.info.version == scene.new.version for double in (*doubles, scene.engine))

        await eventually(swapped)
    assert len(readings) < 6  # as a rule 2: whoever asks while one is read shares the next
    assert set(readings) == {1}


async def test_one_deployment_at_a_time_and_nothing_twice(scene: Scene) -> None:
    await scene.deploy()
    with pytest.raises(Conflict, match="under way"):
        await scene.control.plane.deploy(scene.old.version, ENGINE, "uid:7")
    await scene.until(DeploymentState.WATCHING)
    await scene.serve(0.7)
    await scene.ended()
    with pytest.raises(Conflict, match="already serves"):
        await scene.control.plane.deploy(scene.new.version, ENGINE, "uid:7")


async def test_rollback_by_the_operator(scene: Scene) -> None:
    await scene.deploy()
    await scene.until(DeploymentState.WATCHING)
    await scene.serve(0.7)
    await scene.ended()
    begun = await scene.control.plane.rollback(ENGINE, "uid:7")
    assert begun.version == scene.old.version
    await scene.until(DeploymentState.WATCHING)
    assert scene.engine.info.version == scene.old.version
    assert "uid:7" in (await scene.control.plane.draft(scene.new.version)).quarantined
    audits = await scene.control.events("audit")
    assert [(e.data["action"], e.data["actor"], e.data["result"]) for e in audits] == [
        ("deploy", "uid:7", "done"),
        ("rollback", "uid:7", "done"),
    ]


async def test_a_deployment_under_way_can_be_taken_back(scene: Scene) -> None:
    await scene.deploy()
    await scene.until(DeploymentState.WATCHING)
    taken = await scene.control.plane.rollback(ENGINE, "uid:7")
    assert taken.state is DeploymentState.RESTORING
    assert (await scene.ended()).state is DeploymentState.ROLLED_BACK
    assert scene.engine.info.version == scene.old.version


async def test_another_target_or_vocabulary_is_refused(scene: Scene) -> None:
    await scene.control.cycle()
    view = scene.control.controller.monitor.views[ENGINE]
    few = tuple(c for c in view.info.capabilities if c.value != "swap_vocabulary")
    view.info = replace(view.info, vocab_id="e" * 64, capabilities=few)
    with pytest.raises(Refused, match="vocabulary"):
        await scene.control.plane.deploy(scene.new.version, ENGINE, "uid:7")
    view.info = replace(view.info, target=replace(view.info.target, digest="f" * 64))
    with pytest.raises(Refused, match="target"):
        await scene.control.plane.deploy(scene.new.version, ENGINE, "uid:7")
    refused = await scene.control.events("audit")
    assert [event.data["result"].split(":")[0] for event in refused] == ["Refused", "Refused"]


class Remote(FakeEngine):
    """An engine of another host: what it is told to load it says it has loaded."""

    def __init__(self, described: EngineInfo) -> None:
        super().__init__()
        self._described, self.version = described, described.version

    def info(self) -> EngineInfo:
        return replace(self._described, engine="e1", incarnation="i-1", version=self.version)

    def apply(self, body: Body) -> dict[str, Any]:
        return super().apply(body) | {"seconds": 0.01}


async def test_an_engine_that_shares_no_filesystem_is_sent_the_draft_itself(
    valkey: Valkey, tmp_path: Path, target: Path, drafts: tuple[Path, Path, Path]
) -> None:
    """Over Redis, into its own cache, when there is a storage; the path otherwise."""
    config = settings(tmp_path, target, redis={"url": valkey.url}, storage={"url": f"file://{tmp_path}/storage"})
    engine = Remote(describe_double(target, drafts[0]))
    agent = EngineAgent(
        valkey.url, "e1", "i-1", engine, Tap(tap_settings()), report_interval_s=0.05, drafts_dir=tmp_path / "host"
    )
    async with leading(valkey, config) as control, anyio.create_task_group() as group:
        group.start_soon(control.context.courier.run)
        _, new = (store_draft(control, directory, target) for directory in drafts[:2])
        agent.start()
        await eventually(control.context.engines.list)
        await control.cycle()
        await control.plane.deploy(new.version, "e1", "uid:7")

        async def swapped() -> bool:
            await control.cycle()
            deployment = await control.controller.deployer.current("e1")
            return deployment is not None and deployment.state is DeploymentState.WATCHING

        await eventually(swapped)
        await anyio.to_thread.run_sync(agent.close)
        (swap,) = [body for body in engine.applied if isinstance(body, Swap)]
        assert swap.path == str(tmp_path / "host" / new.version)
        assert checkpoint.verify(Path(swap.path)) == new.version
        group.cancel_scope.cancel()
