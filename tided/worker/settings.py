"""What a worker is told: by the configuration file, or by flags where a host has none."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tided.machine.placement import Capacity
from tided.model.jobs import JobKind

NICE = 5
TRAINER = (sys.executable, "-m", "tided.training")
RANKS = ("-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node")
"""Between the interpreter and the module, with the number of processes after it: the trainer by torchrun."""

# What a trainer inherits. Everything else, tokens and passwords above all, stays with the agent.
_INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """`cpus`: cores for the agent and its trainers (none: all). `nice`: of the trainers. `trainer`: a Python program, before the kind.

    `devices`: a training has a process for each; `memory_bytes`: of each, 0 if not known. `jobs`: end after so many, `idle_s`: when
    there has been none for so long; 0: never.
    `storage_url` empty: this host sees tided's directories under the same path. Else `targets` are where the targets are on this host.
    """

    redis_url: str
    name: str
    kinds: tuple[JobKind, ...]
    work_dir: Path
    threads: int = 1
    device: str = "cpu"
    devices: int = 1
    memory_bytes: int = 0
    cpus: tuple[int, ...] = ()
    nice: int = NICE
    drain_s: float = 20.0
    jobs: int = 0
    idle_s: float = 0.0
    lease_s: float = 15.0
    keep_s: float = 7 * 86_400.0
    heartbeat_ttl_s: float = 10.0
    silence_s: float = 120.0  # a trainer that says nothing for so long hangs
    trainer: tuple[str, ...] = TRAINER
    storage_url: str = field(default="", repr=False)
    storage_options: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    cache_bytes: int = 8 << 30
    targets: tuple[Path, ...] = ()

    def capacity(self, rate: float) -> Capacity:
        """What the worker has. `rate`: of its newest training, in tokens/s."""
        kind = self.device.partition(":")[0]
        memory_bytes = self.memory_bytes or (_host_memory_bytes() // self.devices if kind == "cpu" else 0)
        return Capacity(kind, self.devices, memory_bytes, rate)

    def command(self, kind: JobKind) -> list[str]:
        """The trainer's program for a kind of job: by torchrun for a training on several devices."""
        if kind is not JobKind.TRAIN or self.devices == 1:
            return list(self.trainer)
        interpreter, *rest = self.trainer
        return [interpreter, *RANKS, str(self.devices), *rest]


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trainer_environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The trainer's whole environment."""
    kept = {name: environ[name] for name in _INHERITED if name in environ}
    counts = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    return kept | counts | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
