"""kill -9 of tided at every failpoint between samples and the served draft: its successor converges, and nothing happens twice."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bench.configs import write_config
from tests.conftest import Valkey
from tests.control import store_samples, variant
from tests.daemon_run import tided
from tests.engine_double import describe_double, running_double
from tests.support import eventually
from tided.api.client import Client
from tided.draft import checkpoint
from tided.model.records import DeploymentState, Evaluation, JobKind, JobResult
from tided.model.status import EngineStatus
from tided.store.client import connect
from tided.store.jobs import JobStore

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
ENGINE = "double"
FAILPOINTS = (
    "collection.training",
    "dispatcher.submitting",
    "dispatcher.submitted",
    "dispatcher.stored",
    "deployer.sending",
    "deployer.sent",
    "deployer.swapping",
    "deployer.watching",
    "deployer.live",
    "dispatcher.retired",
)


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
