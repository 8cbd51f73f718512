"""Real vLLM and SGLang servers for the benches: the command line that `tidectl engine-args` prints, as services of a LocalStack."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.engines.environment import CHECKOUT, engine_environment
from tided.config import Config
from tided.ctl.engine_args import command
from tided.local import Service, split_cores

BOOT_S = 900.0
REST_S = 1.2
"""vLLM's workers spin for a second after their last step: the next server's turn begins after that."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For every arm: where its pages lie makes the same server up to a tenth faster or slower from boot to boot, less so in huge pages."""
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
STANDINS = CHECKOUT / "tests" / "standin" / "serve.py"
"""Starts SGLang with our stand-ins for its CPU kernels: real scheduler, worker and HTTP server, a speed that means nothing."""
SGLANG_OPTIONS = {
    "--attention-backend": "intel_amx",
    "--cuda-graph-backend-decode": "disabled",
    "--max-total-tokens": "16384",
    "--skip-server-warmup": "",
    "--sleep-on-idle": "",
}


@dataclass(frozen=True)
class Engine:
    """How a server differs from the configuration's command line.

    `options` replace options of it; "" is an option without a value, None takes one away. `tided` False: as if tided did not exist.
    """

    name: str
    kind: str = "vllm"
    draft: Path | None = None
    options: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    tided: bool = True


def service(config: Config, engine: Engine, port: int) -> Service:
    """The service, on an engine's cores; it answers at http://127.0.0.1:PORT once it is ready."""
    built = engine_environment(engine.kind)
    asked = command(engine.kind, config, engine.draft, str(built.python))
    url = f"http://127.0.0.1:{port}"
    more = SGLANG_OPTIONS if engine.kind == "sglang" else {}
    words = replaced(asked.arguments, {"--host": "127.0.0.1", "--port": str(port), **more, **engine.options})
    if engine.kind == "sglang":
        words = [words[0], str(STANDINS), *words[3:]]
    ours = {**asked.environment, "TIDED_ENGINE": engine.name, "TIDED_ENGINE_URL": url, **engine.environment}
    if not engine.tided:
        ours = {key: value for key, value in ours.items() if not key.startswith("TIDED_")}
    settings = {**ours, **QUIET, **HUGE_PAGES, "PYTHONPATH": built.environment["PYTHONPATH"]}
    return Service(
        f"server-{engine.name}",
        "bench.engines.launch",
        (url, json.dumps(settings), *words),
        split_cores(config.engine.threads)[0],
        config.engine.threads,
        ready_s=BOOT_S,
    )


def replaced(words: Sequence[str], options: Mapping[str, str | None]) -> list[str]:
    """A command line with some of its `--options` set, added or taken away."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in options
        if not skipping:
            kept.append(word)
    for name, value in options.items():
        if value is not None:
            kept += [name, value] if value else [name]
    return kept
