"""The whole loop on real engines: the real daemon, collector and worker, and a server that boots by `tidectl engine-args` on version 0.

SGLang: real SGLang scheduler, worker and HTTP; stand-in CPU kernels.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from bench.configs import free_port, write_config
from tests.contract.peer import Peer
from tests.engines.server import EngineServer
from tests.engines.sglang_server import SglangServer
from tests.engines.vllm_server import HEADS, VllmServer
from tests.loop import (
    accepting,
    complete,
    drafting,
    event,
    make_cyclic_target,
    sections,
    shown,
    traffic,
    verified,
)
from tests.support import eventually
from tided.api.client import Client
from tided.config import Config
from tided.local import LocalStack, services
from tided.model.deployments import DeploymentState
from tided.model.status import EngineStatus
from tided.store.samples import SampleStore

pytestmark = pytest.mark.real

PATIENCE_S = 300.0
ASKED_AGAIN = 16


class ProfiledSglang(SglangServer):
    profiled = True


def configure(root: Path, target: Path, kind: str) -> tuple[Path, Config]:
    changes: dict[str, dict[str, Any]] = {
        "target": {"path": str(target)},
        "engine": {"id": kind, "port": free_port(), "max_context": 256, "gamma_max": 3},
        "speculation": {"gamma_max": 3},
        "self_test": {"reference_wait_s": 600.0, "probe_timeout_s": 300.0},
        "training": {"min_rows": 1000, "cool_down_s": 600.0, "budget_s": 30.0, "draft_vocab": 64},
        "gate": {"min_requests": 8, "min_tokens": 200},
    }
    path = root / "config.toml"
    return path, write_config(path, sections(root, **changes), None)


@pytest.mark.parametrize("engine", [VllmServer, ProfiledSglang], ids=lambda engine: engine.kind)
async def test_the_loop_closes(engine: type[EngineServer], tmp_path: Path) -> None:
    target = make_cyclic_target(tmp_path / "tiny", **HEADS)
    path, config = configure(tmp_path, target, engine.kind)
    server = engine(config, None, tmp_path / f"{engine.kind}.log")
    client = Client(config.daemon.socket_path, timeout_s=60)
    failures: list[str] = []
    async with contextlib.AsyncExitStack() as ending:
        stack = await ending.enter_async_context(LocalStack(tmp_path / "logs"))
        ending.callback(server.kill)
        boot = asyncio.create_task(asyncio.to_thread(server.start))
        for service in services(path, config):
            if service.name != "engine":
                await stack.start(service)
        await boot
        http = await ending.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S))
        first = await eventually(lambda: ready(client), PATIENCE_S, 0.25)
        async with traffic(server.url, failures) as answers:
            live = await eventually(lambda: event(client, "draft-live"), PATIENCE_S, 0.25)
            await eventually(lambda: accepting(client), PATIENCE_S, 0.25)
            served = await eventually(lambda: drafting(client), PATIENCE_S, 0.25)
        sampled = list(answers)[:: max(1, len(answers) // ASKED_AGAIN)]
        changed = [prompt for prompt in sampled if await complete(http, prompt) != answers[prompt]]
        account = await eventually(lambda: drained(client, config), PATIENCE_S, 0.25)
        events = await asyncio.to_thread(client.events, "0", 1000)
        await asyncio.to_thread(server.stop)

    new = live.data["version"]
    assert failures == []
    assert len(sampled) >= ASKED_AGAIN
    assert changed == [], "greedy answers from before speculation, or from around the swap, are others now"
    assert (first.draft, served.draft) == ("tiny@0", "tiny@1")
    assert served.info.version == account.info.version == new != first.info.version
    assert account.deployment is not None
    assert account.deployment.state is DeploymentState.LIVE
    assert account.swaps == 1
    assert account.samples.lost == account.samples.unknown == 0
    # Cold start: nothing was drafted by choice before the first good draft.
    kinds = [item.kind for item in events]
    chosen = [item for item in events if item.kind == "schedule-changed"]
    assert chosen, shown(events)
    assert any(chosen[0].data["gammas"])
    assert kinds.index("engine-verified") < kinds.index("draft-swapped") < kinds.index("schedule-changed")


async def ready(client: Client) -> EngineStatus | None:
    engine = await verified(client)
    return engine if engine is not None and engine.info.profile is not None else None


async def drained(client: Client, config: Config) -> EngineStatus | None:
    """The engine's status once nothing is in flight: then every row that the engine's own tap counted is accounted for, on disk too."""
    (engine,) = (await asyncio.to_thread(client.status)).engines
    store = SampleStore(config.samples_dir, 0.3, 1 << 30, 86_400.0)
    with contextlib.closing(redis.Redis.from_url(config.redis_url)) as connection:
        tapped = Peer(connection, engine.info.engine).totals.tapped
    totals = engine.samples
    assert 0 < tapped == totals.tapped == totals.stored + totals.shed + totals.lost
    return engine if totals.in_flight == 0 and store.ledger().stored == totals.stored else None
