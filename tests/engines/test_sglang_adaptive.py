"""Replay's EMA steps against SGLang's own: its AdaptiveStepSlot, out of the installed source, on the same accepted tokens."""

import ast
import json
import math
from typing import Any

import numpy as np

from tests.engines.test_sglang_signatures import package
from tided.replay.baselines import SteppedEma
from tided.replay.generate import generate
from tided.replay.trace import Trace


def original() -> tuple[Any, dict[str, dict[str, Any]]]:
    """SGLang's class and its default configuration. The module itself imports the whole engine."""
    source = (package() / "srt" / "speculative" / "adaptive_spec_params.py").read_text(encoding="utf-8")
    wanted = ("AdaptiveStepSlot", "DEFAULT_ADAPTIVE_CONFIG")
    nodes = [
        node
        for node in ast.parse(source).body
        if getattr(node, "name", "") in wanted or getattr(getattr(node, "target", None), "id", "") in wanted
    ]
    namespace: dict[str, Any] = {"math": math, "logger": None, "log_info_on_rank0": lambda *_: None}
    exec(compile(ast.Module(nodes, []), "adaptive", "exec"), namespace)
    return namespace["AdaptiveStepSlot"], json.loads(json.dumps(namespace["DEFAULT_ADAPTIVE_CONFIG"]))


def test_the_same_steps_as_sglang() -> None:
    slot_class, defaults = original()
    trace = generate("recurring", 5, 60.0)
    driver = SteppedEma.of(trace)
    slots: dict[int, Any] = {}
    for low, entry in defaults.items():
        steps = [step for step in entry["candidate_steps"] if step <= trace.header.gamma_max]
        slots[int(low)] = slot_class(steps[len(steps) // 2], {**entry, "candidate_steps": steps})
    seen = set[tuple[bool, int]]()
    for step in range(len(trace.at_s)):
        batch = int(trace.batch[step])
        slot = slots[max(low for low in slots if low <= batch)]
        gamma = driver.gammas[batch - 1]
        assert gamma == slot.current_steps
        seen.add((batch >= 8, gamma))
        slot.update(accepted(trace, step, gamma))
        driver.stepped(step, batch, gamma, 0.0)
    assert len(seen) > 2


def accepted(trace: Trace, step: int, gamma: int) -> list[int]:
    first = int(trace.batch[:step].sum())
    return np.minimum(trace.prefix[first : first + int(trace.batch[step])], gamma).tolist()
