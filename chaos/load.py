"""Greedy load with known answers: what was asked is asked again until it is answered, and every failure is kept."""

import asyncio
import random
import time
from dataclasses import dataclass, field

import httpx

from tests.loop import complete, make_prompts

PROMPTS = 24
THINK_S = (0.02, 0.3)
RETRY_S = 0.2
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt at a request that was not answered. Times are time.monotonic()."""

    engine: str
    start_s: float
    end_s: float
    error: str


@dataclass
class Load:
    """What clients saw. `expected`: the answer to each prompt, from before any fault."""

    expected: dict[str, str] = field(default_factory=dict[str, str])
    asked: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list[str])
    failures: list[Failure] = field(default_factory=list[Failure])
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    async def learn(self, url: str, seed: int) -> None:
        """Ask everything once, before faults and before any draft was trained."""
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
            for prompt in make_prompts(PROMPTS, seed):
                self.expected[prompt] = await complete(http, prompt)

    async def client(self, engine: str, url: str, seed: int) -> None:
        """One client, until `enough` is set; what it has asked by then it still gets answered."""
        draw = random.Random(seed)
        prompts = sorted(self.expected)
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
            while not self.enough.is_set():
                self.asked += 1
                await self._until_answered(http, engine, draw.choice(prompts))
                await asyncio.sleep(draw.uniform(*THINK_S))

    async def _until_answered(self, http: httpx.AsyncClient, engine: str, prompt: str) -> None:
        while True:
            started_s = time.monotonic()
            try:
                answer = await complete(http, prompt)
            except (httpx.HTTPError, AssertionError) as exc:
                error = f"{type(exc).__name__}: {exc}"
                self.failures.append(Failure(engine, started_s, time.monotonic(), error))
                await asyncio.sleep(RETRY_S)
                continue
            self.answered += 1
            if answer != self.expected[prompt]:
                self.wrong.append(f"{engine}: {prompt!r}")
            return
