"""tide-engine with a fault: it takes its draft's ids for the target's. Its weights are as they should be, and it knows nothing of it."""

import torch

from tided.draft.eagle3 import Eagle3
from tided.engine.embedded import drafter
from tided.engine.embedded.server import main


def _without_map(draft: Eagle3) -> torch.Tensor:
    return torch.arange(draft.config.draft_vocab, device=draft.d2t.device)


if __name__ == "__main__":
    drafter._vocabulary = _without_map  # pyright: ignore[reportPrivateUsage]
    main()
