"""The pinned engine environments of engines/build.py, and how to run this checkout's tided in them."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class EngineEnvironment:
    """Run `python` with `environment`."""

    python: Path
    environment: dict[str, str]


@cache
def engine_environment(name: str) -> EngineEnvironment:
    """Build environment `name` if it is absent (minutes, once for its pins)."""
    spec = spec_from_file_location("engines_build", CHECKOUT / "engines" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    built = module.build(name)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TIDED_", "VLLM_", "PYTHON"))}
    return EngineEnvironment(built.python, {**kept, "PYTHONPATH": built.pythonpath})
