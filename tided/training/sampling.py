"""What a draft gives at a temperature: the tokens of it that an engine which samples rightly accepts, by the temperature of the traffic.

A token drafted from q is accepted with probability sum_v min(p_v, q_v), p being the target's distribution (Leviathan et al. 2023, arXiv
2211.17192). The target is not run: p comes from the last hidden state through its head. Given the answer that was served, drafted
token x of it is accepted with probability min(1, q(x) / p(x)), whose mean over p is that sum: so the steps of serving are walked over
the answer in expectation, and no draw is made.

Samples do not tell how they were sampled, but their tokens do: each run counts for each temperature with the probability (Bayes, from
the shares of the requests) that it was sampled there. A run of likeliest tokens only may be greedy, or sampled where that was likely
anyway; to call it the one or the other would make greedy requests look easier than they are. Greedy tokens are taken as sampled at
a temperature near zero, for states are rounded to BF16 and near ties may fall otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from tided.draft.eagle3 import Eagle3
from tided.model.drafts import SamplingScore
from tided.training.data import Pack, Run, whole_packs
from tided.training.losses import Frozen
from tided.training.ttt import Unroll

_PACK_TOKENS = 512
_HEAD_ROWS = 128
_NEARLY_GREEDY = 0.05
_LEAST_WEIGHT = 0.01
"""A run that belongs to a temperature with less probability is left out there."""


@dataclass(frozen=True, slots=True)
class _Labels:
    """The target's view of a pack's labels: `ids` [Q] draft ids or -1, `logits` [Q, draft_vocab]; `norms` [Q, T] log-sum-exp over the
    whole vocabulary and `likelihoods` [Q, T] of the labels, at each temperature."""

    ids: Tensor
    logits: Tensor
    norms: Tensor
    likelihoods: Tensor


@dataclass(frozen=True, slots=True)
class _Chances:
    """Of drafted token k from each query, [T, Q, gamma]: `kept`, the probability that it is accepted given the answer, and `given`,
    that any token drafted there is."""

    kept: Tensor
    given: Tensor


@torch.inference_mode()
def evaluate_sampling(
    draft: Eagle3,
    runs: Sequence[Run],
    frozen: Frozen,
    head: Tensor,
    gamma: int,
    mix: Sequence[tuple[float, float]],
    autocast: bool = True,
) -> tuple[SamplingScore, ...]:
    """Score `draft` on those of `runs` that have the last state, for each temperature at which some were sampled, ascending.

    `head` [vocab, H] is the target's whole head. `mix`: (temperature, share of the requests), 0.0 being greedy.
    """
    temperatures, shares = [temperature for temperature, _ in mix], [share for _, share in mix]
    tables: dict[float, dict[bytes, Tensor]] = {temperature: {} for temperature in temperatures}
    device = frozen.embedding.device
    for pack in whole_packs([run for run in runs if run.has_last], _PACK_TOKENS, skip=1, device=str(device)):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            labels = _labels(pack, frozen, head, temperatures)
            modes = _chances(draft, pack, frozen, labels, temperatures, gamma)
        for group, span in zip(pack.groups, pack.spans, strict=True):
            weights = _posterior(labels.likelihoods[span.queries], shares)
            for i, (temperature, weight) in enumerate(zip(temperatures, weights, strict=True)):
                if weight < _LEAST_WEIGHT:
                    continue
                walks = [expected_walk(mode.kept[i, span.queries], mode.given[i, span.queries]) for mode in modes]
                counts, table = weight * torch.stack(walks), tables[temperature]
                table[group] = table[group] + counts if group in table else counts
    return tuple(_score(temperature, table) for temperature, table in sorted(tables.items()) if table)


def _posterior(likelihoods: Tensor, shares: Sequence[float]) -> list[float]:
    """How probably a run with these log-likelihoods [n, T] was sampled at each temperature."""
    prior = torch.tensor([log(max(share, 1e-9)) for share in shares], dtype=torch.float64)
    return torch.softmax(likelihoods.sum(0).double().cpu() + prior, 0).tolist()


def expected_walk(kept: Tensor, given: Tensor) -> Tensor:
    """[2, gamma] float64, as `tided.training.evaluate.walk` in expectation: how often drafted token k is judged, and accepted.

    kept, given [n, gamma]: see `_Chances`. A step that accepts a tokens emits a + 1, and the next one begins behind them.
    """
    n, gamma = kept.shape
    judged, accepted = [0.0] * gamma, [0.0] * gamma
    begins = [1.0, *[0.0] * (n + gamma)]
    for start, (chances, overall) in enumerate(zip(kept.tolist(), given.tolist(), strict=True)):
        reached = begins[start]
        for k in range(min(gamma, n - start)):
            judged[k] += reached
            accepted[k] += reached * overall[k]
            begins[start + k + 1] += reached * (1.0 - chances[k])
            reached *= chances[k]
        begins[start + min(gamma, n - start) + 1] += reached
    return torch.tensor([judged, accepted], dtype=torch.float64)


def _labels(pack: Pack, frozen: Frozen, head: Tensor, temperatures: Sequence[float]) -> _Labels:
    assert pack.last is not None
    targets = _target_ids(frozen)
    ids = frozen.draft_ids[pack.label_ids]
    logits = torch.empty(pack.tokens, len(targets), device=ids.device)
    norms = torch.zeros(pack.tokens, len(temperatures), device=ids.device)
    likelihoods = torch.zeros_like(norms)
    # Greedy requests alone: there are no others to tell them from, and what is right the tokens say.
    for start in range(0, pack.tokens if any(temperatures) else 0, _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        whole = (pack.last[rows].to(head.dtype) @ head.T).float()
        at = pack.label_ids[rows].unsqueeze(1)
        logits[rows] = whole[:, targets]
        for i, temperature in enumerate(temperatures):
            scaled = whole / (temperature or _NEARLY_GREEDY)
            # Ten times as fast as logsumexp where most of the vocabulary is next to impossible.
            likelihoods[rows, i] = scaled.log_softmax(-1).gather(1, at).squeeze(1)
            norms[rows, i] = scaled.gather(1, at).squeeze(1) - likelihoods[rows, i]
    return _Labels(ids, logits, norms, likelihoods)


def _target_ids(frozen: Frozen) -> Tensor:
    """[draft_vocab] the target id of each draft id."""
    known = (frozen.draft_ids >= 0).nonzero().squeeze(1)
    ids = torch.empty_like(known)
    ids[frozen.draft_ids[known]] = known
    return ids


def _chances(
    draft: Eagle3, pack: Pack, frozen: Frozen, labels: _Labels, temperatures: Sequence[float], gamma: int
) -> tuple[_Chances, _Chances]:
    """For a draft that proposes samples of its distribution, and for one that proposes its likeliest token."""
    size = (4, len(temperatures), pack.tokens, gamma)
    table = torch.zeros(size, dtype=torch.float64, device=labels.ids.device)
    unroll = Unroll(draft, pack, frozen.embedding)
    for k in range(gamma):
        active = unroll.active
        logits = draft.logits(unroll.pre).float()
        for i, temperature in enumerate(temperatures):
            table[:, i, active, k] = _judged(logits, labels, active + k, i, temperature).double()
        # Behind a token that is surely refused nothing is asked.
        reached = (table[0, :, active, k] + table[2, :, active, k]).sum(0) > 0.0
        going_on = active[reached & (pack.left[active] > k + 1)]
        if k + 1 == gamma or not len(going_on):
            break
        unroll.advance(going_on)
    return _Chances(table[0], table[1]), _Chances(table[2], table[3])


def _judged(logits: Tensor, labels: _Labels, rows: Tensor, i: int, temperature: float) -> Tensor:
    """[4, n] of the tokens drafted from `logits` [n, draft_vocab] against labels `rows`: kept and given when they are sampled, kept and
    given when they are the likeliest."""
    ids, likeliest = labels.ids[rows], logits.argmax(-1)
    right = (likeliest == ids).float()
    if not temperature:
        return right.repeat(4, 1)
    q = torch.softmax(logits / temperature, -1)
    p = torch.exp(labels.logits[rows] / temperature - labels.norms[rows, i].unsqueeze(1))
    label = ids.clamp(min=0).unsqueeze(1)
    ratio = (q.gather(1, label) / p.gather(1, label)).squeeze(1).clamp(max=1.0)
    kept = torch.where(ids >= 0, ratio, 0.0)
    return torch.stack([kept, torch.minimum(p, q).sum(-1), right, p.gather(1, likeliest.unsqueeze(1)).squeeze(1)])


def _score(temperature: float, table: dict[bytes, Tensor]) -> SamplingScore:
    """`table`: [2 modes, 2, gamma] of each prompt."""
    counts = torch.stack(list(table.values()))
    overall = counts.sum(0)
    conditional = (overall[:, 1] / overall[:, 0].clamp(min=1e-9)).tolist()
    return SamplingScore(
        temperature=temperature,
        steps=tuple(counts[:, 0, 0, 0].tolist()),
        accepted=tuple(counts[:, 0, 1].sum(-1).tolist()),
        conditional=tuple(conditional[0]),
        likeliest=tuple(conditional[1]),
    )
