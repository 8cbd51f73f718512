"""Whether rows are at their tokens, told without a reference: early in a model a token's state still resembles its embedding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tided.draft import target
from tided.draft.reference import Float
from tided.draft.tensors import to_float32
from tided.model.verification import Check, CheckOutcome
from tided.services.diagnosis import LEAST_ROWS, SHIFTS, Tapped, failed, moved

NAME = "embeddings"
LIKE = 8.0
"""From so many standard errors on, a mean cosine is no chance: of unrelated vectors it is 0 +- 1 / sqrt(rows x values). With the first of
SmolLM2-135M's aux states, of 80 rows, it is 14, and 2 at most at any other shift."""
CLEARER = 2.0
"""So many times more must another position resemble, before rows are said to be there."""
_TINY = 1e-12


def resemble(target_dir: Path, requests: Sequence[Tapped]) -> Check:
    """Hold the lowest aux state of each row against the embeddings of its token and of those around it. Blocks: it reads the target."""
    likeness = {shift: _likeness(target_dir, requests, shift) for shift in (0, *SHIFTS)}
    best = max(likeness, key=lambda shift: likeness[shift])
    if likeness[best] < LIKE:
        measured = "the lowest states resemble neither their tokens' embeddings nor those around: nothing can be told"
        return Check(NAME, CheckOutcome.SKIPPED, measured)
    if best and likeness[best] > CLEARER * likeness[0]:
        measured = f"the lowest states resemble the embeddings of other tokens: rows are {moved(best)}"
        return failed(NAME, measured, "fix which rows the tap takes of a step")
    measured = f"the lowest states resemble their tokens' embeddings ({likeness[0]:.0f} standard errors)"
    return Check(NAME, CheckOutcome.OK, measured)


def _likeness(target_dir: Path, requests: Sequence[Tapped], shift: int) -> float:
    """The mean cosine, in standard errors, between states and the embeddings of the tokens `shift` positions on; 0 for too few rows.

    Both with their mean over the rows taken off and scaled to one spread a dimension: some dimensions are huge and the same everywhere.
    """
    rows, tokens = list[Float](), list[int]()
    for request in requests:
        known = [(i, request.tokens.get(position + shift)) for i, position in enumerate(request.positions.tolist())]
        rows += [to_float32(request.bits[i, 0]) for i, token in known if token is not None]
        tokens += [token for _, token in known if token is not None]
    if len(rows) < LEAST_ROWS:
        return 0.0
    table = target.read_tensor(target_dir, "model.embed_tokens.weight")
    states, embeddings = _scaled(np.stack(rows)), _scaled(to_float32(table[np.array(tokens)]))
    norms = np.linalg.norm(states, axis=1) * np.linalg.norm(embeddings, axis=1)
    return float(((states * embeddings).sum(1) / np.maximum(norms, _TINY)).mean() * np.sqrt(states.size))


def _scaled(values: Float) -> Float:
    spread = values.std(0)
    return (values - values.mean(0)) / np.maximum(spread, _TINY)
