"""Optimizers and the learning-rate schedule."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tided.draft.eagle3 import tensor_of
from tided.draft.tensors import Array
from tided.model.errors import Refused
from tided.training.options import OptimizerName, TrainOptions
from tided.training.ranks import sharded_as

_BETAS = (0.9, 0.95)


class Optimizer:
    """AdamW for everything, or Muon for the layer's matrices and AdamW for norms and `head`. Weight decay is 0.

    Its state is that of the parameters that it updates, by their names in `objective`.
    """

    def __init__(self, objective: nn.Module, options: TrainOptions) -> None:
        trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        matrices: list[nn.Parameter] = []
        if options.optimizer is OptimizerName.MUON:
            matrices = [value for name, value in trained.items() if value.ndim == 2 and name != "head"]
        self._matrices = {id(value) for value in matrices}
        rest = [value for value in trained.values() if id(value) not in self._matrices]
        self._options = options
        self._parameters = trained
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=options.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True)
        ]
        if matrices:
            rate = options.matrix_learning_rate
            self._parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self._rates = [part.param_groups[0]["lr"] for part in self._parts]

    def step(self, fraction: float) -> None:
        """Clip, update at the rate that belongs to `fraction` (0..1) of the run, and drop the gradients."""
        nn.utils.clip_grad_norm_(self._parameters.values(), self._options.clip)
        scale = rate_scale(fraction, self._options.warmup_fraction, self._options.final_fraction)
        for part, rate in zip(self._parts, self._rates, strict=True):
            part.param_groups[0]["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step reads beside parameters and gradients, sharded as they are. Empty before the first step."""
        return {
            f"{name}.{key}": value
            for name, _, values in self._states()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what `state` gave, whole. Raises `Refused` when it is not this optimizer's."""
        for name, parameter, values in self._states():
            found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            if any(value.shape not in ((), tuple(parameter.shape)) for value in found.values()) or not found:
                raise Refused(f"the optimizer's state of {name!r} is missing, or of another shape")
            for key, value in found.items():
                whole = tensor_of(value)
                values[key] = sharded_as(whole, parameter) if whole.ndim else whole.to(parameter.device)

    def _states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        for name, parameter in self._parameters.items():
            part = self._parts[-1 if id(parameter) in self._matrices else 0]
            yield name, parameter, part.state[parameter]


def rate_scale(fraction: float, warmup: float, final: float) -> float:
    """Linear warm-up to 1, then a cosine down to `final` (1 = constant)."""
    if fraction < warmup:
        return (fraction / warmup) if fraction > 0 else 1e-2
    along = min(1.0, (fraction - warmup) / max(1e-9, 1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))
