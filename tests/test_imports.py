"""What each program drags in: tided and tidectl no torch, the tap's side nothing beyond the base dependencies; layers hold."""

import ast
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import tided.model
import tided.wire

HEAVY = ("torch", "transformers", "vllm", "sglang")
TORCH_FREE = ("tided.daemon", "tided.ctl.main", "tided.ctl.render", "tided.services.collector", "tided.worker.agent")
BASE = ("redis", "msgpack")
IN_ENGINES = (
    "tided.engine.tap",
    "tided.engine.agent",
    "tided.engine.publisher",
    "tided.engine.link",
    *(
        f"tided.{part.__name__.rpartition('.')[2]}.{module.name}"
        for part in (tided.model, tided.wire)
        for module in pkgutil.iter_modules(part.__path__)
    ),
)


def imported_by(python: str, modules: tuple[str, ...]) -> set[str]:
    """Top-level packages that came from files into a fresh interpreter which imported `modules`."""
    code = (
        f"import importlib, json, sys; [importlib.import_module(m) for m in {modules!r}];"
        " print(json.dumps([name for name, module in sys.modules.items() if getattr(module, '__file__', None)]))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch(module: str) -> None:
    packages = imported_by(sys.executable, (module,))
    assert "tided" in packages
    assert not packages.intersection(HEAVY)


def test_tidectl_starts_light() -> None:
    packages = imported_by(sys.executable, ("tided.ctl.main", "tided.api.client", "tided.ctl.render"))
    assert not packages.intersection({"starlette", "uvicorn", "httpx", "redis", "numpy", "prometheus_client", "anyio"})


def test_the_base_installation_is_enough_inside_engines(tmp_path: Path) -> None:
    """In an environment that has the base dependencies only, as in an engine's own."""
    builder = venv.EnvBuilder(with_pip=False, symlinks=True)
    builder.create(tmp_path)
    python = str(tmp_path / "bin" / "python")
    site = next(tmp_path.glob("lib/python*/site-packages"))
    for package in BASE:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        (site / package).symlink_to(Path(spec.origin).parent)
    packages = imported_by(python, IN_ENGINES)
    assert {name for name in packages if outside(name)} - {"tided", *BASE} == set()


@pytest.mark.parametrize("package", ["training", "draft", "worker"])
def test_training_names_no_vendor(package: str) -> None:
    """It runs on whatever device torch has: `torch.accelerator` and `torch.get_device_module`, never one vendor's calls."""
    found = [
        f"{path.name}: {name}"
        for path in sorted((Path(tided.model.__file__).parents[1] / package).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for name in vendor_names(node)
    ]
    assert not found


def vendor_names(node: ast.AST) -> set[str]:
    match node:
        case ast.Attribute(attr=name) | ast.alias(name=name) | ast.Constant(value=str(name)):
            # Docstrings, help texts and names of environment variables are prose; a device's name is one word.
            return {"cuda", "nccl", "hip", "rocm", "mps", "xpu"}.intersection(name.split(".") if name.islower() else ())
        case _:
            return set()


def outside(package: str) -> bool:
    return package not in sys.stdlib_module_names and not package.startswith(("_", "sitecustomize"))


def test_layers_hold() -> None:
    """The contracts of .importlinter, as `make lint` checks them."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
