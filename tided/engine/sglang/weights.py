"""The draft's weights inside SGLang: where each tensor of a checkpoint lies, reading back, and exchanging them in place.

SGLang fuses q, k, v and gate, up, pads the head, and shares the embedding with the target. A checkpoint's tensors are therefore views
into its parameters; they are written where they lie, so that captured graphs keep their addresses. Nothing that the target uses is
ever written: every view is compared with the target's memory first.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tided.draft import checkpoint
from tided.draft.checkpoint import Checkpoint, DraftConfig
from tided.draft.target import TargetShape
from tided.model.errors import Refused

if TYPE_CHECKING:
    import torch

VOCABULARY = ("d2t", "t2d")


@dataclass(frozen=True, slots=True)
class Staged:
    """A checked checkpoint in the engine's dtype and on its device, ready to be copied into place."""

    path: Path
    config: DraftConfig
    version: str
    vocab_id: str
    tensors: Mapping[str, "torch.Tensor"]
    vocabulary: "torch.Tensor"  # target ids of the draft vocabulary


class DraftWeights:
    """The draft that one EagleDraftWorker serves. `version` is what was last read back from its memory, "" if it is unknown.

    `stage` runs on any thread, the rest on the scheduler's, between two steps.
    """

    def __init__(self, draft_worker: Any, target_model: Any, target: TargetShape) -> None:
        self._worker, self._target_model, self._target = draft_worker, target_model, target
        self._model = draft_worker.draft_runner.model
        self.version = self.vocab_id = ""

    def identify(self, directory: Path) -> None:
        """Find out whether what serves is the checkpoint in `directory`. Raises `Refused` when it is not, or none of ours."""
        staged = self.stage(directory, "")
        differing = self._differing(staged)
        if differing:
            raise Refused(f"{directory}: tensor {differing!r} differs from what SGLang loaded")
        self.version, self.vocab_id = staged.version, staged.vocab_id

    def stage(self, directory: Path, version: str) -> Staged:
        """Check the checkpoint and convert it. Raises `Refused` when it is damaged, is not `version`, or does not fit."""
        import torch

        checked = checkpoint.load(directory, self._target)
        if version and checked.version != version:
            raise Refused(f"{directory} holds version {checked.version[:12]}, not {version[:12]}; nothing was changed")
        views = self._views(checked, directory)
        tensors: dict[str, torch.Tensor] = {}
        for name, view in views.items():
            bits = torch.from_numpy(checked.tensors[name].copy())
            tensors[name] = bits.view(torch.bfloat16).to(dtype=view.dtype, device=view.device)
        ids = torch.from_numpy(checkpoint.target_ids(checked.tensors["d2t"]))
        hot = self._vocabulary()
        if hot is None or hot.shape != ids.shape:
            raise Refused(f"{directory}: its draft vocabulary has another size than that of the draft being served")
        ids = ids.to(dtype=hot.dtype, device=hot.device)
        return Staged(directory, checked.config, checked.version, checked.vocab_id, tensors, ids)

    def exchange(self, staged: Staged) -> None:
        """Write `staged` in place and read it back; on any difference restore what was there. Raises `Refused` then."""
        import torch

        with torch.inference_mode():
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # an overlapped step may still be reading
            views = self._places(staged.tensors, staged.config)
            hot = self._vocabulary()
            before = {name: view.clone() for name, view in views.items()}
            hot_before = hot.clone()
            try:
                for name, view in views.items():
                    view.copy_(staged.tensors[name])
                self._set_vocabulary(staged.vocabulary)
                differing = self._differing(staged)
                if differing:
                    raise Refused(f"{staged.path}: tensor {differing!r} differs after loading")
            except BaseException:
                for name, view in views.items():
                    view.copy_(before[name])
                self._set_vocabulary(hot_before)
                raise
        self.version, self.vocab_id = staged.version, staged.vocab_id

    def _differing(self, staged: Staged) -> str | None:
        """The name of the first tensor in memory that is not `staged`'s, bit by bit."""
        import torch

        for name, view in self._places(staged.tensors, staged.config).items():
            if not torch.equal(view, staged.tensors[name]):
                return name
        hots = (self._worker.hot_token_id, self._model.hot_token_id)
        return None if all(torch.equal(hot.to(staged.vocabulary), staged.vocabulary) for hot in hots) else "d2t"

    def _vocabulary(self) -> Any:
        return self._worker.hot_token_id

    def _set_vocabulary(self, ids: "torch.Tensor") -> None:
        for hot in (self._worker.hot_token_id, self._model.hot_token_id):
            hot.copy_(ids)

    def _views(self, checked: Checkpoint, directory: Path) -> "dict[str, torch.Tensor]":
        """Where the checkpoint's tensors lie; `Refused` when one has no place of its shape, or lies in the target's memory."""
        shapes = {name: shape for name, (_, shape) in checkpoint.expected_tensors(checked.config).items()}
        views = self._places([name for name in checked.tensors if name not in VOCABULARY], checked.config)
        shared = {parameter.untyped_storage().data_ptr() for parameter in self._target_model.parameters()}
        for name, view in views.items():
            if tuple(view.shape) != shapes[name] or not view.is_floating_point():
                raise Refused(
                    f"{directory}: tensor {name!r} is {shapes[name]}, the draft being served has {tuple(view.shape)}"
                )
            if view.untyped_storage().data_ptr() in shared:
                raise Refused(f"{directory}: tensor {name!r} lies in memory that the target uses; it is never written")
        return views

    def _places(self, names: Iterable[str], config: DraftConfig) -> "dict[str, torch.Tensor]":
        parameters: dict[str, Any] = dict(self._model.named_parameters())
        return {name: _place(parameters, name, config) for name in names}


def _place(parameters: Mapping[str, Any], name: str, config: DraftConfig) -> "torch.Tensor":
    """The part of SGLang's parameters that holds checkpoint tensor `name`."""
    query, key, wide = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate
    fused = {
        "q_proj": ("qkv_proj", 0, query),
        "k_proj": ("qkv_proj", query, key),
        "v_proj": ("qkv_proj", query + key, key),
        "gate_proj": ("gate_up_proj", 0, wide),
        "up_proj": ("gate_up_proj", wide, wide),
    }
    start, rows = 0, -1
    owner = name
    for part, (whole, first, count) in fused.items():
        if f".{part}." in name:
            owner, start, rows = name.replace(part, whole), first, count
    if name == "lm_head.weight":
        rows = config.draft_vocab  # padded behind
    owner = owner.replace("midlayer.", "layers.0.")
    found = parameters.get(owner, parameters.get(f"model.{owner}"))
    if found is None:
        raise Refused(f"SGLang's draft has no parameter {owner!r}")
    data: torch.Tensor = found.data
    return data if rows < 0 else data[start : start + rows]
