"""An engine that throws away what sampled requests drafted, real processes: it is named, and nothing is trained on it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.ctl_run import tidectl_at
from tests.support import eventually
from tests.test_end_to_end import make_prompts
from tests.tiny import VOCAB, make_target
from tided.api.client import Client
from tided.local import LocalStack, services
from tided.model.events import Event
from tided.model.jobs import JobKind
from tided.model.status import EngineStatus

pytestmark = pytest.mark.real

HOT = 2.0
"""So hot that even version 0 agrees with the target often enough."""


async def test_a_deaf_sampler_is_suspected_and_nothing_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config = write_config(
        path,
        {
            "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0},
            "target": {"path": str(make_target(tmp_path / "tiny"))},
            "engine": {
                "port": free_port(),
                "dtype": "float32",
                "max_batch": 4,
                "max_context": 160,
                "report_interval_s": 0.2,
            },
            "self_test": {"enabled": False},
            "samples": {"held_out_fraction": 0.4, "shard_rows": 512, "shard_age_s": 1.0},
            "training": {"min_rows": 12_000, "draft_vocab": VOCAB, "fault_check_s": 1.0},
            "gate": {"min_requests": 12, "min_tokens": 400},
            "worker": {"drain_s": 2.0},
        },
    )
    client = Client(config.daemon.socket_path, timeout_s=60)

    async def suspected() -> Event | None:
        events = await asyncio.to_thread(client.events, "0", 1000)
        return next((event for event in events if event.kind == "engine-fault-suspected"), None)

    async def rich() -> EngineStatus | None:
        (engine,) = (await asyncio.to_thread(client.status)).engines
        return engine if engine.training.rows > config.training.min_rows else None

    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            faulty = replace(service, module="tests.deaf_sampler_engine") if service.name == "engine" else service
            await stack.start(faulty)
        await asyncio.to_thread(client.post, "/v1/policy", {"mode": "fixed", "gamma": 3})
        async with traffic(f"http://127.0.0.1:{config.engine.port}"):
            event = await eventually(suspected, timeout_s=300, poll_s=0.2)
            engine = await eventually(rich, timeout_s=300, poll_s=0.5)
        status = await tidectl_at(config.daemon.socket_path, "status")
        events = await asyncio.to_thread(client.events, "0", 1000)
        jobs = await asyncio.to_thread(client.get, "/v1/jobs")

    assert event.subject == "local"
    assert event.data["temperature"] == HOT
    assert event.data["scored"] > 1.3 > event.data["served"]
    assert "requests at temperature 2 are served at" in event.message
    assert "suspect how the engine verifies sampled requests" in event.message
    # Of greedy requests as many are accepted as their draft gives.
    assert [item.data["temperature"] for item in events if item.kind == "engine-fault-suspected"] == [HOT]
    assert "requests at temperature 2" in " ".join(status.out.split())
    assert "a fault of local is suspected" in engine.training.reason
    assert {job["spec"]["kind"] for job in jobs} == {JobKind.SCORE}
    assert {"drift-detected", "training-started"}.isdisjoint(item.kind for item in events)


@asynccontextmanager
async def traffic(url: str) -> AsyncGenerator[None]:
    """Two clients that ask greedily and two that sample, until the body ends."""

    async def one(http: httpx.AsyncClient, seed: int) -> None:
        for prompt in make_prompts(100_000, seed):
            body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 60, "ignore_eos": True}
            answer = await http.post("/v1/completions", json={**body, "temperature": HOT * (seed % 2)})
            assert answer.status_code == 200, answer.text

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        tasks = [asyncio.create_task(one(http, seed)) for seed in range(4)]
        try:
            yield
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
