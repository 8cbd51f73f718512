"""The gate: a candidate is deployed only if we are sure that it accepts more than the incumbent does.

Both were scored by the same evaluator on the same held-out requests. The gain is the difference of their token-weighted mean
acceptance lengths; its lower bound comes from a paired bootstrap over requests (one-sided, fixed seed), so that the requests'
own scatter cancels. Algorithm 1 compares served acceptance with an offline score, two estimators; this does not.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tided.config import GateConfig
from tided.model.drafts import Evaluation

_BLOCK = 200


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    WAIT = "wait"  # too few held-out requests or tokens to say


@dataclass(frozen=True, slots=True)
class GateDecision:
    """`gain` = candidate - incumbent in acceptance length on the `requests` that both were scored on; `lower` its lower bound."""

    verdict: Verdict
    incumbent: float
    candidate: float
    gain: float
    lower: float
    requests: int
    tokens: int
    reason: str

    @property
    def gain_share(self) -> float:
        """Of the incumbent's acceptance length; 1.0 where that is not known."""
        return self.gain / self.incumbent if self.incumbent > 0.0 else 1.0


def judge(incumbent: Evaluation, candidate: Evaluation, config: GateConfig) -> GateDecision:
    """Compare two evaluations, matched by group. Deterministic for the same evaluations and configuration."""
    pairs = _pairs(incumbent, candidate)
    n, tokens = len(pairs), int(sum(weight for _, _, weight in pairs))
    if not enough(n, tokens, config):
        need = f"{config.min_requests} requests and {config.min_tokens} tokens are needed"
        old, new = _means(pairs)
        return GateDecision(
            Verdict.WAIT, old, new, new - old, 0.0, n, tokens, f"only {n} requests, {tokens} tokens: {need}"
        )
    old, new = _means(pairs)
    table = np.array(pairs, np.float64)
    lower = _lower_bound((table[:, 1] - table[:, 0]) * table[:, 2], table[:, 2], config)
    if lower > 0.0:
        verdict, reason = Verdict.PASS, f"acceptance length {old:.2f} -> {new:.2f}, gain at least {lower:.3f}"
    else:
        verdict, reason = (
            Verdict.FAIL,
            f"acceptance length {old:.2f} -> {new:.2f}, gain not sure (at least {lower:.3f})",
        )
    return GateDecision(verdict, old, new, new - old, lower, n, tokens, f"{reason} on {n} held-out requests")


def enough(requests: int, tokens: int, config: GateConfig) -> bool:
    """Whether so many can be judged by."""
    return requests >= config.min_requests and tokens >= config.min_tokens


def _pairs(incumbent: Evaluation, candidate: Evaluation) -> list[tuple[float, float, float]]:
    """(old length, new length, tokens) of each request that both scored. A group that came several times is matched in order."""
    if incumbent.gamma != candidate.gamma:
        return []
    old: dict[str, list[tuple[float, int]]] = {}
    for group, length, tokens in zip(incumbent.groups, incumbent.lengths, incumbent.tokens, strict=True):
        old.setdefault(group, []).append((length, tokens))
    pairs: list[tuple[float, float, float]] = []
    for group, length, tokens in zip(candidate.groups, candidate.lengths, candidate.tokens, strict=True):
        if old.get(group):
            before, before_tokens = old[group].pop(0)
            weight = min(tokens, before_tokens)
            if weight > 0:
                pairs.append((before, length, float(weight)))
    return pairs


def _means(pairs: list[tuple[float, float, float]]) -> tuple[float, float]:
    total = sum(weight for _, _, weight in pairs)
    if total == 0:
        return 0.0, 0.0
    return sum(old * w for old, _, w in pairs) / total, sum(new * w for _, new, w in pairs) / total


def _lower_bound(gains: np.ndarray, weights: np.ndarray, config: GateConfig) -> float:
    """The (1 - confidence) quantile of the resampled weighted mean gain; `gains` are already multiplied by `weights`."""
    random = np.random.default_rng(config.seed)
    means: list[np.ndarray] = []
    for start in range(0, config.resamples, _BLOCK):
        drawn = random.integers(0, gains.size, (min(_BLOCK, config.resamples - start), gains.size))
        means.append(gains[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return float(np.quantile(np.concatenate(means), 1.0 - config.confidence))
