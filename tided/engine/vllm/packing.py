"""Linears of the draft on a processor: packed as vLLM packs them, and yet replaceable.

When a model is loaded vLLM packs the weights of its linears for the processor, keeps the packed copy in a closure, `cpu_linear`, and drops
the plain one. Left plain, the draft's linears take three times as long for a token. So while the draft loads, its linears are packed
as well but keep their plain weights, and after these were replaced `repack` packs them anew, in place: a graph that was compiled around the
closure reads its tensors when it runs, among them the one that holds the address of oneDNN's copy.
"""

import functools
import inspect
from importlib import import_module
from typing import Any

import torch

_MARK = "_tided"
_ADDRESS = "handler_tensor"


def patch() -> None:
    """While vLLM loads a draft, its linears keep their plain weights beside the packed ones. Idempotent."""
    utils = import_module("vllm.model_executor.layers.utils")
    proposer = import_module("vllm.v1.spec_decode.llm_base_proposer").SpecDecodeBaseProposer
    if hasattr(proposer.load_model, _MARK):
        return
    load_model, dispatch = proposer.load_model, utils.dispatch_cpu_unquantized_gemm
    loading = 0

    @functools.wraps(load_model)
    def load_replaceable(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal loading
        loading += 1
        try:
            return load_model(self, *args, **kwargs)
        finally:
            loading -= 1

    @functools.wraps(dispatch)
    def dispatch_replaceable(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not loading or layer.weight.ndim != 2:
            return dispatch(layer, *args, **kwargs)
        setattr(layer, _MARK, True)
        return dispatch(layer, remove_weight=False)

    setattr(load_replaceable, _MARK, True)
    proposer.load_model = load_replaceable
    vars(utils)["dispatch_cpu_unquantized_gemm"] = dispatch_replaceable


def repack(draft: torch.nn.Module) -> None:
    """Between two steps: the draft's packed copies from its present weights. Nothing for a draft that is not packed."""
    packed: list[Any] = [layer for layer in draft.modules() if hasattr(layer, _MARK)]
    if not packed:
        return
    dispatch = import_module("vllm.model_executor.layers.utils").dispatch_cpu_unquantized_gemm
    for layer in packed:
        in_use = layer.cpu_linear
        dispatch(layer, remove_weight=False)
        exchange(in_use, layer.cpu_linear)
        layer.cpu_linear = in_use


def exchange(ours: Any, theirs: Any) -> None:
    """What two closures of one kind hold, exchanged in place: tensors are copied, addresses of oneDNN's copies change their owners."""
    new = inspect.getclosurevars(theirs).nonlocals
    for name, held in inspect.getclosurevars(ours).nonlocals.items():
        if isinstance(held, torch.Tensor):
            held.data.copy_(new[name].data)
        elif hasattr(held, _ADDRESS):
            mine, other = getattr(held, _ADDRESS), getattr(new[name], _ADDRESS)
            before = mine.clone()
            mine.copy_(other)
            other.copy_(before)
