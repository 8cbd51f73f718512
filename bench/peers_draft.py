"""A draft as `speculators` trains it by default, for the one evaluator: with norms that tided's own drafts do not have.

`norm_before_fc`: the three states are normed together before fc. `norm_before_residual`: the layer's residual is the normed feature.
`norm_output`: the next pass reads this pass's output behind the final norm. vLLM computes them, SGLang 0.5.23 does not, so tided serves no
such draft and `tided.draft.formats` refuses it; everything else about it is checked and read there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tided.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.eagle3 import Eagle3, RMSNorm, tensor_of
from tided.draft.formats import import_draft
from tided.draft.tensors import read_header, read_tensor_entry, to_bf16, write_file

NORMS = ("norm_before_fc", "norm_before_residual", "norm_output")
_INPUT_NORM = "input_norm.weight"


class Normed(Eagle3):
    """The draft with those of the three norms that `norms` has set. `input_norm`: the weight [3H] of the first."""

    _norms: Mapping[str, bool]
    _input_norm: RMSNorm

    def wear(self, norms: Mapping[str, bool], input_norm: Tensor | None) -> None:
        """Compute with `norms` from now on."""
        self._norms = norms
        self._input_norm = RMSNorm(3 * self.config.hidden, self.config.rms_eps)
        if input_norm is not None:
            self._input_norm.weight.data = input_norm.float()

    def fuse(self, aux: Tensor) -> Tensor:
        return super().fuse(self._input_norm(aux) if self._norms["norm_before_fc"] else aux)

    def finish(self, h: Tensor, attn_out: Tensor) -> Tensor:
        pre = super().finish(self.midlayer.hidden_norm(h) if self._norms["norm_before_residual"] else h, attn_out)
        return self.norm(pre) if self._norms["norm_output"] else pre

    def logits(self, pre: Tensor) -> Tensor:
        return self.lm_head(pre) if self._norms["norm_output"] else super().logits(pre)


def read(source: Path, target_dir: Path, out: Path) -> Eagle3:
    """The draft in `source`, a checkpoint of `speculators`. `out` is written: `source` without its norms, and that as tided imports it."""
    plain: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text())
    norms = {name: bool(plain.get(name)) for name in NORMS}
    header = read_header(source / WEIGHTS_FILE)
    tensors = {name: read_tensor_entry(source / WEIGHTS_FILE, entry) for name, entry in header.entries.items()}
    weights = {name: to_bf16(array) if array.dtype.kind == "f" else array for name, array in tensors.items()}
    input_norm = weights.pop(_INPUT_NORM, None)
    if norms["norm_before_fc"] != (input_norm is not None):
        raise ValueError(f"{source}: {_INPUT_NORM} and norm_before_fc disagree")
    bare = out / "bare"
    bare.mkdir(parents=True, exist_ok=True)
    (bare / CONFIG_FILE).write_text(json.dumps(plain | dict.fromkeys(NORMS, False)))
    write_file(bare / WEIGHTS_FILE, weights, {"format": "pt"})
    import_draft(bare, target_dir, out / "draft")
    draft = Normed.load(out / "draft")
    assert isinstance(draft, Normed)
    draft.wear(norms, None if input_norm is None else tensor_of(input_norm).to(torch.float32))
    return draft
