"""The trainer's options, checked strictly, with the defaults that each recipe gives (docs/adr/0010-training-recipe.md)."""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

import torch

from tided.model.codec import from_plain, to_plain
from tided.model.errors import Refused
from tided.model.jobs import Recipe


class OptimizerName(StrEnum):
    ADAMW = "adamw"
    MUON = "muon"  # for the matrices; norms and head stay with AdamW


class SoftLoss(StrEnum):
    """How far a draft's distribution q is from the target's p."""

    KL = "kl"  # forward KL divergence
    LK = "lk"  # -log of the rate at which a token sampled from q is accepted


class Precision(StrEnum):
    """`usable` gives what a device can do of it."""

    BF16 = "bf16"  # matmuls only; master weights, norms, softmax and optimizer are float32
    FP32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """Of the target's matrices and of samples while they are computed with."""
        return torch.bfloat16 if self is Precision.BF16 else torch.float32


def usable(precision: Precision, device: str) -> Precision:
    """`precision`, or FP32 where `device` has no arithmetic in BF16. Processors that only emulate it are faster in FP32."""
    kind = torch.device(device).type
    if kind == "cpu":
        known = any("bf16" in name and present for name, present in torch.cpu.get_capabilities().items())
    else:
        ask = getattr(torch.get_device_module(kind), "is_bf16_supported", None)
        known = ask is None or bool(ask())
    return precision if known else Precision.FP32


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything about a training run that is not data. A token here is a position whose prediction is trained."""

    optimizer: OptimizerName = OptimizerName.ADAMW
    learning_rate: float = 1e-3  # AdamW's
    matrix_learning_rate: float = 5e-3  # Muon's, scaled to match AdamW's root mean square
    warmup_fraction: float = 0.05
    final_fraction: float = 0.05  # of the learning rate, at the end of the cosine
    passes: int = 8  # over the fresh samples, at most; the budget may end it earlier
    batch_tokens: int = 128  # tokens a pack: with `pack_rows` it bounds the memory of a step
    pack_rows: int = 8192  # rows a pack, prompts included, if not eight times `batch_tokens`; of a longer run the earliest are left out
    packs: int = 1  # a step: one after the other (gradients are accumulated), or shared by that many processes
    unroll_steps: int = 4
    step_decay: float = 0.8
    negatives: int = 512  # draft tokens that occur in no sample, drawn afresh for each step's softmax
    soft_loss: SoftLoss = SoftLoss.KL
    hard_weight: float = 0.5  # of the cross entropy on ids, beside the soft loss
    train_head: bool = True
    clip: float = 0.5
    replay_share: float = 0.25  # of the samples of a pass, when there is anything to replay
    validation_share: float = 0.06  # of the fresh prompts, held back to select the checkpoint
    validation_interval_s: float = 15.0
    patience: int = 6  # validations without a gain before training stops
    held_out_tokens: int = 12_000  # of the held-out shards, scored at most
    held_out_share: float = 0.0  # of the shards' prompts, held out where a job has no held-out shards
    checkpoint_interval_s: float = 120.0  # between checkpoints to resume from; a shorter job writes none
    adapt_vocabulary: bool = False  # re-select the draft vocabulary; only for engines that can swap it
    precision: Precision = Precision.BF16
    threads: int = 1
    device: str = "cpu"
    seed: int = 0


ROWS_A_TOKEN = 8
"""Prompts are longer than answers: room for so many rows a trained token."""

RECIPES: dict[Recipe, TrainOptions] = {
    Recipe.COLD: TrainOptions(learning_rate=2e-3),
    Recipe.DRIFT: TrainOptions(),
    Recipe.REFRESH: TrainOptions(learning_rate=1e-4, matrix_learning_rate=5e-4, passes=1, final_fraction=1.0),
}


def options_for(recipe: Recipe, given: dict[str, Any]) -> TrainOptions:
    """The recipe's options with `given` in place of its values. Raises `Refused` for an unknown name or a value out of range."""
    options = from_plain(TrainOptions, {**to_plain(RECIPES[recipe]), **given}, "options")
    if "pack_rows" not in given:
        options = replace(options, pack_rows=max(options.pack_rows, ROWS_A_TOKEN * options.batch_tokens))
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int | float) and value < 0:
            raise Refused(f"options.{field.name}: must not be negative, got {value}")
    for name in (
        *("passes", "batch_tokens", "packs", "unroll_steps", "threads", "clip"),
        *("validation_interval_s", "patience"),
    ):
        if not getattr(options, name):
            raise Refused(f"options.{name}: must be above 0")
    shares = ("replay_share", "validation_share", "held_out_share")
    for name in ("warmup_fraction", "final_fraction", "step_decay", *shares):
        if getattr(options, name) > 1:
            raise Refused(f"options.{name}: must be in 0..1, got {getattr(options, name)}")
    if any(getattr(options, name) == 1 for name in shares):
        raise Refused(f"options: {', '.join(shares)} must leave something to train on")
    if options.pack_rows < options.batch_tokens + 1:
        raise Refused("options.pack_rows: must exceed batch_tokens; a pack's tokens are rows of it")
    return options
