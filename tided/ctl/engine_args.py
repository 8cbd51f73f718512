"""The command line that starts a serving engine with tided in it, from the configuration: text only, nothing is started."""

import json
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tided.config import Config
from tided.model.errors import Refused

SHUTDOWN_S = 20
"""How long requests in flight may take to finish when the engine is asked to end."""


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """`environment` is what must be set beside what the shell has."""

    environment: dict[str, str]
    arguments: tuple[str, ...]

    def shell(self) -> str:
        """For a shell, one setting or option a line."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words.append(" ".join(shlex.quote(word) for word in self.arguments[:3]))
        rest = list(self.arguments[3:])
        while rest:
            option = [rest.pop(0)]
            while rest and not rest[0].startswith("--"):
                option.append(rest.pop(0))
            words.append(" ".join(shlex.quote(word) for word in option))
        return " \\\n  ".join(words)


def vllm(config: Config, draft: Path, python: str = "python") -> EngineCommand:
    """vLLM 0.32 with the target, engine and capture sections of `config`, booted on the checkpoint `draft`.

    The environment holds the Redis URL, with its password if it has one. Raises `Refused` when nothing could ever be drafted, and for
    a draft that vLLM cannot load.
    """
    from tided.draft.checkpoint import read_config

    drafted = read_config(draft)
    if drafted.draft_vocab == drafted.vocab:
        raise Refused(
            f"{draft}: vLLM loads no draft whose vocabulary is the target's: training.draft_vocab < {drafted.vocab}"
        )
    engine = config.engine
    environment = _environment(config)
    environment["TIDED_ENGINE_URL"] = f"http://{engine.host}:{engine.port}"
    if engine.device == "cpu":
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"OMP_NUM_THREADS": str(engine.threads)}
    # Each number of drafted tokens at some batch size: vLLM prepares those that it finds here, and tided chooses among them.
    last = max(engine.max_batch, engine.gamma_max + 1)
    sizes = [[1 + gamma, 1 + gamma, gamma] for gamma in range(engine.gamma_max)]
    speculation = {
        "method": "eagle3",
        "model": str(draft.absolute()),
        "num_speculative_tokens": engine.gamma_max,
        "num_speculative_tokens_per_batch_size": [*sizes, [engine.gamma_max + 1, last, engine.gamma_max]],
    }
    target = config.engine_target.path.absolute()
    options = {
        "--model": str(target),
        "--served-model-name": target.name,
        "--host": engine.host,
        "--port": str(engine.port),
        "--dtype": engine.dtype,
        "--max-num-seqs": str(engine.max_batch),
        "--max-model-len": str(engine.max_context),
        "--shutdown-timeout": str(SHUTDOWN_S),
        "--middleware": "tided.engine.vllm.optout.NoCapture",
        "--speculative-config": json.dumps(speculation),
    }
    words = (word for option in options.items() for word in option)
    return EngineCommand(environment, (python, "-m", "vllm.entrypoints.openai.api_server", *words))


def sglang(config: Config, draft: Path, python: str = "python") -> EngineCommand:
    """SGLang 0.5.23, as `vllm`. SGLang reads the numbers of drafted tokens that tided may choose from a file: it is written."""
    engine = config.engine
    environment = _environment(config)
    if engine.device == "cpu":
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(engine.threads)}
    steps = config.daemon.state_dir.absolute() / "boot" / f"sglang-steps-{engine.gamma_max}.json"
    steps.parent.mkdir(parents=True, exist_ok=True)
    steps.write_text(json.dumps({"1": {"candidate_steps": list(range(engine.gamma_max + 1))}}))
    target = config.engine_target.path.absolute()
    options = {
        "--model-path": str(target),
        "--served-model-name": target.name,
        "--host": engine.host,
        "--port": str(engine.port),
        "--device": engine.device.partition(":")[0],
        "--dtype": engine.dtype,
        "--max-running-requests": str(engine.max_batch),
        "--context-length": str(engine.max_context),
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(draft.absolute()),
        "--speculative-num-steps": str(engine.gamma_max),
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": str(engine.gamma_max + 1),
        "--speculative-adaptive-config": str(steps),
    }
    words = (word for option in options.items() for word in option)
    return EngineCommand(environment, (python, "-m", "sglang.launch_server", *words, "--speculative-adaptive"))


def _environment(config: Config) -> dict[str, str]:
    """What every plugin reads. Raises `Refused` when nothing could ever be drafted."""
    engine = config.engine
    if not engine.gamma_max:
        raise Refused("engine.gamma_max is 0: an engine that can never draft has no use for tided")
    return {
        "TIDED_ENGINE": engine.id,
        "TIDED_REDIS_URL": config.redis_url,
        "TIDED_LAST_HIDDEN": str(int(config.capture.last_hidden)),
        "TIDED_RING_SLOTS": str(config.capture.ring_slots),
        "TIDED_REPORT_INTERVAL_S": str(engine.report_interval_s),
    }


KINDS: dict[str, Callable[[Config, Path, str], EngineCommand]] = {"vllm": vllm, "sglang": sglang}


def command(kind: str, config: Config, draft: Path | None, python: str) -> EngineCommand:
    """For an engine of `kind`. Without a draft it boots on version 0, which follows from the target and is made when absent.

    Raises `Refused` for a kind that is not known, and for a target or draft that no engine could load.
    """
    if kind not in KINDS:
        raise Refused(f"no engine of kind {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind](config, draft or boot_draft(config), python)


def boot_draft(config: Config) -> Path:
    """Version 0 of the configured target below the state directory, as the daemon would make it too: equal bytes, equal version."""
    from tided.draft.init import init_draft
    from tided.draft.target import describe

    target = config.engine_target.path
    vocabulary = config.training_of(config.engine_target).draft_vocab
    path = config.daemon.state_dir / "boot" / f"{describe(target).digest[:16]}-{vocabulary}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            made = Path(temporary) / "draft"
            made.mkdir()
            init_draft(target, made, vocabulary)
            made.rename(path)
    return path
