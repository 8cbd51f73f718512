"""Traffic that comes back, real processes: a pooled draft is found by scores on tapped states and swapped in, without a training."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bench.configs import free_port, write_config
from tests.loop import drafting, event, sections, shown, traffic, train_draft
from tests.support import eventually
from tided.api.client import Client
from tided.draft.target import describe
from tided.local import LocalStack, services
from tided.model.deployments import DeploymentState
from tided.model.drafts import DraftOrigin
from tided.model.status import EngineStatus
from tided.store.drafts import DraftStore

pytestmark = pytest.mark.real


async def test_the_pooled_draft_comes_back_from_the_shadow(tmp_path: Path) -> None:
    """A draft has served; then another does, which accepts nothing, so nothing is drafted, and probes cannot be afforded."""
    spec, staged, _ = train_draft(tmp_path, gamma=4)
    target = Path(spec.target_dir)
    path = tmp_path / "config.toml"
    changes: dict[str, dict[str, Any]] = {
        "target": {"path": str(target)},
        "engine": {"port": free_port()},
        "self_test": {"enabled": False},
        "training": {"enabled": False, "draft_vocab": 64},
        "speculation": {"probe_every_s": 100_000.0, "shadow_every_s": 2.0},
        "deployment": {"watch_requests": 4, "watch_s": 5.0, "rollback_margin": 0.99},  # to deploy the worse one, too
        "pool": {"deadline_s": 120.0},
    }
    config = write_config(path, sections(tmp_path, **changes))
    DraftStore(config.drafts_dir).add(
        Path(staged), lineage="tiny", parent="", origin=DraftOrigin.TRAINED, target=describe(target), now_ms=1
    )
    client = Client(config.daemon.socket_path, timeout_s=60)
    failures: list[str] = []
    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            await stack.start(service)
        async with traffic(f"http://127.0.0.1:{config.engine.port}", failures):
            await eventually(lambda: connected(client), timeout_s=120)
            drafts = {draft["origin"]: draft["version"] for draft in await asyncio.to_thread(client.get, "/v1/drafts")}
            good, useless = drafts["trained"], drafts["init"]
            for version in (good, useless):
                await asyncio.to_thread(client.post, f"/v1/drafts/{version}/deploy", {"engine": None})
                await eventually(lambda version=version: live(client, version), timeout_s=120, poll_s=0.25)
            switched = await eventually(lambda: event(client, "pool-switched"), timeout_s=180, poll_s=0.25)
            await eventually(lambda: live(client, good), timeout_s=120, poll_s=0.25)
            engine = await eventually(lambda: drafting(client), timeout_s=120, poll_s=0.25)
        (pool,) = await asyncio.to_thread(client.get, "/v1/pools")
        events = await asyncio.to_thread(client.events, "0", 1000)
        jobs = await asyncio.to_thread(client.get, "/v1/jobs")

    assert failures == []
    assert engine.info.version == good == switched.data["version"], shown(events)
    assert engine.deployment is not None
    assert engine.deployment.reason == "pool"
    assert [domain["version"] for domain in pool["domains"] if domain["present"]] == [good]
    assert {job["spec"]["kind"] for job in jobs} == {"score"}
    scored = next(item for item in events if item.kind == "pool-scored" and item.id < switched.id)
    assert scored.data["lengths"][good] > scored.data["lengths"][useless]


async def connected(client: Client) -> bool:
    """Whether the engine serves version 0, and that is known."""
    engines = (await asyncio.to_thread(client.status)).engines
    return bool(engines) and bool(engines[0].draft)


async def live(client: Client, version: str) -> EngineStatus | None:
    engine = (await asyncio.to_thread(client.status)).engines[0]
    done = engine.deployment is not None and engine.deployment.state is DeploymentState.LIVE
    return engine if done and engine.info.version == version else None
