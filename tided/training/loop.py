"""The training loop: steps until the budget, the passes or the patience are used up, and the weights that validated best.

The loss goes on falling while acceptance already drops, so it selects nothing: acceptance on a validation split of the training
prompts does.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tided.draft.eagle3 import Eagle3, array_of, tensor_of
from tided.draft.tensors import Array
from tided.model.errors import Refused
from tided.model.jobs import Progress
from tided.training import resume
from tided.training.batches import Batch, Order, prefetched
from tided.training.data import Pack, Run
from tided.training.evaluate import evaluate
from tided.training.losses import Candidates, CandidateSampler, Frozen, labels_of, step_loss
from tided.training.optimizer import Optimizer
from tided.training.options import Precision, TrainOptions
from tided.training.ranks import Ranks, gathered, sharded_as
from tided.training.resume import Standing
from tided.training.ttt import Unroll

Report = Callable[[Progress], None]


def pack_loss(
    draft: Eagle3, head: Tensor, pack: Pack, frozen: Frozen, candidates: Candidates, options: TrainOptions
) -> Tensor:
    """The unrolled loss of one pack, a token, weighted by `step_decay`^k over pass k. Weights sum to 1.

    `head` [C, H]: the rows of the draft's head for `candidates`.
    """
    labels = labels_of(pack, frozen, candidates)
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
            loss = step_loss(logits, labels, unroll.active + k, options.hard_weight, options.soft_loss)
            total = total + loss * (weight / (sum(weights) * pack.tokens))
    return total


class Objective(nn.Module):
    """`pack_loss` as a module's forward: where FSDP gathers the draft's parameters.

    `head` [seen, H]: the rows of the draft's head that are trained, those of tokens which occur in the samples (`seen`, draft ids). Of the
    rest, which is most of the head, a step would compute a gradient, clip it and update it to no use: no sample says what it should be.
    """

    def __init__(self, draft: Eagle3, frozen: Frozen, options: TrainOptions, seen: Tensor) -> None:
        super().__init__()
        self.draft = draft
        self._frozen = frozen
        self._options = options
        self._seen = seen
        weight = draft.lm_head.weight.requires_grad_(False)
        self.head = nn.Parameter(weight[seen], requires_grad=options.train_head)

    def forward(self, pack: Pack, candidates: Candidates) -> Tensor:
        drawn = self.draft.lm_head.weight[candidates.ids[len(self._seen) :]]
        head = torch.cat([self.head, drawn])
        return pack_loss(self.draft, head, pack, self._frozen, candidates, self._options)

    @torch.no_grad()
    def settle(self, ranks: Ranks) -> None:
        """Put the trained rows into the draft's head: the steps themselves do without."""
        ranks.put_rows(self.draft.lm_head.weight, self._seen, gathered(self.head))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the rows from the draft's head."""
        self.head.copy_(sharded_as(gathered(self.draft.lm_head.weight)[self._seen], self.head))


@dataclass
class Loop:
    """The loop and its book-keeping. `job` names the training whose checkpoint, at `checkpoint`, may be taken up and is written.

    After `run`, `draft` holds the trained weights that validated best, sharded over `ranks`; whether they beat the parent's is the
    gate's question. `losses` has each step's.
    """

    draft: Eagle3
    frozen: Frozen
    options: TrainOptions
    fresh: Sequence[Run]
    replay: Sequence[Run]
    validation: Sequence[Run]
    gamma: int
    report: Report
    checkpoint: Path
    job: str
    ranks: Ranks = field(default_factory=Ranks)
    clock: Callable[[], float] = time.monotonic  # seconds: what a budget is of

    at: Standing = field(default_factory=Standing)
    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0  # the step of the checkpoint that was taken up

    def run(self, budget_s: float) -> None:
        """Train for at most `budget_s` seconds in all attempts, validation included. Raises `Refused` when the loss is not a number."""
        options = self.options
        sampler = CandidateSampler([*self.fresh, *self.replay], self.frozen, options.negatives, options.seed)
        objective = Objective(self.draft, self.frozen, options, sampler.seen)
        self.ranks.shard(objective)
        optimizer = Optimizer(objective, options)
        kept = self._resumed(objective, optimizer)
        if kept is None:
            self.at.start = self._validate(objective)
            kept = _copy(self.draft)
        order = Order(self.fresh, self.replay, options, self.ranks.rank, self.ranks.count)
        plan = order.planned_tokens()
        began = self.clock() - self.at.elapsed_s
        checked = saved = self.at.elapsed_s
        with closing(prefetched(order.batches(self.at.steps))) as batches:
            for batch in batches:
                now = self.clock()
                self.at.elapsed_s = self.ranks.told(now - began)
                if self.at.elapsed_s >= budget_s or self.at.stale >= options.patience:
                    break
                fraction = max(self.at.tokens / plan, self.at.elapsed_s / budget_s)
                loss = self._loss(objective, batch, sampler.draw(self.at.steps))
                optimizer.step(fraction)
                self._account(batch, loss, self.clock() - now)
                self._tell(loss, fraction)
                if self.validation and self.at.elapsed_s - checked >= options.validation_interval_s:
                    kept = self._select(objective, kept)
                    checked = self.ranks.told(self.clock() - began)
                if self.at.elapsed_s - saved >= options.checkpoint_interval_s:
                    self._save(objective, optimizer, kept)
                    saved = self.at.elapsed_s
        objective.settle(self.ranks)
        if self.validation:
            self.draft.load_state_dict(self._select(objective, kept))

    def metrics(self) -> dict[str, float]:
        """Figures for the job's result."""
        return {
            "steps": float(self.at.steps),
            "resumed_at": float(self.resumed_at),
            "train_s": self.at.train_s,
            "tokens_per_s": self.at.tokens / self.at.train_s if self.at.train_s else 0.0,
            "validation_start": self.at.start,
            "validation_best": self.at.best,
        }

    def _loss(self, objective: Objective, batch: Batch, candidates: Candidates) -> float:
        """The batch's loss a token, its gradients added up. FSDP takes the mean over processes, where the sum is wanted."""
        batch.receive()
        losses: list[Tensor] = []
        for pack, share in batch.packs:
            loss = objective(pack, candidates) * (share * self.ranks.count)
            loss.backward()
            losses.append(loss.detach())
        return self.ranks.total(float(torch.stack(losses).sum()) / self.ranks.count)

    def _validate(self, objective: Objective) -> float:
        if not self.validation:
            return 0.0
        objective.settle(self.ranks)
        autocast = self.options.precision is Precision.BF16
        length = 0.0
        with self.ranks.whole(objective):
            if self.ranks.leads:
                length = evaluate(self.draft, self.validation, self.frozen, self.gamma, autocast).length
        return self.ranks.told(length)

    def _select(self, objective: Objective, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validate, count validations without a gain, and return the best weights so far."""
        length = self._validate(objective)
        if length <= self.at.best:
            self.at.stale += 1
            return kept
        self.at.best, self.at.stale = length, 0
        return _copy(self.draft)

    def _save(self, objective: Objective, optimizer: Optimizer, kept: Mapping[str, Tensor]) -> None:
        """Write the checkpoint: process 0 does, of what all give."""
        objective.settle(self.ranks)
        tensors: dict[str, Array] = {"losses": np.array(self.losses, np.float32)}
        tensors |= {f"draft.{name}": _array(value) for name, value in self.draft.state_dict().items()}
        tensors |= {f"optimizer.{name}": _array(value) for name, value in optimizer.state().items()}
        if self.validation:
            tensors |= {f"best.{name}": array_of(gathered(value)) for name, value in kept.items()}
        if self.ranks.leads:
            resume.save(self.checkpoint, self.job, self.at, tensors)

    def _resumed(self, objective: Objective, optimizer: Optimizer) -> dict[str, Tensor] | None:
        """Take up the checkpoint, if there is one: returns the best weights so far."""
        found = resume.load(self.checkpoint, self.job)
        if found is None:
            return None
        self.at, tensors = found

        def part(name: str) -> dict[str, Array]:
            return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

        self.resumed_at = self.at.steps
        self.losses = tensors["losses"].tolist()
        self.draft.load_state_dict(_placed(part("draft."), self.draft))
        objective.refresh()
        optimizer.restore(part("optimizer."))
        return _placed(part("best."), self.draft) if self.validation else _copy(self.draft)

    def _account(self, batch: Batch, loss: float, seconds: float) -> None:
        if not math.isfinite(loss):
            raise Refused(
                f"training diverged in step {self.at.steps + 1}: the loss is not a number; lower the learning rate"
            )
        self.at.tokens += batch.tokens
        self.at.steps += 1
        self.at.train_s += seconds
        self.losses.append(loss)

    def _tell(self, loss: float, fraction: float) -> None:
        self.report(
            Progress(
                fraction=0.95 * min(1.0, fraction),
                note=f"step {self.at.steps}",
                loss=loss,
                accept_length=self.at.best or self.at.start or None,
                tokens_per_s=self.at.tokens / self.at.train_s,
                eta_s=self.at.elapsed_s * (1 - fraction) / fraction if fraction > 0 else -1.0,
            )
        )


def _array(tensor: Tensor) -> Array:
    return gathered(tensor.detach()).cpu().numpy()


def _placed(arrays: Mapping[str, Array], draft: Eagle3) -> dict[str, Tensor]:
    """A state of `draft` from whole arrays, sharded as `draft` is. Raises `Refused` when they do not fit it."""
    state = draft.state_dict()
    if {name: tuple(value.shape) for name, value in state.items()} != {name: a.shape for name, a in arrays.items()}:
        raise Refused("the checkpoint to resume from holds other tensors than the draft has")
    return {name: sharded_as(tensor_of(arrays[name]).to(like.dtype), like) for name, like in state.items()}


def _copy(draft: Eagle3) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}
