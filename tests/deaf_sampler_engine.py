"""tide-engine with a fault: of what sampled requests drafted it throws away most. Greedy requests are served well, answers are right."""

import torch

from tided.engine.embedded import scheduler
from tided.engine.embedded.sampling import Proposal, SamplingParams, accept_sampled
from tided.engine.embedded.server import main

LOST = 0.8


def _with_fault(
    proposal: Proposal | None, logits: torch.Tensor, params: SamplingParams, source: torch.Generator
) -> list[int]:
    lost = float(torch.rand((), generator=source)) < LOST
    return accept_sampled(None if lost else proposal, logits, params, source)


if __name__ == "__main__":
    scheduler.accept_sampled = _with_fault
    main()
