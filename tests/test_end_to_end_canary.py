"""Two engines of one target, real processes: a good draft reaches both by way of its canary, a bad one is seen on the canary alone."""

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.configs import free_port, write_config
from tests.control import variant
from tests.loop import sections, shown, traffic, train_draft
from tests.support import eventually
from tests.test_services_controller import evaluation
from tided.api.client import Client
from tided.config import Config
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.local import LocalStack, Service
from tided.model.drafts import DraftOrigin
from tided.model.errors import Conflict, Refused
from tided.model.events import Event
from tided.model.jobs import JobKind, JobResult
from tided.store.client import connect
from tided.store.drafts import DraftStore
from tided.store.jobs import Claim, JobStore

pytestmark = pytest.mark.real
ENGINES = ("one", "two")


def spoilt(draft: Path, to: Path) -> Path:
    """The draft with its logits negated: a checkpoint in order that accepts nothing."""
    loaded = checkpoint.load(draft)
    norm = loaded.tensors["norm.weight"] ^ np.uint16(0x8000)
    checkpoint.write(to, loaded.config, {**loaded.tensors, "norm.weight": norm})
    return to


async def test_a_good_draft_passes_its_canary_and_a_bad_one_stays_there(tmp_path: Path) -> None:
    spec, staged, _ = await asyncio.to_thread(train_draft, tmp_path, gamma=4)
    target = Path(spec.target_dir)
    path = tmp_path / "config.toml"
    changes: dict[str, dict[str, Any]] = {
        "target": {"path": str(target)},
        "self_test": {"enabled": False},
        "pool": {"enabled": False},
        "speculation": {"shadow_every_s": 0.0},
        "training": {"draft_vocab": 64, "min_rows": 300, "fault_check_s": 0.0, "plateau_gain": 0.0},
        "gate": {"min_requests": 4, "min_tokens": 20},
        "deployment": {"watch_requests": 4, "watch_s": 15.0, "canary_requests": 12, "canary_s": 120.0},
    }
    config = write_config(path, sections(tmp_path, **changes))
    first = DraftStore(config.drafts_dir).add(
        Path(staged), lineage="tiny", parent="", origin=DraftOrigin.TRAINED, target=describe(target), now_ms=1
    )
    good, bad = variant(Path(staged), tmp_path / "good", 1), spoilt(Path(staged), tmp_path / "bad")
    client = Client(config.daemon.socket_path, timeout_s=60)
    ports, failures = {name: free_port() for name in ENGINES}, list[str]()
    async with LocalStack(tmp_path / "logs") as stack, AsyncExitStack() as serving:
        common = ("--config", str(path))
        await stack.start(Service("tided", "tided.daemon", common, ready_s=120))
        for name, port in ports.items():
            options = ("--engine-id", name, "--model", str(target), "--port", str(port))
            await stack.start(Service(name, "tided.engine.embedded.server", (*common, *options), ready_s=180))
        await eventually(lambda: serves(client, ""), timeout_s=120)
        await asyncio.to_thread(client.post, f"/v1/drafts/{first.version}/deploy", {"engine": None})
        for number, port in enumerate(ports.values()):
            await serving.enter_async_context(
                traffic(f"http://127.0.0.1:{port}", failures, (2 * number, 2 * number + 1))
            )
        await eventually(lambda: serves(client, first.version), timeout_s=120)

        better = await train(config, good)
        await eventually(lambda: happened(client, "canary-passed", better), timeout_s=240, poll_s=0.25)
        await eventually(lambda: serves(client, better), timeout_s=120, poll_s=0.25)
        worse = await train(config, bad)
        failed = await eventually(lambda: happened(client, "canary-failed", worse), timeout_s=240, poll_s=0.25)
        await eventually(lambda: serves(client, better), timeout_s=120, poll_s=0.25)
        # The same content from another training, which begins by itself or because somebody asks for it.
        await eventually(lambda: asked(client), timeout_s=240, poll_s=0.25)
        assert await train(config, bad) == worse
        await eventually(lambda: happened(client, "canary-failed", worse, 2), timeout_s=120, poll_s=0.25)
        events = await asyncio.to_thread(client.events, "0", 1000)
        drafts = {draft["version"]: draft for draft in await asyncio.to_thread(client.get, "/v1/drafts")}

    assert failures == []
    swapped = [event.subject for event in events if event.kind == "draft-swapped" and event.data["version"] == worse]
    assert swapped == [failed.data["engine"]], shown(events)
    assert drafts[worse]["quarantined"]
    assert not drafts[better]["quarantined"]
    order = [
        event.kind
        for event in events
        if event.data.get("version") == better and event.kind.startswith(("canary", "draft-l"))
    ]
    assert order == ["canary-started", "draft-live", "canary-passed", "draft-live"]


async def train(config: Config, staged: Path) -> str:
    """Be the worker of the next training: its draft is `staged`, and the gate finds it better. Its version."""
    redis = connect(config.redis_url)
    try:
        jobs = JobStore(redis)

        async def claimed() -> Claim | None:
            return await jobs.claim("test", [JobKind.TRAIN])

        claim: Claim = await eventually(claimed, timeout_s=240, poll_s=0.25)
        version = checkpoint.version_of(staged)
        old, new = evaluation(claim.job.spec.draft, 1.5, 20), evaluation(version, 2.5, 20)
        await jobs.finish(claim, JobResult(str(staged), version, old, new, 1000, 1.0))
    finally:
        await redis.aclose()
    return version


async def asked(client: Client) -> bool:
    with suppress(Conflict, Refused):
        await asyncio.to_thread(client.post, "/v1/train", {"engine": None})
    jobs = await asyncio.to_thread(client.get, "/v1/jobs")
    return any((job["spec"]["kind"], job["state"]) == ("train", "queued") for job in jobs)


async def serves(client: Client, version: str) -> bool:
    """Whether all engines serve a version for good; "": whether tided knows what they serve."""
    engines = (await asyncio.to_thread(client.status)).engines
    settled = [engine for engine in engines if engine.deployment is None or engine.deployment.state.final]
    wanted = [engine for engine in settled if engine.info.version == version or (not version and engine.draft)]
    return len(wanted) == len(ENGINES)


async def happened(client: Client, kind: str, version: str, times: int = 1) -> Event | None:
    events = await asyncio.to_thread(client.events, "0", 1000)
    found = [event for event in events if event.kind == kind and event.data["version"] == version]
    return found[-1] if len(found) >= times else None
