"""An engine's environment: tided with redis and msgpack, and nothing else. All that runs inside engines imports there."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = [re.match(r"[\w.-]+", line)[0] for line in PROJECT["dependencies"]]  # pyright: ignore[reportOptionalSubscript]
PLUGINS = [
    target.partition(":")[0]
    for group, entries in PROJECT.get("entry-points", {}).items()
    if not group.startswith("tided.")  # those are tided's own: they run in the daemon
    for target in entries.values()
]


@pytest.fixture(scope="module")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has what pyproject.toml calls the base, as installed here, and this checkout."""
    root = tmp_path_factory.mktemp("base")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(root)
    site = next(root.glob("lib/python*/site-packages"))
    for name in BASE:
        distribution = importlib.metadata.distribution(name)
        tops = {Path(str(file)).parts[0] for file in distribution.files or [] if not str(file).startswith("..")}
        for top in tops:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site / "tided").symlink_to(CHECKOUT / "tided")
    return str(root / "bin" / "python")


def run(python: str, code: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TIDED"))}
    done = subprocess.run(
        [python, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_base_is_what_the_documentation_says() -> None:
    assert sorted(BASE) == ["msgpack", "redis"]


@pytest.mark.parametrize("module", ["tided.client", *PLUGINS])
def test_it_imports(base_python: str, module: str) -> None:
    code = f"import importlib, json, sys; importlib.import_module({module!r}); print(json.dumps(list(sys.modules)))"
    loaded = {name.partition(".")[0] for name in json.loads(run(base_python, code))}
    assert "tided" in loaded
    assert not loaded & {"torch", "numpy", "vllm", "sglang", "pydantic", "transformers"}


@pytest.mark.parametrize("absent", ["torch", "numpy", "vllm", "sglang", "pydantic", "anyio", "safetensors"])
def test_nothing_else_is_there(base_python: str, absent: str) -> None:
    code = f"import importlib.util as u; assert u.find_spec({absent!r}) is None"
    run(base_python, code)


def test_a_producer_taps_without_numpy(base_python: str) -> None:
    code = """
from tided.client import Producer, Stack, TargetInfo
target = TargetInfo("ab" * 32, "tiny", 8, 4, 100, (2, 4, 5))
producer = Producer("redis://127.0.0.1:1", Stack(engine="mine", target=target, dtype="float32", max_batch=1))
producer._tap.set_capture(True, 1 << 20)
producer.begin("r", [1])
producer.record("r", 0, [1], bytes(48))
assert (producer.totals.tapped, producer.errors) == (1, 0)
"""
    run(base_python, code)


def test_the_interpreter_is_not_this_one(base_python: str) -> None:
    assert run(base_python, "import sys; print(sys.prefix)").strip() != sys.prefix
