"""Start SGLang's server with the stand-in CPU kernels beside this file. Its own processes run this file's head again.

torchvision without its compiled part needs two operators declared before it is imported, and SGLang's intel_amx attention, the only
CPU one that speculates, is kept on processors without AMX: its kernels are the stand-ins.
"""

import importlib
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any


def prepare() -> None:
    """What each of SGLang's processes needs before it imports anything of SGLang."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    torch: Any = importlib.import_module("torch")
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    hooks: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    target = "sglang.srt.arg_groups.overrides._attention_backend_platform_fallbacks"
    hooks.HookRegistry.register(target, keep_intel_amx, hooks.HookType.AROUND)


def keep_intel_amx(original: Callable[[Any], dict[str, Any]], view: Any) -> dict[str, Any]:
    """No fallback from intel_amx."""
    return {} if view.attention_backend == "intel_amx" else original(view)


prepare()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
