"""The latency profile: T(n) and D(b) as Eq. 5 of TIDE reads them, from real requests that this server sends to itself.

Every step of the worker is timed in two parts: the target's verification of n = batch x (gamma + 1) tokens, and the rest of it,
drafting. The schedule is held at one gamma while requests of one batch size run; medians over the steps are the profile.
"""

import http.client
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from tided.engine.sglang.rows import OWN
from tided.engine.sglang.steps import Schedule
from tided.model.engines import LatencyProfile
from tided.model.errors import Unavailable

SKIP_IDLE_DRAFT = "SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND"
PROMPT_TOKENS = 128
"""Tokens that each request attends to while measured: about what a short chat holds."""
STEPS = 6
REQUEST_TIMEOUT_S = 120.0


class StepTimer:
    """Times one worker's steps while `on`. The scheduler's thread writes, the measuring thread reads after the requests ended."""

    def __init__(self) -> None:
        self.on = False
        self.verify_s = 0.0
        self.samples: list[tuple[int, int, float, float]] = []  # batch, gamma, seconds of the target, of the draft

    def verify(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the target's verification and keep its seconds."""
        if not self.on:
            return original(*args, **kwargs)
        started = _now()
        result = original(*args, **kwargs)
        self.verify_s = _now() - started
        return result

    def step(self, batch: int, gamma: int, started_s: float) -> None:
        """A whole step is over. `started_s` comes from `now`."""
        if self.on:
            self.samples.append((batch, gamma, self.verify_s, _now() - started_s - self.verify_s))

    def now(self) -> float:
        """The time, once the device has caught up; only while measuring."""
        return _now() if self.on else 0.0


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    url: str, schedule: Schedule, timer: StepTimer, max_batch: int, vocab: int, busy: Callable[[], bool]
) -> LatencyProfile:
    """Measure by requests to the server at `url`; takes seconds. Raises `Unavailable` while others are served."""
    gammas = schedule.reachable
    batches = sorted({1, max_batch, *(2**k for k in range(1, 7) if 2**k < max_batch)})
    target: defaultdict[int, list[float]] = defaultdict(list)
    draft: defaultdict[int, list[float]] = defaultdict(list)
    for batch in batches:
        for gamma in gammas:
            if busy():
                raise Unavailable("the engine is serving; a profile is measured only while nothing runs")
            for size, steps, target_s, draft_s in _run(url, schedule, timer, batch, gamma, vocab):
                target[size * (steps + 1)].append(target_s)
                if steps and steps == max(gammas):
                    draft[size].append(draft_s / steps)
    if not target:
        raise Unavailable("no step was timed")
    return LatencyProfile(
        tokens=tuple(sorted(target)),
        target_s=tuple(statistics.median(target[n]) for n in sorted(target)),
        batches=tuple(sorted(draft)),
        draft_s=tuple(statistics.median(draft[b]) for b in sorted(draft)),
        idle_drafts=0.0 if _draft_rests() else 1.0,
    )


def _draft_rests() -> bool:
    """Whether SGLang leaves the draft's forward out where nothing is drafted."""
    return os.environ.get(SKIP_IDLE_DRAFT, "").lower() in ("1", "true", "yes", "y")


def _run(
    url: str, schedule: Schedule, timer: StepTimer, batch: int, gamma: int, vocab: int
) -> list[tuple[int, int, float, float]]:
    """One batch of requests at one gamma: what its steps took, without the first of each batch size, which warm up."""
    timer.samples = []
    schedule.forced, timer.on = gamma, True
    try:
        prompts = [_prompt(batch * 64 + gamma * 8 + i, vocab) for i in range(batch)]
        _generate(url, prompts, STEPS * (gamma + 1))
    finally:
        schedule.forced, timer.on = None, False
    seen: set[int] = set()
    kept: list[tuple[int, int, float, float]] = []
    for sample in timer.samples:
        if sample[0] in seen and sample[1] == gamma:
            kept.append(sample)
        seen.add(sample[0])
    return kept


def _prompt(seed: int, vocab: int) -> list[int]:
    """Token ids that no other prompt shares from the start on, so that no prefix cache answers."""
    return [(seed * 7919 + i * 31) % vocab for i in range(PROMPT_TOKENS)]


def _generate(url: str, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {OWN: True}}
    body = json.dumps({"input_ids": list(prompts), "sampling_params": parameters})
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise Unavailable(f"this server did not answer its own request ({type(exc).__name__})") from exc
    finally:
        connection.close()
    if response.status != 200:
        raise Unavailable(f"this server answered its own request with status {response.status}")
