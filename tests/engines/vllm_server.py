"""A real vLLM server on a processor with tided in it, as a subject of the backend contract (tests/contract/subject.py)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engines.server import EngineServer
from tests.tiny import make_draft, make_target
from tided.ctl.engine_args import EngineCommand

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
"""Of a tiny target that vLLM's kernels know."""


def make_models(root: Path) -> tuple[Path, Path]:
    """A tiny target and its version 0."""
    target = make_target(root / "target", **HEADS)
    return target, make_draft(target, root / "draft")


class VllmServer(EngineServer):
    kind = "vllm"

    def command(self) -> EngineCommand:
        printed = super().command()
        small = ("--enforce-eager", "--block-size", "32", "--max-num-batched-tokens", str(self.prefill_chunk))
        environment = printed.environment | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        return replace(printed, environment=environment, arguments=printed.arguments + small)

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
        more: Mapping[str, Any] | None = None,
    ) -> list[int]:
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
        body |= {"model": self.target_dir.name, "return_token_ids": True, **(more or {})}
        answer = await self.post("/v1/completions", body, private=private)
        return [int(token) for token in answer["choices"][0]["token_ids"]]

    async def metric(self, name: str) -> float:
        """The sum of a Prometheus counter over its labels."""
        text = (await self.get("/metrics")).text
        rows = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        assert rows, f"vLLM has no metric {name}"
        return sum(float(value) for value in rows)

    async def greedy_many(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """All at once."""
        return list(await asyncio.gather(*(self.complete(prompt, max_tokens) for prompt in prompts)))
