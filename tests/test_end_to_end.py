"""The whole loop, real processes, a tiny random Llama: samples -> job -> gate -> swap -> served version read back."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from bench.configs import free_port, write_config
from tests.support import eventually
from tests.tiny import VOCAB, make_target
from tided.api.client import Client
from tided.config import Config
from tided.draft import checkpoint
from tided.local import LocalStack, services
from tided.model.records import Event
from tided.model.status import EngineStatus

pytestmark = pytest.mark.real

TEMPLATES = ("add {} and {} please", "write {} then {} now", "is {} more than {}?", "list {} of {} items")
CONCURRENCY = 4
CYCLE = 3


def make_config(root: Path, target: Path) -> tuple[Path, Config]:
    path = root / "config.toml"
    config = write_config(
        path,
        {
            "daemon": {"state_dir": str(root / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0},
            "target": {"path": str(target)},
            "engine": {
                "port": free_port(),
                "dtype": "float32",
                "max_batch": CONCURRENCY,
                "max_context": 160,
                "report_interval_s": 0.2,
            },
            "samples": {"held_out_fraction": 0.3, "shard_rows": 512, "shard_age_s": 1.0},
            "speculation": {"probe_every_s": 1.0, "dwell_steps": 8, "margin": 0.0, "hysteresis": 0.0},
            "training": {
                "min_rows": 2500,
                "short_window": 8,
                "long_window": 64,
                "cool_down_s": 1.0,
                "budget_s": 60.0,
                "draft_vocab": VOCAB,
            },
            "gate": {"min_requests": 12, "min_tokens": 400},
            "deployment": {"watch_requests": 4, "watch_s": 15.0},
            "worker": {"drain_s": 2.0},
        },
    )
    return path, config


def make_cyclic_target(path: Path) -> Path:
    """A random Llama that answers everything by going round a few tokens: a draft can learn that in seconds.

    Version 0 cannot know it: it reads the state at a position, and what is asked is the successor of the token after it.
    """
    make_target(path)
    model = LlamaForCausalLM.from_pretrained(path)
    first = 3  # after the special tokens
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        embedding = torch.randn(VOCAB, model.config.hidden_size, generator=draw)
        head = torch.zeros_like(embedding)
        for token in range(first, VOCAB):
            within = token < first + CYCLE
            successor = first + ((token - first + 1) if within else token) % CYCLE
            head[successor] += embedding[token] * (1.0 if within else 0.3)
        model.config.tie_word_embeddings = False
        model.model.embed_tokens.weight = torch.nn.Parameter(embedding)
        model.lm_head.weight = torch.nn.Parameter(0.15 * head)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= 0.02
    model.save_pretrained(path)
    return path


def make_prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(TEMPLATES).format(draw.randrange(1000), draw.randrange(1000)) for _ in range(count)]


@asynccontextmanager
async def traffic(url: str, failures: list[str]) -> AsyncGenerator[None]:
    """Concurrent requests until the body ends; what failed is added to `failures`."""

    async def one(client: httpx.AsyncClient, seed: int) -> None:
        for prompt in make_prompts(100_000, seed):
            try:
                await complete(client, prompt)
            except (httpx.HTTPError, AssertionError) as exc:
                failures.append(repr(exc))
                return

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        tasks = [asyncio.create_task(one(client, seed)) for seed in range(CONCURRENCY)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def complete(client: httpx.AsyncClient, prompt: str) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 48, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_the_loop_closes(tmp_path: Path) -> None:
    target = make_cyclic_target(tmp_path / "tiny")
    path, config = make_config(tmp_path, target)
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
                live = await eventually(lambda: _event(client, "draft-live"), timeout_s=300, poll_s=0.25)
                served = await eventually(lambda: _drafting(client), timeout_s=120, poll_s=0.25)
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
    kinds = [event.kind for event in events]
    order = ["training-started", "draft-added", "deployment-started", "gate-decided", "draft-swapped", "draft-live"]
    assert [kind for kind in kinds if kind in order][: len(order)] == order, _shown(events)
    gate = next(event for event in events if event.kind == "gate-decided")
    assert gate.data["lower"] > 0
    assert gate.data["candidate"] > gate.data["incumbent"]


async def _engine(client: Client) -> EngineStatus:
    async def known() -> EngineStatus | None:
        engines = (await asyncio.to_thread(client.status)).engines
        return engines[0] if engines else None

    return await eventually(known)


async def _event(client: Client, kind: str) -> Event | None:
    events = await asyncio.to_thread(client.events, "0", 1000)
    ended = [event for event in events if event.kind in ("training-ended", "deployment-failed")]
    assert not [event for event in ended if "failed" in event.message], _shown(ended)
    return next((event for event in events if event.kind == kind), None)


async def _drafting(client: Client) -> EngineStatus | None:
    engine = (await asyncio.to_thread(client.status)).engines[0]
    return engine if any(engine.info.gammas) and engine.accept_length else None


def _shown(events: list[Event]) -> str:
    rows: list[Any] = [(event.kind, event.message, event.data) for event in events]
    return json.dumps(rows, indent=1)
