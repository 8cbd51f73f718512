"""Optimizers and the learning-rate schedule."""

import math

import torch
from torch import nn

from tided.training.options import OptimizerName, TrainOptions

_BETAS = (0.9, 0.95)


class Optimizer:
    """AdamW for everything, or Muon for the layer's matrices and AdamW for norms and head. Weight decay is 0."""

    def __init__(self, draft: nn.Module, options: TrainOptions) -> None:
        trained = {name: value for name, value in draft.named_parameters() if value.requires_grad}
        matrices: list[nn.Parameter] = []
        if options.optimizer is OptimizerName.MUON:
            matrices = [value for name, value in trained.items() if value.ndim == 2 and name != "lm_head.weight"]
        chosen = {id(value) for value in matrices}
        rest = [value for value in trained.values() if id(value) not in chosen]
        self._options = options
        self._parameters = list(trained.values())
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=options.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True)
        ]
        if matrices:
            rate = options.matrix_learning_rate
            self._parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self._rates = [part.param_groups[0]["lr"] for part in self._parts]

    def step(self, fraction: float) -> None:
        """Clip, update at the rate that belongs to `fraction` (0..1) of the run, and drop the gradients."""
        nn.utils.clip_grad_norm_(self._parameters, self._options.clip)
        scale = rate_scale(fraction, self._options.warmup_fraction, self._options.final_fraction)
        for part, rate in zip(self._parts, self._rates, strict=True):
            part.param_groups[0]["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)


def rate_scale(fraction: float, warmup: float, final: float) -> float:
    """Linear warm-up to 1, then a cosine down to `final` (1 = constant)."""
    if fraction < warmup:
        return (fraction / warmup) if fraction > 0 else 1e-2
    along = min(1.0, (fraction - warmup) / max(1e-9, 1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))
