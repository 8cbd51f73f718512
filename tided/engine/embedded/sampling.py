"""How tokens are chosen: greedy, or sampled, with acceptance of drafted tokens that leaves the target's distribution untouched.

Rejection sampling as in Leviathan et al. 2023 (arXiv 2211.17192): a token x drafted from q is accepted with probability
min(1, p(x) / q(x)); a rejected one is replaced by a sample of max(p - q, 0), normalised.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy. `top_p` narrows the target's distribution only, so acceptance stays lossless."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature <= 0.0

    @property
    def plain(self) -> float | None:
        """The temperature to report: None where `top_p` narrows the distribution too."""
        if self.greedy:
            return 0.0
        return self.temperature if self.top_p >= 1.0 else None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens of one sampled request: target ids, and the distributions that they were drawn from."""

    tokens: list[int]
    q: torch.Tensor  # [gamma, draft_vocab], float32
    vocabulary: torch.Tensor  # [draft_vocab]: the target id of each draft id


def generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """The random source of one request; None for a greedy one."""
    if params.greedy:
        return None
    source = torch.Generator(device)
    if params.seed is None:
        source.seed()
    else:
        source.manual_seed(params.seed)
    return source


def distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [..., vocab] in float32 of what `params` ask to sample from."""
    p = torch.softmax(logits.float() / params.temperature, dim=-1)
    if params.top_p >= 1.0:
        return p
    ordered, indices = p.sort(dim=-1, descending=True)
    # A token is kept while the mass before it is below top_p, so the likeliest one always is.
    kept = ordered.masked_fill_(ordered.cumsum(dim=-1) - ordered >= params.top_p, 0.0)
    p = torch.zeros_like(p).scatter_(-1, indices, kept)
    return p / p.sum(dim=-1, keepdim=True)


def draw(p: torch.Tensor, source: torch.Generator) -> int:
    """One sample of the distribution p [vocab]."""
    return int(torch.multinomial(p, 1, generator=source))


def accept_greedy(drafted: list[int], choices: list[int]) -> list[int]:
    """`choices[k]`: the target's argmax after drafted[:k], one more than drafted. Gives the accepted tokens and the bonus."""
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == choices[accepted]:
        accepted += 1
    return choices[: accepted + 1]


def accept_sampled(
    proposal: Proposal | None, logits: torch.Tensor, params: SamplingParams, source: torch.Generator
) -> list[int]:
    """Accepted tokens and one more, distributed exactly as the target alone would sample them.

    logits: [gamma + 1, vocab] of the target after each drafted prefix; gamma = 0 without a proposal.
    """
    p = distribution(logits, params)
    if proposal is None:
        return [draw(p[0], source)]
    out: list[int] = []
    for k, token in enumerate(proposal.tokens):
        q = torch.zeros_like(p[k]).scatter_(0, proposal.vocabulary, proposal.q[k])
        if float(torch.rand((), generator=source, device=p.device)) * float(q[token]) < float(p[k, token]):
            out.append(token)
            continue
        residual = (p[k] - q).clamp_(min=0.0)
        # Rounding can leave nothing where p and q are equal; p itself is right then.
        out.append(draw(residual if float(residual.sum()) > 0.0 else p[k], source))
        return out
    return [*out, draw(p[-1], source)]
