"""What the device bench counts: operations against a count by hand, and the tap's cost from the seconds of its turns."""

from dataclasses import replace

import pytest
import torch

from bench import device
from tided.model.jobs import Recipe
from tided.training.losses import Frozen
from tided.training.options import options_for

SMALL = replace(device.LARGE, hidden=32, intermediate=80, heads=4, kv_heads=2, head_dim=16, vocab=300, draft_vocab=128)
CPU = torch.device("cpu")


def test_operations_are_those_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "LARGE", SMALL)
    monkeypatch.setattr(device, "PROMPTS", (1, 2))
    monkeypatch.setattr(device, "ANSWERS", (200, 201))
    ids = torch.arange(SMALL.vocab)
    frozen = Frozen(torch.randn(300, 32).bfloat16(), torch.randn(128, 32).bfloat16(), ids.where(ids < 128, -1))
    runs = list(device.synthetic(2000, SMALL.hidden, SMALL.vocab, CPU))
    options = options_for(Recipe.COLD, {"batch_tokens": 10_000, "pack_rows": 80_000, "passes": 1})
    found, candidates = device.operations_of(runs, frozen, options)
    h, attention, shared = SMALL.hidden, SMALL.heads * SMALL.head_dim, SMALL.kv_heads * SMALL.head_dim
    layer = 2 * h * attention + 2 * 2 * h * shared + attention * h + 3 * h * SMALL.intermediate
    # Answers are long and their prompts one token: nearly every row is asked in each of four passes. Forward and backward are three
    # products each; the labels' are one, for the target is not trained; neither do the states want a gradient (fc).
    expected = 2 * (3 * 4 * (layer + h * candidates) + candidates * h + 2 * 3 * h * h)
    assert found == pytest.approx(expected, rel=0.03)


def test_a_taps_cost_is_what_its_turns_take_longer() -> None:
    found = {"none": [1.0, 1.0, 2.0], "side": [1.01, 1.01, 2.02], "waits": [1.25, 1.25, 2.5]}
    claims = {claim.id: claim for claim in device.costs_of(8, found, 0)}
    assert claims["device-step-8"].value == pytest.approx(1000 / device.STEPS)
    assert claims["device-tap-side-8"].value == pytest.approx(0.99, abs=0.01)
    assert claims["device-tap-side-8"].met
    assert claims["device-tap-waits-8"].value == pytest.approx(20.0)
    assert claims["device-tap-waits-8"].met is None
    assert claims["device-tap-shed-8"].met
