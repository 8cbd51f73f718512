"""Three engines on two targets, real processes: two share samples, one training and its draft; the third has its own of each."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.support import eventually
from tests.test_end_to_end import complete, make_cyclic_target, make_prompts
from tests.tiny import VOCAB, make_target
from tided.api.client import Client
from tided.config import Config, load
from tided.local import LocalStack, Service
from tided.model.records import DeploymentState, JobKind
from tided.model.status import EngineStatus, Status
from tided.store.samples import SampleStore, Split

pytestmark = pytest.mark.real

ENGINES = {"one": "cyclic", "two": "cyclic", "odd": "plain"}
"""Engine -> its target."""


def configure(root: Path, targets: dict[str, Path]) -> tuple[Path, Config]:
    path = root / "config.toml"
    write_config(
        path,
        {
            "daemon": {"state_dir": str(root / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0},
            "engine": {
                "dtype": "float32",
                "max_batch": 4,
                "max_context": 160,
                "report_interval_s": 0.2,
            },
            "self_test": {"enabled": False},
            "samples": {"held_out_fraction": 0.3, "shard_rows": 512, "shard_age_s": 1.0},
            "speculation": {"probe_every_s": 1.0, "dwell_steps": 8, "margin": 0.0, "hysteresis": 0.0},
            "training": {
                "min_rows": 2500,
                "short_window": 8,
                "long_window": 64,
                "cool_down_s": 600.0,
                "budget_s": 90.0,
                "draft_vocab": VOCAB,
            },
            "gate": {"min_requests": 12, "min_tokens": 400},
            "deployment": {"watch_s": 2.0},
            "worker": {"drain_s": 2.0},
        },
        None,
    )
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
                await serving.enter_async_context(traffic(f"http://127.0.0.1:{ports[name]}", number, failures))
            await eventually(lambda: training(client), timeout_s=240, poll_s=0.25)
        # The trainer has the machine for itself: its budget is in seconds. Without traffic a watch ends by time.
        await eventually(lambda: shared(client), timeout_s=240, poll_s=0.25)
        async with AsyncExitStack() as serving:
            for number, name in enumerate(ENGINES, start=len(ENGINES)):
                await serving.enter_async_context(traffic(f"http://127.0.0.1:{ports[name]}", number, failures))
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


@asynccontextmanager
async def traffic(url: str, number: int, failures: list[str]) -> AsyncGenerator[None]:
    """Two clients of one engine, whose prompts no other engine gets, until the body ends."""

    async def one(client: httpx.AsyncClient, seed: int) -> None:
        for prompt in make_prompts(100_000, seed):
            try:
                await complete(client, prompt)
            except (httpx.HTTPError, AssertionError) as exc:
                failures.append(repr(exc))
                return

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        tasks = [asyncio.create_task(one(client, 10 * number + seed)) for seed in range(2)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def engine_of(status: Status, name: str) -> EngineStatus:
    return next(engine for engine in status.engines if engine.info.engine == name)


async def training(client: Client) -> bool:
    """Whether the shared target's job has begun, and the other target has samples too."""
    status = await asyncio.to_thread(client.status)
    jobs = [job for job in status.active_jobs if job.spec.kind is JobKind.TRAIN]
    return bool(jobs) and any(
        engine.info.engine == "odd" and engine.training.rows > 0 and engine.samples.in_flight == 0
        for engine in status.engines
    )


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
