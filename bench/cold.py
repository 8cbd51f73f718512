"""A training for a cold start in this process, timed: the loop that a job runs, without its files and its scoring of held-out requests."""

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tided.draft.checkpoint import Checkpoint
from tided.draft.eagle3 import Eagle3
from tided.model.jobs import Recipe
from tided.training.data import Run, split_prompts
from tided.training.evaluate import evaluate
from tided.training.loop import Loop
from tided.training.losses import Frozen
from tided.training.options import options_for

NO_BUDGET_S = 1e6
_VALIDATIONS = 3
"""How many scorings of the validation split a training's seconds are kept free for, around its steps."""


@dataclass(frozen=True)
class Standing:
    """How far a training has come. CPU seconds of this process: validation and reading ahead are in them."""

    tokens: int
    steps: int
    seconds: float


def train(
    first: Checkpoint,
    runs: Sequence[Run],
    frozen: Frozen,
    given: Mapping[str, Any],
    gamma: int,
    budget_s: float = NO_BUDGET_S,
    marks: Sequence[float] = (),
) -> list[tuple[Standing, Eagle3]]:
    """Train `first` on `runs` for at most `budget_s`, with `given` in place of the recipe's options.

    Gives the draft as it was at each of the seconds `marks`, and at the end the weights that validated best.
    """
    options = options_for(Recipe.COLD, {"checkpoint_interval_s": NO_BUDGET_S, **given})
    fresh, validation = split_prompts(runs, options.validation_share, b"validation")
    draft = Eagle3.of(first)
    began = time.process_time()
    evaluate(draft, validation, frozen, gamma)
    spare = _VALIDATIONS * (time.process_time() - began)
    left, done = list(marks), list[tuple[Standing, Eagle3]]()
    began = time.process_time()

    def standing() -> Standing:
        return Standing(loop.at.tokens, loop.at.steps, time.process_time() - began)

    def mark(_: object) -> None:
        if left and time.process_time() - began >= left[0]:
            left.pop(0)
            done.append((standing(), deepcopy(draft)))

    nowhere = Path("not-written")
    loop = Loop(draft, frozen, options, fresh, [], validation, gamma, mark, nowhere, "", clock=time.process_time)
    loop.run(budget_s - spare)
    return [*done, (standing(), draft)]
