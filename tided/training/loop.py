"""The training loop: steps until the budget, the passes or the patience are used up, and the weights that validated best.

The loss goes on falling while acceptance already drops, so it selects nothing: acceptance on a validation split of the training
prompts does.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tided.draft.eagle3 import Eagle3
from tided.model.errors import Refused
from tided.model.records import Progress
from tided.training.data import Pack, Run, equal_packs, mix
from tided.training.evaluate import evaluate
from tided.training.losses import Candidates, CandidateSampler, Frozen, labels_of, step_loss
from tided.training.optimizer import Optimizer
from tided.training.options import Precision, TrainOptions
from tided.training.ttt import Unroll

Report = Callable[[Progress], None]


def pack_loss(draft: Eagle3, pack: Pack, frozen: Frozen, candidates: Candidates, options: TrainOptions) -> Tensor:
    """The unrolled loss of one pack, a token, weighted by `step_decay`^k over pass k. Weights sum to 1."""
    labels = labels_of(pack, frozen, candidates)
    head = draft.lm_head.weight[candidates.ids]
    total = torch.zeros((), device=pack.left.device)
    weights = [options.step_decay**k for k in range(options.unroll_steps)]
    with torch.autocast(pack.left.device.type, torch.bfloat16, enabled=options.precision is Precision.BF16):
        unroll = Unroll(draft, pack, frozen.embedding)
        for k, weight in enumerate(weights):
            if k:
                active = (pack.left > k).nonzero().squeeze(1)
                if not len(active):
                    break
                unroll.advance(active)
            logits = torch.nn.functional.linear(draft.norm(unroll.pre), head) + candidates.correction
            loss = step_loss(logits, labels, unroll.active + k, options.hard_weight)
            total = total + loss * (weight / (sum(weights) * pack.tokens))
    return total


@dataclass
class Loop:
    """The loop and its book-keeping.

    After `run`, `draft` holds the trained weights that validated best; whether they beat the parent's is the gate's question.
    """

    draft: Eagle3
    frozen: Frozen
    options: TrainOptions
    fresh: Sequence[Run]
    replay: Sequence[Run]
    validation: Sequence[Run]
    gamma: int
    report: Report

    tokens: int = 0  # trained, counted once a pass
    steps: int = 0
    train_s: float = 0.0  # of the steps alone
    start: float = 0.0  # validation acceptance length before training
    best: float = 0.0

    def run(self, budget_s: float) -> None:
        """Train for at most `budget_s` seconds, validation included. Raises `Refused` when the loss is no longer a number."""
        options = self.options
        self.draft.lm_head.weight.requires_grad_(options.train_head)
        optimizer = Optimizer(self.draft, options)
        began = checked = time.monotonic()
        self.start = self._validate()
        kept = _copy(self.draft)
        plan = self._planned_tokens()
        sampler = CandidateSampler([*self.fresh, *self.replay], self.frozen, options.negatives)
        stale = 0
        for pack in self._packs():
            now = time.monotonic()
            elapsed_s = now - began
            if elapsed_s >= budget_s or stale >= options.patience:
                break
            fraction = max(self.tokens / plan, elapsed_s / budget_s)
            loss = pack_loss(self.draft, pack, self.frozen, sampler.draw(), options)
            loss.backward()
            optimizer.step(fraction)
            self._account(pack, float(loss.detach()), time.monotonic() - now)
            self._tell(float(loss.detach()), fraction, elapsed_s)
            if self.validation and time.monotonic() - checked >= options.validation_interval_s:
                stale, kept = self._select(stale, kept)
                checked = time.monotonic()
        if self.validation:
            _, kept = self._select(stale, kept)
            self.draft.load_state_dict(kept)

    def metrics(self) -> dict[str, float]:
        """Figures for the job's result."""
        return {
            "steps": float(self.steps),
            "train_s": self.train_s,
            "tokens_per_s": self.tokens / self.train_s if self.train_s else 0.0,
            "validation_start": self.start,
            "validation_best": self.best,
        }

    def _packs(self) -> Iterator[Pack]:
        rng = random.Random(self.options.seed)
        for _ in range(self.options.passes):
            runs = mix(self.fresh, self.replay, self.options.replay_share, rng)
            yield from equal_packs(runs, self.options.batch_tokens, self.options.device)

    def _planned_tokens(self) -> float:
        fresh = sum(len(run.queries(0)) for run in self.fresh)
        spare = sum(len(run.queries(0)) for run in self.replay)
        share = self.options.replay_share
        return self.options.passes * (fresh + min(spare, fresh * share / (1 - share)))

    def _validate(self) -> float:
        if not self.validation:
            return 0.0
        autocast = self.options.precision is Precision.BF16
        return evaluate(self.draft, self.validation, self.frozen, self.gamma, autocast).length

    def _select(self, stale: int, kept: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        """Validate; the count of validations without a gain, and the best weights so far."""
        length = self._validate()
        if length <= self.best:
            return stale + 1, kept
        self.best = length
        return 0, _copy(self.draft)

    def _account(self, pack: Pack, loss: float, seconds: float) -> None:
        if not math.isfinite(loss):
            raise Refused(
                f"training diverged in step {self.steps + 1}: the loss is not a number; lower the learning rate"
            )
        self.tokens += pack.tokens
        self.steps += 1
        self.train_s += seconds

    def _tell(self, loss: float, fraction: float, elapsed_s: float) -> None:
        self.report(
            Progress(
                fraction=0.95 * min(1.0, fraction),
                note=f"step {self.steps}",
                loss=loss,
                accept_length=self.best or self.start or None,
                tokens_per_s=self.tokens / self.train_s,
                eta_s=elapsed_s * (1 - fraction) / fraction if fraction > 0 else -1.0,
            )
        )


def _copy(draft: Eagle3) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}
