"""The whole loop, real processes, a tiny random Llama: samples -> job -> gate -> swap -> served version read back."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.loop import accepting, complete, drafting, event, make_cyclic_target, make_prompts, sections, shown, traffic
from tests.support import eventually
from tided.api.client import Client
from tided.draft import checkpoint
from tided.local import LocalStack, services
from tided.model.status import EngineStatus

pytestmark = pytest.mark.real


async def test_the_loop_closes(tmp_path: Path) -> None:
    target = make_cyclic_target(tmp_path / "tiny")
    path = tmp_path / "config.toml"
    changes: dict[str, dict[str, Any]] = {"target": {"path": str(target)}, "engine": {"port": free_port()}}
    config = write_config(path, sections(tmp_path, **changes))
    client = Client(config.daemon.socket_path, timeout_s=60)
    url = f"http://127.0.0.1:{config.engine.port}"
    failures: list[str] = []
    asked = make_prompts(12, seed=999)
    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            await stack.start(service)
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            before = [await complete(http, prompt) for prompt in asked]
            first = (await _engine(client)).info.version
            async with traffic(url, failures):
                live = await eventually(lambda: event(client, "draft-live"), timeout_s=300, poll_s=0.25)
                await eventually(lambda: accepting(client), timeout_s=120, poll_s=0.25)
                served = await eventually(lambda: drafting(client), timeout_s=120, poll_s=0.25)
            after = [await complete(http, prompt) for prompt in asked]
        status = await asyncio.to_thread(client.status)
        events = await asyncio.to_thread(client.events, "0", 1000)

    new = live.data["version"]
    assert new != first
    assert served.info.version == new  # what the engine read back
    assert checkpoint.version_of(config.drafts_dir / new) == new
    assert before == after, "greedy answers changed with speculation or the swap"
    assert failures == []
    engine = status.engines[0]
    assert engine.draft.endswith("@1")
    assert engine.swaps == 1
    assert engine.samples.lost == 0
    kinds = [item.kind for item in events]
    order = ["training-started", "draft-added", "gate-decided", "deployment-started", "draft-swapped", "draft-live"]
    assert [kind for kind in kinds if kind in order][: len(order)] == order, shown(events)
    gate = next(item for item in events if item.kind == "gate-decided")
    assert gate.data["lower"] > 0
    assert gate.data["candidate"] > gate.data["incumbent"]


async def _engine(client: Client) -> EngineStatus:
    async def known() -> EngineStatus | None:
        engines = (await asyncio.to_thread(client.status)).engines
        return engines[0] if engines else None

    return await eventually(known)
