"""An engine that taps a wrong layer, real processes: it fails closed with the cause named, and serves on."""

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.ctl_run import tidectl_at
from tests.support import eventually
from tests.tiny import make_target
from tided.api.client import Client
from tided.local import LocalStack, services
from tided.model.errors import Refused
from tided.model.records import VerificationState
from tided.model.status import EngineStatus
from tided.store.samples import SampleStore, Split

pytestmark = pytest.mark.real


async def test_a_wrong_layer_fails_closed_and_serving_goes_on(tmp_path: Path) -> None:
    target = make_target(tmp_path / "tiny")
    path = tmp_path / "config.toml"
    config = write_config(
        path,
        {
            "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0},
            "target": {"path": str(target)},
            "engine": {"port": free_port(), "dtype": "float32", "max_context": 160, "report_interval_s": 0.2},
            "self_test": {"probe_timeout_s": 300.0, "reference_wait_s": 600.0},
            "training": {"draft_vocab": 64},
        },
    )
    client = Client(config.daemon.socket_path, timeout_s=60)

    async def judged() -> EngineStatus | None:
        engines = (await asyncio.to_thread(client.status)).engines
        verdict = engines[0].verification if engines else None
        settled = verdict is not None and verdict.state is not VerificationState.PENDING
        return engines[0] if settled and not engines[0].info.capturing else None

    async with LocalStack(tmp_path / "logs") as stack:
        for service in services(path, config):
            faulty = replace(service, module="tests.wrong_layer_engine") if service.name == "engine" else service
            await stack.start(faulty)
        engine = await eventually(judged, timeout_s=300, poll_s=0.2)
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


async def metrics(client: Client) -> str:
    def fetch() -> str:
        transport = httpx.HTTPTransport(uds=str(client.socket_path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as http:
            return http.get("/metrics").text

    return await asyncio.to_thread(fetch)
