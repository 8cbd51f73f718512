"""One engine under a bench's own hand: a Valkey, a server with the plugin, and a peer that speaks the protocol as a leader would."""

import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
from transformers import AutoTokenizer

from bench.configs import free_port, write_config
from bench.engines.servers import Engine, service
from bench.traffic import Prompt
from tests.contract.peer import Peer
from tided.config import Config
from tided.local import LocalStack
from tided.model.errors import Refused
from tided.store.valkey import EmbeddedValkey
from tided.wire.control import SetSchedule

MAX_BATCH, MAX_CONTEXT, GAMMA_MAX = 8, 512, 4


@dataclass(frozen=True)
class Rig:
    """What is running. `prompt_ids` of a prompt are what the server makes of it."""

    kind: str
    peer: Peer
    url: str
    config: Config
    tokenizer: Any

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        text = self.tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def complete(self, http: httpx.AsyncClient, ids: Sequence[int], tokens: int) -> list[int]:
        """The greedy answer of `tokens` tokens to a prompt of token ids. Raises `httpx.HTTPError` when the request fails."""
        if self.kind == "sglang":
            parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            answer = await http.post("/generate", json={"input_ids": list(ids), "sampling_params": parameters})
            return list(answer.raise_for_status().json()["output_ids"])
        body = {
            "prompt": list(ids),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = await http.post("/v1/completions", json=body)
        return list(answer.raise_for_status().json()["choices"][0]["token_ids"])

    async def drafts(self, gamma: int) -> None:
        """The engine drafts `gamma` tokens from now on. Raises `Refused` when it will not."""
        reply = await self.peer.ask(SetSchedule((gamma,)))
        if not reply.ok:
            raise Refused(reply.error)


@asynccontextmanager
async def rig(model: Path, engine: Engine, dtype: str, changes: Mapping[str, Any] | None = None) -> AsyncGenerator[Rig]:
    """Everything started, nothing captured yet; stopped at the end. `changes` to the [engine] section.

    Raises `Unavailable` when the server does not come up: the message ends with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="tided-rig-") as name:
        work, port = Path(name), free_port()
        of_engine = {
            "id": engine.name,
            "dtype": dtype,
            "max_batch": MAX_BATCH,
            "max_context": MAX_CONTEXT,
            "gamma_max": GAMMA_MAX,
            **(changes or {}),
        }
        config = write_config(
            work / "config.toml",
            {
                "daemon": {"state_dir": str(work / "state")},
                "target": {"path": str(model)},
                "engine": of_engine,
            },
        )
        valkey = EmbeddedValkey(config.daemon.state_dir / "valkey", config.redis.maxmemory_bytes)
        await valkey.start()
        try:
            async with LocalStack(work / "logs", lambda line: print(line, flush=True)) as stack:
                await stack.start(service(config, engine, port))
                peer = Peer(redis.Redis(unix_socket_path=str(valkey.socket)), engine.name)
                tokenizer = AutoTokenizer.from_pretrained(model)
                yield Rig(engine.kind, peer, f"http://127.0.0.1:{port}", config, tokenizer)
        finally:
            await valkey.stop()


def drafted_by(peer: Peer) -> tuple[int, int, int]:
    """(request-steps that drafted, tokens drafted, of these accepted) in all of an engine's reports."""
    steps = drafted = accepted = 0
    for counts in (item for report in peer.observations() for item in report.steps if item.gamma):
        requests = sum(counts.accepted)
        steps += requests
        drafted += counts.gamma * requests
        accepted += sum(k * n for k, n in enumerate(counts.accepted))
    return steps, drafted, accepted
