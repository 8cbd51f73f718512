"""The reference of the contract: transformers in float32 on the subject's target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.contract.peer import Array
from tided.draft.target import describe, read_config


class Reference:
    """Greedy answers and states to compare with."""

    def __init__(self, target_dir: Path) -> None:
        self.info = describe(target_dir)
        self.eos = read_config(target_dir).eos
        self._model: Any = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()

    @torch.inference_mode()
    def states(self, tokens: Sequence[int], layers: Sequence[int], *, last: bool) -> Array:
        """[tokens, layers (and 1), hidden]: the residual stream before the layers, and the last state after the final norm."""
        hidden = self._model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
        chosen = [hidden[layer] for layer in layers] + ([hidden[-1]] if last else [])
        return np.asarray(torch.cat(chosen).transpose(0, 1).float().numpy())

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """What follows `prompt`, whatever tokens end a request."""
        ids = torch.tensor([list(prompt)])
        generated = self._model.generate(
            ids,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )
        return [int(token) for token in generated[0, len(prompt) :]]

    @torch.inference_mode()
    def worst_choice(self, prompt: Sequence[int], output: Sequence[int]) -> float:
        """How far, in logits, the worst token of `output` is from the greedy one after what comes before it."""
        ids = torch.tensor([[*prompt, *output]])
        logits = self._model(ids).logits[0, len(prompt) - 1 : -1]
        gap = logits.max(dim=-1).values - logits.gather(1, torch.tensor(list(output))[:, None])[:, 0]
        return float(gap.max())
