"""Prompts are private: a canary in every place where a client's text can enter is in no log, event, metric or error of ours.

Samples hold token ids as numbers, for training; text is nowhere on disk.
"""

import asyncio
import json
import re
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest

from bench.configs import free_port, write_config
from tests.support import eventually
from tests.tiny import make_target
from tided.api.client import Client
from tided.local import LocalStack, services
from tided.model.status import EngineStatus

pytestmark = pytest.mark.real

CANARY = "zQ7-canary-9x"


def assert_absent(canary: str, paths: Iterable[Path], ids: list[int]) -> int:
    """Fail if a file under `paths` holds the canary, or its token ids as a list of numbers. Gives how many files were read."""
    text = canary.encode()
    numbers = re.compile(rb"\D+".join(str(token).encode() for token in ids))
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    for file in files:
        data = file.read_bytes()
        assert text not in data, f"{file} holds text of a request"
        assert file.suffix == ".safetensors" or not numbers.search(data), f"{file} holds token ids of a request"
    return len(files)


def test_the_check_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(f"prompt: {CANARY}")
    with pytest.raises(AssertionError, match="text of a request"):
        assert_absent(CANARY, [tmp_path], [1, 2, 3])
    (tmp_path / "log").write_text("ids=[11, 12, 13]")
    with pytest.raises(AssertionError, match="token ids"):
        assert_absent(CANARY, [tmp_path], [11, 12, 13])
    assert assert_absent(CANARY, [tmp_path], [13, 12, 11]) == 1


async def test_prompts_are_nowhere_but_in_samples(tmp_path: Path) -> None:
    target = make_target(tmp_path / "tiny")
    path = tmp_path / "config.toml"
    config = write_config(
        path,
        {
            "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0, "log_level": "debug"},
            "target": {"path": str(target)},
            "engine": {"port": free_port(), "dtype": "float32", "max_context": 160, "report_interval_s": 0.2},
            "samples": {"shard_rows": 16, "shard_age_s": 0.5},
            "self_test": {"enabled": False},  # without a worker nobody makes its reference
            "training": {"draft_vocab": 64},
        },
    )
    url = f"http://127.0.0.1:{config.engine.port}"
    client = Client(config.daemon.socket_path, timeout_s=60)
    logs = tmp_path / "logs"
    async with LocalStack(logs) as stack, httpx.AsyncClient(base_url=url, timeout=300) as http:
        for service in services(path, config):
            if service.name != "worker":
                await stack.start(service)
        # Only requests that begin while tided captures are tapped.
        await eventually(lambda: capturing(client), timeout_s=120, poll_s=0.1)
        bodies = [
            {"model": "tiny", "prompt": CANARY, "max_tokens": 8, "temperature": 0},
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": CANARY}],
                "max_tokens": 8,
                "return_token_ids": True,
            },
        ]
        for body in bodies:
            route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            assert (await http.post(route, json=body)).status_code == 200
        wrong = {"model": "tiny", "prompt": CANARY, "max_tokens": CANARY, "temperature": 9, "stop": {CANARY: 1}}
        refused = await http.post("/v1/completions", json=wrong)
        assert refused.status_code == 400
        long = await http.post("/v1/completions", json={"model": "tiny", "prompt": CANARY * 40, "max_tokens": 4})
        assert long.status_code == 400
        garbled = await http.post("/v1/completions", content=b'{"prompt": "' + CANARY.encode())
        assert garbled.status_code == 400
        await eventually(lambda: stored(client), timeout_s=120, poll_s=0.1)
        opted_out = {"x-tide-no-capture": "1"}
        assert (await http.post("/v1/completions", json=bodies[0], headers=opted_out)).status_code == 200
        engine = await eventually(lambda: skipped(client), timeout_s=120, poll_s=0.1)
        seen = tmp_path / "seen.txt"
        status = await asyncio.to_thread(client.get, "/v1/status")
        events = await asyncio.to_thread(client.get, "/v1/events", {"limit": 1000})
        metrics = (await http.get("/metrics")).text
        seen.write_text(
            "\n".join([json.dumps(status), json.dumps(events), metrics, refused.text, long.text, garbled.text])
        )
    assert engine is not None
    assert engine.samples.stored > 0
    ids = [3 + ord(character) - 32 for character in CANARY]  # tests.tiny: one token a character
    assert assert_absent(CANARY, [logs, config.daemon.state_dir, seen], ids) > 6


async def capturing(client: Client) -> bool:
    engines = (await asyncio.to_thread(client.status)).engines
    return bool(engines) and engines[0].info.capturing


async def stored(client: Client) -> EngineStatus | None:
    engines = (await asyncio.to_thread(client.status)).engines
    return engines[0] if engines and engines[0].samples.stored > 0 else None


async def skipped(client: Client) -> EngineStatus | None:
    engines = (await asyncio.to_thread(client.status)).engines
    return engines[0] if engines and engines[0].samples.skipped > 0 else None
