"""The whole loop where tided, an engine and a worker share Redis and a storage, and no directory: each has its own configuration. The
storage is mounted at another path on the worker's host, or is a bucket of a real S3 server."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.configs import free_port, write_config
from tests.loop import event, make_cyclic_target, sections, traffic
from tests.support import eventually
from tided.api.client import Client
from tided.config import Config
from tided.draft import checkpoint
from tided.local import LocalStack, Service, services
from tided.model.engines import Capability
from tided.store.objects import Kind, ObjectStore

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.real


def host(
    root: Path, name: str, target: Path, storage: str, **changes: dict[str, Any]
) -> tuple[Config, dict[str, Service]]:
    """A host's configuration and its own target; what could be started there."""
    shutil.copytree(target, root / name / "target")
    path = root / name / "config.toml"
    base = sections(root / name, target={"path": str(root / name / "target")}, storage={"url": storage})
    config = write_config(
        path, {section: base.get(section, {}) | changes.get(section, {}) for section in {*base, *changes}}
    )
    return config, {service.name: service for service in services(path, config)}


@asynccontextmanager
async def three_hosts(root: Path, bucket: str) -> AsyncGenerator[tuple[Config, str, str]]:
    """tided's configuration, the engine's URL, and the storage as the worker calls it. `bucket` empty: a directory."""
    target, port = make_cyclic_target(root / "tiny"), free_port()
    (root / "tided" / "mnt").mkdir(parents=True)
    config, tided = host(root, "tided", target, bucket or f"file://{root}/tided/mnt/tided")
    redis, storage = {"url": config.redis_url}, bucket or f"file://{root}/worker/mnt/tided"
    _, engine = host(root, "engine", target, "", redis=redis, engine={"port": port})
    _, worker = host(root, "worker", target, storage, redis=redis)
    (root / "worker" / "mnt").symlink_to(root / "tided" / "mnt")
    async with LocalStack(root / "logs") as stack:
        await stack.start(tided["tided"])
        await stack.start(replace(engine["engine"], environment={"TIDED_CACHE_DIR": str(root / "engine" / "cache")}))
        await stack.start(worker["worker"])
        yield config, f"http://127.0.0.1:{port}", storage


@pytest.mark.parametrize("storage", ["file", "s3"])
async def test_the_loop_closes_across_hosts(request: pytest.FixtureRequest, tmp_path: Path, storage: str) -> None:
    failures: list[str] = []
    bucket = request.getfixturevalue("s3_url") if storage == "s3" else ""
    async with three_hosts(tmp_path, bucket) as (config, url, storage):
        client = Client(config.daemon.socket_path, timeout_s=60)
        async with traffic(url, failures):
            live = await eventually(lambda: event(client, "draft-live"), timeout_s=400, poll_s=0.25)
        status = await asyncio.to_thread(client.status)
        # What was trained on was consumed: only jobs that ask about newer samples keep some there.
        trained = {path.name for path in (config.samples_dir / "train").glob("*.safetensors")}
        there = ObjectStore(storage).sizes(Kind.SAMPLES)
    engine = status.engines[0]
    assert failures == []
    assert Capability.FETCH in engine.info.capabilities
    assert engine.info.version == live.data["version"]
    assert checkpoint.verify(tmp_path / "engine" / "cache" / engine.info.version) == engine.info.version
    assert engine.samples.lost == 0
    assert len(there) <= len(trained) + len(list((config.samples_dir / "held-out").glob("*.safetensors")))
    assert not list((tmp_path / "worker" / "s" / "work" / "worker").glob("job-*/attempt-*/model.safetensors"))
