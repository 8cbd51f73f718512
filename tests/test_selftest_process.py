"""Engines with a fault, real processes: a wrong layer tapped, a draft used wrongly. They fail closed with the cause named, and serve on."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bench.configs import free_port, write_config
from tests.ctl_run import tidectl_at
from tests.loop import FIRST, train_draft
from tests.support import eventually
from tests.tiny import make_target
from tided.api.client import Client
from tided.config import Config
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.local import LocalStack, services
from tided.model.drafts import DraftOrigin
from tided.model.errors import Refused
from tided.model.status import EngineStatus
from tided.model.verification import CheckOutcome, VerificationState
from tided.services import acceptance
from tided.store.drafts import DraftStore
from tided.store.samples import SampleStore, Split

pytestmark = pytest.mark.real


def configure(root: Path, target: Path, **more: dict[str, Any]) -> tuple[Path, Config]:
    path = root / "config.toml"
    sections: dict[str, dict[str, Any]] = {
        "daemon": {"state_dir": str(root / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0},
        "target": {"path": str(target)},
        "engine": {"port": free_port(), "dtype": "float32", "max_context": 160, "report_interval_s": 0.2},
        "self_test": {"probe_timeout_s": 300.0, "reference_wait_s": 600.0},
        "training": {"draft_vocab": 64},
    }
    return path, write_config(path, sections | more)


async def judged(client: Client) -> EngineStatus | None:
    """The engine's status once there is a verdict, and capture is off again."""
    engines = (await asyncio.to_thread(client.status)).engines
    verdict = engines[0].verification if engines else None
    settled = verdict is not None and verdict.state is not VerificationState.PENDING
    return engines[0] if settled and not engines[0].info.capturing else None


async def test_a_wrong_layer_fails_closed_and_serving_goes_on(tmp_path: Path) -> None:
    target = make_target(tmp_path / "tiny")
    path, config = configure(tmp_path, target)
    client = Client(config.daemon.socket_path, timeout_s=60)
    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            faulty = replace(service, module="tests.wrong_layer_engine") if service.name == "engine" else service
            await stack.start(faulty)
        engine = await eventually(lambda: judged(client), timeout_s=300, poll_s=0.2)
        assert engine.verification is not None
        assert engine.verification.state is VerificationState.MISMATCH
        assert "those before layer 2 are those before layer 3" in engine.verification.reason
        assert engine.training.state == "off"

        status = await asyncio.to_thread(client.status)
        assert "failed its self-test" in " ".join(status.problems)
        events = await asyncio.to_thread(client.events, "0", 1000)
        assert [event.kind for event in events if event.kind.startswith("engine-")] == ["engine-mismatch"]
        assert 'tided_engine_self_test{engine="local",state="mismatch"} 1.0' in await metrics(client)
        doctor = await tidectl_at(config.daemon.socket_path, "doctor", "local")
        assert doctor.code == 1
        assert "layer ids" in doctor.out

        draft = await asyncio.to_thread(client.post, "/v1/drafts", {"target_dir": str(target), "name": "tiny"})
        with pytest.raises(Refused, match="failed its self-test"):
            await asyncio.to_thread(client.post, f"/v1/drafts/{draft['version']}/deploy", {"engine": "local"})
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{config.engine.port}", timeout=300) as http:
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}
            assert (await http.post("/v1/completions", json=body)).status_code == 200

        # Nothing of it is left for anybody to train on, and every row is accounted for.
        store = SampleStore(config.samples_dir, 0.15, 1 << 30, 86_400.0)
        assert store.rows(Split.TRAIN) == store.rows(Split.HELD_OUT) == 0

        async def balanced() -> bool:
            totals = (await asyncio.to_thread(client.status)).engines[0].samples
            return 0 < totals.tapped == totals.stored == store.ledger().tested

        await eventually(balanced, timeout_s=120, poll_s=0.2)


def without_special_tokens(draft: Path, to: Path) -> Path:
    """The same draft over other target ids, so that its own ids are none of theirs."""
    loaded = checkpoint.load(draft)
    before = checkpoint.target_ids(loaded.tensors["d2t"])
    absent = sorted(set(range(loaded.config.vocab)) - set(before.tolist()))
    after = np.sort(np.concatenate((before[before >= FIRST], absent[: int((before < FIRST).sum())])))
    known = np.zeros(loaded.config.vocab, loaded.tensors["t2d"].dtype)
    known[after] = True
    head = np.zeros_like(loaded.tensors["lm_head.weight"])
    kept = np.isin(after, before)
    head[kept] = loaded.tensors["lm_head.weight"][np.isin(before, after)]
    tensors = {"d2t": after - np.arange(len(after)), "t2d": known, "lm_head.weight": head}
    checkpoint.write(to, loaded.config, loaded.tensors | tensors)
    return to


async def test_a_draft_whose_vocabulary_map_is_not_applied_fails_closed(tmp_path: Path) -> None:
    """It boots on a trained draft of the store and taps rightly: only what it accepts shows the fault."""
    spec, staged, _ = await asyncio.to_thread(train_draft, tmp_path, 2)
    target, draft = Path(spec.target_dir), without_special_tokens(Path(staged), tmp_path / "draft")
    path, config = configure(tmp_path, target)
    store, info = DraftStore(config.drafts_dir), describe(target)
    store.add(draft, lineage="tiny", parent="", origin=DraftOrigin.IMPORTED, target=info, now_ms=1)
    client = Client(config.daemon.socket_path, timeout_s=60)
    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            arguments = (*service.arguments, "--draft", str(draft))
            faulty = replace(service, module="tests.wrong_draft_engine", arguments=arguments)
            await stack.start(faulty if service.name == "engine" else service)
        engine = await eventually(lambda: judged(client), timeout_s=300, poll_s=0.2)
    verdict = engine.verification
    assert verdict is not None
    assert verdict.state is VerificationState.MISMATCH
    assert [check.name for check in verdict.checks if check.outcome is CheckOutcome.FAILED] == [acceptance.NAME]
    assert "the vocabulary map is not applied" in verdict.reason


async def test_a_swap_that_is_half_applied_fails_closed(tmp_path: Path) -> None:
    """The engine reports the new version, with its checksum: only what it accepts shows that the old body serves under the new head."""
    spec, staged, _ = await asyncio.to_thread(train_draft, tmp_path, 2)
    target = Path(spec.target_dir)
    path, config = configure(tmp_path, target, deployment={"watch_s": 0.5})
    store, info = DraftStore(config.drafts_dir), describe(target)
    draft = store.add(Path(staged), lineage="tiny", parent="", origin=DraftOrigin.IMPORTED, target=info, now_ms=1)
    client = Client(config.daemon.socket_path, timeout_s=60)

    async def found(state: VerificationState) -> EngineStatus | None:
        engines = (await asyncio.to_thread(client.status)).engines
        verdict = engines[0].verification if engines else None
        return engines[0] if verdict is not None and verdict.state is state else None

    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            faulty = replace(service, module="tests.half_swap_engine") if service.name == "engine" else service
            await stack.start(faulty)
        await eventually(lambda: found(VerificationState.VERIFIED), timeout_s=300, poll_s=0.2)
        await asyncio.to_thread(client.post, f"/v1/drafts/{draft.version}/deploy", {"engine": "local"})
        engine = await eventually(lambda: found(VerificationState.MISMATCH), timeout_s=300, poll_s=0.2)
        events = await asyncio.to_thread(client.events, "0", 1000)
    assert engine.verification is not None
    assert engine.info.version == draft.version
    assert "the swap was half applied" in engine.verification.reason
    assert {"training-started", "drift-detected"}.isdisjoint(item.kind for item in events)
    assert [item.kind for item in events if item.kind.startswith("engine-")] == ["engine-verified", "engine-mismatch"]


async def metrics(client: Client) -> str:
    def fetch() -> str:
        transport = httpx.HTTPTransport(uds=str(client.socket_path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as http:
            return http.get("/metrics").text

    return await asyncio.to_thread(fetch)
