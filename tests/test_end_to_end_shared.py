"""Three engines on two targets, real processes: two share samples, one training and its draft; the third has its own of each."""

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.configs import free_port, write_config
from tests.loop import make_cyclic_target, sections, traffic
from tests.support import eventually
from tests.tiny import make_target
from tided.api.client import Client
from tided.config import Config, load
from tided.local import LocalStack, Service
from tided.model.deployments import DeploymentState
from tided.model.status import EngineStatus, Status
from tided.store.samples import SampleStore, Split

pytestmark = pytest.mark.real

ENGINES = {"one": "cyclic", "two": "cyclic", "odd": "plain"}
"""Engine -> its target."""


def configure(root: Path, targets: dict[str, Path]) -> tuple[Path, Config]:
    path = root / "config.toml"
    changes: dict[str, dict[str, Any]] = {
        "self_test": {"enabled": False},
        "training": {"cool_down_s": 600.0, "budget_s": 90.0},
        "deployment": {"watch_requests": 20, "watch_s": 2.0},
    }
    write_config(path, sections(root, **changes), None)
    with path.open("a") as file:
        for name, directory in targets.items():
            file.write(f'\n[[target]]\nname = "{name}"\npath = "{directory}"\n')
            if name == "plain":
                file.write("training = { min_rows = 1_000_000 }\n")
    return path, load(path)


async def test_two_of_three_engines_share_everything_but_their_schedule(tmp_path: Path) -> None:
    targets = {"cyclic": make_cyclic_target(tmp_path / "cyclic"), "plain": make_target(tmp_path / "plain", seed=7)}
    path, config = configure(tmp_path, targets)
    client = Client(config.daemon.socket_path)
    ports = {name: free_port() for name in ENGINES}
    failures: list[str] = []
    async with LocalStack(tmp_path / "logs") as stack:
        common = ("--config", str(path))
        await stack.start(Service("tided", "tided.daemon", common, ready_s=60))
        engines = [
            Service(
                name,
                "tided.engine.embedded.server",
                (*common, "--engine-id", name, "--model", str(targets[ENGINES[name]]), "--port", str(ports[name])),
                ready_s=180,
            )
            for name in ENGINES
        ]
        worker = Service("worker", "tided.worker.agent", common, ready_s=180)
        await asyncio.gather(*(stack.start(service) for service in (*engines, worker)))
        async with AsyncExitStack() as serving:
            for number, name in enumerate(ENGINES):
                await serving.enter_async_context(two_clients(ports[name], number, failures))
            await eventually(lambda: training(client), timeout_s=240, poll_s=0.25)
        # The trainer has the machine for itself: its budget is in seconds. Without traffic a watch ends by time.
        await eventually(lambda: shared(client), timeout_s=240, poll_s=0.25)
        async with AsyncExitStack() as serving:
            for number, name in enumerate(ENGINES, start=len(ENGINES)):
                await serving.enter_async_context(two_clients(ports[name], number, failures))
            status = await eventually(lambda: drafting(client), timeout_s=240, poll_s=0.25)
        jobs = await asyncio.to_thread(client.get, "/v1/jobs")
        events = await asyncio.to_thread(client.events, "0", 1000)

    one, two, odd = (engine_of(status, name) for name in ENGINES)
    assert failures == []
    assert [engine.draft for engine in (one, two, odd)] == ["cyclic@1", "cyclic@1", "plain@0"]
    assert one.info.version == two.info.version != odd.info.version
    # One job, from the samples of both and of nobody else.
    [job] = [job for job in jobs if job["spec"]["kind"] == "train"]
    assert job["spec"]["engine"] == "one,two"
    assert job["spec"]["lineage"] == "cyclic"
    started = [event.subject for event in events if event.kind == "training-started"]
    assert started == ["cyclic"]
    # Each has its own deployment: a canary by the gate, then the other.
    assert one.deployment is not None
    assert two.deployment is not None
    assert {one.deployment.reason, two.deployment.reason} == {"gate", "shared"}
    assert [engine.swaps for engine in (one, two, odd)] == [1, 1, 0]
    # Held-out shards stay: they show who captured what.
    samples = config.samples
    store = SampleStore(config.samples_dir, samples.held_out_fraction, samples.max_bytes, samples.max_age_s)
    held_out = store.shards(Split.HELD_OUT)
    kept = {engine: {shard.target for shard in held_out if shard.engine == engine} for engine in ENGINES}
    assert kept == {engine.info.engine: {engine.info.target.digest} for engine in (one, two, odd)}
    assert kept["one"] == kept["two"] != kept["odd"]
    assert odd.training.job == ""
    assert odd.training.rows > 0


def two_clients(port: int, number: int, failures: list[str]) -> AbstractAsyncContextManager[object]:
    """Traffic of one engine whose prompts no other `number` gives."""
    return traffic(f"http://127.0.0.1:{port}", failures, (10 * number, 10 * number + 1))


def engine_of(status: Status, name: str) -> EngineStatus:
    return next(engine for engine in status.engines if engine.info.engine == name)


async def training(client: Client) -> bool:
    """Whether the shared target's training has begun, and the other target has samples too."""
    status = await asyncio.to_thread(client.status)
    events = await asyncio.to_thread(client.events, "0", 1000)
    begun = any(event.kind == "training-started" for event in events)
    return begun and engine_of(status, "odd").training.rows > 0


async def shared(client: Client) -> bool:
    """Whether both engines of the shared target serve the trained draft for good."""
    status = await asyncio.to_thread(client.status)
    events = await asyncio.to_thread(client.events, "0", 1000)
    failed = [event for event in events if event.kind == "training-ended" and "deployed" not in event.message]
    if failed:
        pytest.fail("; ".join(event.message for event in failed))
    deployments = {engine.info.engine: engine.deployment for engine in status.engines}
    live = {name for name, found in deployments.items() if found is not None and found.state is DeploymentState.LIVE}
    return {"one", "two"} <= live


async def drafting(client: Client) -> Status | None:
    """The status once both draft, and are accepted."""
    status = await asyncio.to_thread(client.status)
    able = {engine.info.engine for engine in status.engines if any(engine.info.gammas) and engine.accept_length}
    return status if {"one", "two"} <= able else None
