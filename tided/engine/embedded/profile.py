"""The latency profile: T(n) and D(b) as Eq. 5 of TIDE reads them, measured on this very engine."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from tided.engine.embedded.drafter import Context, Drafter
from tided.engine.embedded.sampling import SamplingParams
from tided.engine.embedded.target import Target
from tided.model.engines import LatencyProfile

CONTEXT = 192
"""Tokens that each slot attends to while measured: about what a short chat holds."""
REPEATS = 5


def measure(target: Target, drafter: Drafter | None) -> LatencyProfile:
    """Time target steps of n = batch x (gamma + 1) tokens and the drafter's share per drafted token. Medians of a few.

    Overwrites the caches of all slots, so nothing may be running. The same n reached by different batch sizes is pooled.
    """
    context = min(CONTEXT, target.max_context // 2)
    gamma_max = target.gamma_max if drafter is not None else 0
    batches = sorted({1, target.max_batch, *(2**k for k in range(1, 7) if 2**k < target.max_batch)})
    widths = range(1, gamma_max + 2)
    shapes = [(batch, width) for batch in batches for width in widths]
    samples: defaultdict[int, list[float]] = defaultdict(list)
    drafts: dict[int, list[float]] = {}
    for repeat in range(REPEATS + 1):  # the first round warms up
        for batch, width in shapes:
            seconds = _timed(target.device, lambda b=batch, w=width: _target_step(target, b, w, context))
            if repeat:
                samples[batch * width].append(seconds)
    if drafter is not None and gamma_max:
        for batch in batches:
            drafts[batch] = _draft_seconds(target, drafter, batch, gamma_max, context)
    return LatencyProfile(
        tokens=tuple(sorted(samples)),
        target_s=tuple(statistics.median(samples[n]) for n in sorted(samples)),
        batches=tuple(sorted(drafts)),
        draft_s=tuple(statistics.median(drafts[b]) for b in sorted(drafts)),
    )


def _target_step(target: Target, batch: int, width: int, context: int) -> None:
    ids = torch.zeros(batch, width, dtype=torch.int64, device=target.device)
    states = target.forward(ids, 0, [context] * batch)
    target.logits(states[:, :, -1]).argmax(dim=-1).tolist()


def _draft_seconds(target: Target, drafter: Drafter, batch: int, gamma: int, context: int) -> list[float]:
    """Seconds of one of gamma passes, the catch-up with two accepted rows among them.

    A target step goes before each, as in service: it sweeps the draft's weights out of the processor's caches. Measured alone a
    draft looks a fifth faster than it serves.
    """
    contexts = [Context([0] * (context + 1), SamplingParams(), None) for _ in range(batch)]
    for slot in range(batch):
        drafter.reset(slot)
    drafter.propose(contexts, gamma)  # catches up with the whole context
    samples: list[float] = []
    for _ in range(REPEATS):
        for item in contexts:
            item.tokens.extend((0, 0))
        _target_step(target, batch, 1, context)
        samples.append(_timed(target.device, lambda: drafter.propose(contexts, gamma)) / gamma)
    return samples


def _timed(device: torch.device, body: Callable[[], object]) -> float:
    started = time.perf_counter()
    body()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
