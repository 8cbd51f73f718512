"""The whole loop on a tiny target: a configuration with short times, a target whose draft learns in seconds, traffic, what to wait for."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.shards import Sample, greedy_samples, prompts, write_shard
from tests.tiny import VOCAB, make_draft, make_target
from tided.api.client import Client
from tided.model.events import Event
from tided.model.jobs import JobKind, JobSpec
from tided.model.status import EngineStatus
from tided.model.verification import Check, CheckOutcome, VerificationState
from tided.services import acceptance
from tided.training.trainer import train

TEMPLATES = ("add {} and {} please", "write {} then {} now", "is {} more than {}?", "list {} of {} items")
CLIENTS = 4
CYCLE = 3
FIRST = 3
"""Token ids below are special in tests/tiny.py."""


def sections(root: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A configuration below `root` under which the loop closes in a minute or two."""
    base: dict[str, dict[str, Any]] = {
        "daemon": {"state_dir": str(root / "s"), "cycle_s": 0.2, "lease_ttl_s": 30.0},
        "engine": {"dtype": "float32", "max_batch": CLIENTS, "max_context": 160, "report_interval_s": 0.2},
        "samples": {"held_out_fraction": 0.3, "shard_rows": 512, "shard_age_s": 1.0},
        "speculation": {
            "probe_every_s": 1.0,
            "probe_loss": 1.0,
            "most_lost": 1.0,
            "dwell_steps": 8,
            "margin": 0.0,
            "hysteresis": 0.0,
        },
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
    }
    return base | {name: base.get(name, {}) | values for name, values in changes.items()}


def make_cyclic_target(path: Path, **heads: int) -> Path:
    """A random Llama that answers everything by going round a few tokens: a draft can learn that in seconds.

    Version 0 cannot know it: it reads the state at a position, and what is asked is the successor of the token after it.
    """
    make_target(path, **heads)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        embedding = torch.randn(VOCAB, model.config.hidden_size, generator=draw)
        head = torch.zeros_like(embedding)
        for token in range(FIRST, VOCAB):
            within = token < FIRST + CYCLE
            successor = FIRST + ((token - FIRST + 1) if within else token) % CYCLE
            head[successor] += embedding[token] * (1.0 if within else 0.3)
        model.config.tie_word_embeddings = False
        model.model.embed_tokens.weight = torch.nn.Parameter(embedding)
        model.lm_head.weight = torch.nn.Parameter(0.15 * head)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= 0.02
    model.save_pretrained(path)
    return path


def train_draft(root: Path, gamma: int, answer: int = 12) -> tuple[JobSpec, str, list[Sample]]:
    """A draft of the cyclic target, trained in seconds: its job, where it is staged, and samples that it has not seen."""
    target = make_cyclic_target(root / "tiny")
    samples = greedy_samples(target, prompts(40, VOCAB), answer)
    unseen, seen = samples[:3], samples[3:]
    spec = JobSpec(
        kind=JobKind.TRAIN,
        engine="e",
        target="t",
        target_dir=str(target),
        draft_dir=str(make_draft(target, root / "0", draft_vocab=64)),
        shards=(str(write_shard(root / "seen.safetensors", seen)),),
        held_out=(str(write_shard(root / "unseen.safetensors", unseen)),),
        budget_s=60.0,
        gamma=gamma,
        options={"batch_tokens": 32, "validation_share": 0.2, "passes": 12},
    )
    return spec, train(spec, root / "out", lambda _: None).staged, unseen


def make_prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(TEMPLATES).format(draw.randrange(1000), draw.randrange(1000)) for _ in range(count)]


@asynccontextmanager
async def traffic(
    url: str, failures: list[str], seeds: Iterable[int] = range(CLIENTS)
) -> AsyncGenerator[dict[str, str]]:
    """A client for each of `seeds`, which names its prompts, until the body ends; what failed is added to `failures`.

    Gives the answers so far, by prompt.
    """
    answers: dict[str, str] = {}

    async def one(client: httpx.AsyncClient, seed: int) -> None:
        for prompt in make_prompts(100_000, seed):
            try:
                answers[prompt] = await complete(client, prompt)
            except (httpx.HTTPError, AssertionError) as exc:
                failures.append(repr(exc))
                return

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        tasks = [asyncio.create_task(one(client, seed)) for seed in seeds]
        try:
            yield answers
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def complete(client: httpx.AsyncClient, prompt: str) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 48, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def event(client: Client, kind: str) -> Event | None:
    """The first event of a kind; fails at once when a training or a deployment has failed."""
    events = await asyncio.to_thread(client.events, "0", 1000)
    ended = [event for event in events if event.kind in ("training-ended", "deployment-failed")]
    assert not [event for event in ended if "failed" in event.message], shown(ended)
    return next((event for event in events if event.kind == kind), None)


async def drafting(client: Client) -> EngineStatus | None:
    """The only engine's status, once it drafts by itself and tokens are accepted."""
    engine = (await asyncio.to_thread(client.status)).engines[0]
    return engine if any(engine.info.gammas) and engine.accept_length else None


async def verified(client: Client) -> EngineStatus | None:
    """The engine's status once its self-test has passed; fails at once when it has not."""
    engines = (await asyncio.to_thread(client.status)).engines
    verdict = engines[0].verification if engines else None
    if verdict is not None and verdict.state is VerificationState.MISMATCH:
        pytest.fail(verdict.reason)
    return engines[0] if verdict is not None and verdict.state is VerificationState.VERIFIED else None


async def accepting(client: Client) -> Check | None:
    """The self-test's word that the draft which serves accepts what the same draft accepts offline."""
    engine = await verified(client)
    checks = engine.verification.checks if engine is not None and engine.verification is not None else ()
    (check,) = [check for check in checks if check.name == acceptance.NAME] or [None]
    if check is None or "after the first swap" in check.measured:
        return None
    if check.outcome is not CheckOutcome.OK:
        pytest.fail(f"nothing can be told of the draft: {check.measured}")
    return check


def shown(events: list[Event]) -> str:
    rows: list[Any] = [(event.kind, event.message, event.data) for event in events]
    return json.dumps(rows, indent=1)
