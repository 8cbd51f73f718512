"""Rejection sampling leaves the target's distribution as it is: chi-square over many draws."""

import pytest
import torch

from tided.engine.embedded.sampling import (
    Proposal,
    SamplingParams,
    accept_greedy,
    accept_sampled,
    distribution,
    draw,
    generator,
)

VOCAB = 12
DRAWS = 8_000
CHI_SQUARE_11_P_1E_4 = 37.37
CHI_SQUARE_143_P_1E_4 = 216.0


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic; what cannot occur must not occur."""
    assert int(counts[p == 0].sum()) == 0
    expected = p[p > 0] * counts.sum()
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_accepted_and_replaced_tokens_follow_the_target(temperature: float, top_p: float) -> None:
    params = SamplingParams(temperature, top_p, seed=7)
    source = generator(params, torch.device("cpu"))
    assert source is not None
    seeded = torch.Generator().manual_seed(3)
    # The second token's distribution depends on the first one, as in a real model.
    logits = torch.randn(1 + VOCAB, VOCAB, generator=seeded)
    vocabulary = torch.tensor([0, 2, 3, 5, 8, 11])  # the draft knows half of the tokens
    q = torch.softmax(logits[:2, vocabulary] / 2 + torch.randn(2, 6, generator=seeded) / 2, dim=-1)
    first, pairs = torch.zeros(VOCAB), torch.zeros(VOCAB, VOCAB)
    accepted = 0
    for _ in range(DRAWS):
        tokens = [int(vocabulary[draw(q[k], source)]) for k in range(2)]
        verified = torch.stack((logits[0], logits[1 + tokens[0]], logits[1 + tokens[1]]))
        out = accept_sampled(Proposal(tokens, q, vocabulary), verified, params, source)
        assert out[:-1] == tokens[: len(out) - 1]
        accepted += len(out) - 1
        first[out[0]] += 1
        if len(out) > 1:
            pairs[out[0], out[1]] += 1
    p = distribution(logits, params)
    assert 0.05 < accepted / (2 * DRAWS) < 0.9
    assert chi_square(first, p[0]) < CHI_SQUARE_11_P_1E_4
    # Where a first token was accepted, the second follows the target given the first.
    conditional = pairs.sum(dim=1, keepdim=True) * p[1:]
    seen = conditional >= 5
    assert float((((pairs - conditional) ** 2)[seen] / conditional[seen]).sum()) < CHI_SQUARE_143_P_1E_4


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    params = SamplingParams(1.0, seed=1)
    source = generator(params, torch.device("cpu"))
    assert source is not None
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    p = distribution(logits, params)
    for _ in range(200):
        tokens = [draw(p[k], source) for k in range(3)]
        assert accept_sampled(Proposal(tokens, p[:3], torch.arange(VOCAB)), logits, params, source)[:3] == tokens


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert distribution(logits, SamplingParams(1.0, 0.7)).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert distribution(logits, SamplingParams(1.0, 0.01)).tolist() == [1, 0, 0, 0]


def test_greedy_acceptance_stops_at_the_first_difference() -> None:
    assert accept_greedy([], [4]) == [4]
    assert accept_greedy([4, 5, 6], [4, 5, 6, 7]) == [4, 5, 6, 7]
    assert accept_greedy([4, 9, 6], [4, 5, 6, 7]) == [4, 5]


def test_the_same_seed_gives_the_same_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        source = generator(SamplingParams(1.0, seed=seed), torch.device("cpu"))
        assert source is not None
        return [draw(torch.full((1000,), 0.001), source) for _ in range(8)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)
