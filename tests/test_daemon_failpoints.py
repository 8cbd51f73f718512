"""kill -9 of tided at every failpoint between samples and the served draft: its successor converges, and nothing happens twice."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bench.configs import write_config
from tests.conftest import Valkey
from tests.control import leading, store_draft, store_samples, variant
from tests.daemon_run import tided
from tests.engine_double import describe_double, running_double
from tests.support import eventually
from tided.api.client import Client
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.machine.collection import Collection
from tided.model.deployments import DeploymentState
from tided.model.drafts import Evaluation
from tided.model.jobs import JobKind, JobResult
from tided.model.status import EngineStatus
from tided.policies.domains import Domain, Domains
from tided.services import dispatcher, scout
from tided.services.scout import Scouting
from tided.store.client import connect
from tided.store.jobs import JobStore
from tided.store.state import StateStore

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
ENGINE = "double"
FAILPOINTS = (
    "collection.training",
    "dispatcher.submitting",
    "dispatcher.submitted",
    "dispatcher.stored",
    "canary.begun",
    "canary.placed",
    "canary.watching",
    "canary.promoted",
    "canary.passed",
    "deployer.sending",
    "deployer.sent",
    "deployer.swapping",
    "deployer.watching",
    "deployer.live",
    "dispatcher.retired",
)

POOL_FAILPOINTS = ("scout.submitting", "scout.submitted", "scout.switching", "scout.moved", "deployer.sent")


async def work(url: str, first: Path, root: Path, stop: asyncio.Event) -> None:
    """A worker that answers every training with the same better draft, until `stop`."""
    redis = connect(url)
    jobs = JobStore(redis)
    staged = variant(first, root / "staged", 1)
    version = checkpoint.version_of(staged)

    def scored(draft: str, length: float) -> Evaluation:
        groups = tuple(f"{i:032x}" for i in range(8))
        return Evaluation(draft, 4, groups, (length,) * 8, (30,) * 8, (0.6, 0.5, 0.4, 0.3))

    try:
        while not stop.is_set():
            claim = await jobs.claim("w", [JobKind.TRAIN])
            if claim is None:
                await asyncio.sleep(0.02)
                continue
            old, new = scored(claim.job.spec.draft, 1.5), scored(version, 2.0)
            await jobs.finish(claim, JobResult(str(staged), version, old, new, 1000, 1.0))
    finally:
        await redis.aclose()


async def score(url: str, day: str, stop: asyncio.Event) -> None:
    """A worker that finds `day` to be the better draft, until `stop`."""
    redis = connect(url)
    jobs = JobStore(redis)
    groups = tuple(f"{i:032x}" for i in range(20))

    def scored(draft: str) -> Evaluation:
        lengths = (2.3 if draft == day else 1.3,) * 20
        return Evaluation(draft, 4, groups, lengths, (30,) * 20, (0.6, 0.5, 0.4, 0.3))

    try:
        while not stop.is_set():
            claim = await jobs.claim("w", [JobKind.SCORE])
            if claim is None:
                await asyncio.sleep(0.02)
                continue
            spec = claim.job.spec
            scores = tuple(scored(candidate.version) for candidate in spec.candidates)
            await jobs.finish(claim, JobResult(version=spec.draft, candidate=scored(spec.draft), scores=scores))
    finally:
        await redis.aclose()


@pytest.mark.parametrize("failpoint", FAILPOINTS)
async def test_a_killed_tided_is_made_up_for(
    failpoint: str, valkey: Valkey, tmp_path: Path, target: Path, first: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "redis": {"url": valkey.url},
        "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.1, "lease_ttl_s": 2.0, "start_collector": False},
        "target": {"path": str(target)},
        "self_test": {"enabled": False},  # the double taps nothing
        "training": {"min_rows": 200, "cool_down_s": 0, "draft_vocab": 64},
        "gate": {"min_requests": 4, "min_tokens": 20},
        "deployment": {"swap_deadline_s": 120.0, "watch_requests": 3, "watch_s": 120.0},
    }
    config = write_config(tmp_path / "config.toml", sections, None)
    store_samples(config, target, ENGINE, train=20, held_out=10, created_ms=1_000)
    client = Client(config.daemon.socket_path, timeout_s=60)
    stop = asyncio.Event()  # not cancelled: redis-py can swallow a cancellation that meets a reply
    worker = asyncio.create_task(work(valkey.url, first, tmp_path, stop))
    async with running_double(valkey, describe_double(target, first)) as engine:
        before = engine.info.version

        async def traffic() -> None:
            while not stop.is_set():
                await engine.report(alpha=0.6, requests=2)
                await asyncio.sleep(0.1)

        serving = asyncio.create_task(traffic())
        try:
            doomed = {"TIDED_FAILPOINT": failpoint}
            async with tided(tmp_path / "config.toml", tmp_path, "doomed", doomed) as daemon:
                async with asyncio.timeout(120):
                    assert await daemon.process.wait() == -9, daemon.log.read_text()
            async with tided(tmp_path / "config.toml", tmp_path, "next") as daemon:
                await daemon.ready()
                status = await eventually(lambda: converged(client), timeout_s=120)
                assert await daemon.stop() == 0
        finally:
            stop.set()
            await asyncio.gather(serving, worker)
        assert engine.info.version == status.info.version != before
        redis = connect(valkey.url)
        jobs = await JobStore(redis).list(50)
        await redis.aclose()
    assert len(jobs) == 1
    assert status.training.trainings == 1
    assert status.draft == "tiny@1"
    # A swap may be sent again when the leader died before it could note the first: the same version, harmless.
    assert 1 <= engine.kinds().count("Swap") <= 2
    assert len(list((tmp_path / "s" / "drafts").glob("*/draft.json"))) == 2


async def converged(client: Client) -> EngineStatus | None:
    """The engine's status once its new draft is live and its training cycle is over."""
    engines = (await asyncio.to_thread(client.status)).engines
    if not engines or engines[0].deployment is None:
        return None
    live = engines[0].deployment.state is DeploymentState.LIVE
    return engines[0] if live and engines[0].training.job == "" and engines[0].draft else None


@pytest.mark.parametrize("failpoint", POOL_FAILPOINTS)
async def test_a_tided_killed_on_the_way_back_to_a_pooled_draft_is_made_up_for(
    failpoint: str, valkey: Valkey, tmp_path: Path, target: Path, first: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "redis": {"url": valkey.url},
        "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.1, "lease_ttl_s": 2.0, "start_collector": False},
        "target": {"path": str(target)},
        "self_test": {"enabled": False},
        "training": {"min_rows": 1_000_000},
        "deployment": {"swap_deadline_s": 120.0, "watch_requests": 3, "watch_s": 120.0},
    }
    config = write_config(tmp_path / "config.toml", sections, None)
    async with leading(valkey, config) as control:
        day, night = (store_draft(control, variant(first, tmp_path / f"{n}", n), target).version for n in (1, 2))
        state, epoch, digest = control.context.state, control.context.leadership.require(), describe(target).digest
        domains = Domains(2, 2, night, (Domain(1, day, 2.4, 100), Domain(2, night, 2.2, 200)))
        await state.put(scout.STATE, digest, Scouting(domains), epoch)
        drifted = Collection(drifts=1, trainings=2, deployed=2, since_ms=1_000)
        await state.put(dispatcher.STATE, digest, drifted, epoch)
    store_samples(config, target, ENGINE, train=20, held_out=10, created_ms=2_000)
    client = Client(config.daemon.socket_path, timeout_s=60)
    stop = asyncio.Event()
    worker = asyncio.create_task(score(valkey.url, day, stop))
    async with running_double(valkey, describe_double(target, tmp_path / "2")) as engine:

        async def traffic() -> None:
            while not stop.is_set():
                await engine.report(alpha=0.6, requests=2)
                await asyncio.sleep(0.1)

        async def settled() -> bool:
            pools = await asyncio.to_thread(client.get, "/v1/pools")
            return engine.info.version == day and [pool["state"] for pool in pools] == ["idle"]

        serving = asyncio.create_task(traffic())
        try:
            async with tided(tmp_path / "config.toml", tmp_path, "doomed", {"TIDED_FAILPOINT": failpoint}) as daemon:
                async with asyncio.timeout(120):
                    assert await daemon.process.wait() == -9, daemon.log.read_text()
            async with tided(tmp_path / "config.toml", tmp_path, "next") as daemon:
                await daemon.ready()
                await eventually(settled, timeout_s=120)
                (pool,) = await asyncio.to_thread(client.get, "/v1/pools")
                assert await daemon.stop() == 0
        finally:
            stop.set()
            await asyncio.gather(serving, worker)
    assert [domain["number"] for domain in pool["domains"] if domain["present"]] == [1]
    assert 1 <= engine.kinds().count("Swap") <= 2
    redis = connect(valkey.url)
    collection = await StateStore(redis).get(Collection, dispatcher.STATE, digest)
    await redis.aclose()
    assert collection is not None
    assert not collection.drifting
