"""A trace: what an engine's traffic asked of it, step by step, so that any policy can be run over it afterwards.

One file, `NAME.trace.safetensors`; S steps, R request-steps (the sum of `batch`):

    at_s      F64 [S]  when the step began, seconds since the trace's start, ascending
    batch     I32 [S]  requests in the step
    residual  F32 [S]  seconds that the step took, as a multiple of what the profile says for its batch and gamma
    prefix    U8  [R]  for each request of each step in turn: how many drafted tokens were right, of gamma_max

Metadata: `schema` "1", and `trace`, a JSON object with the fields of `Header`. A prefix at gamma_max says what every smaller gamma would
have had accepted: min(prefix, gamma), exactly. So a trace is recorded while gamma_max tokens are drafted in every step, or by
scoring tapped states at gamma_max. It holds counts and times only: no token and no text.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tided.model.codec import from_plain, to_plain
from tided.model.engines import LatencyProfile
from tided.model.errors import Refused

SUFFIX = ".trace.safetensors"
SCHEMA = "1"
BIN_S = 1.0
"""Traffic is taken to be of one kind within a bin of this length."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a trace says about itself. `profile`: the engine's true T(n) and D(b). `told`: the profile that its policy was told, where
    that is another. `switch_s`: seconds that a change of the schedule costs the engine."""

    name: str
    about: str
    profile: LatencyProfile
    gamma_max: int
    max_batch: int
    duration_s: float
    switch_s: float = 0.002
    told: LatencyProfile | None = None
    regime: str = "moving"  # or "stationary", "adversarial": which goal holds (docs/benchmarks.md)


@dataclass(frozen=True)
class Trace:
    """See the module. Arrays are read-only in spirit: a trace is shared by all runs over it."""

    header: Header
    at_s: NDArray[np.float64]
    batch: NDArray[np.int32]
    residual: NDArray[np.float32]
    prefix: NDArray[np.uint8] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises `Refused` for arrays that do not fit together."""
        header, steps = self.header, len(self.at_s)
        if not (len(self.batch) == len(self.residual) == steps) or steps == 0:
            raise Refused("trace: at_s, batch and residual must have one entry for each step, and at least one")
        if np.any(np.diff(self.at_s) < 0) or self.at_s[0] < 0 or self.at_s[-1] >= header.duration_s:
            raise Refused("trace: at_s must ascend from 0 to below duration_s")
        if self.batch.min() < 1 or self.batch.max() > header.max_batch:
            raise Refused(f"trace: batch sizes must be from 1 to max_batch ({header.max_batch})")
        if len(self.prefix) != int(self.batch.sum()) or self.prefix.max() > header.gamma_max:
            raise Refused("trace: prefix must have one entry for each request of each step, at most gamma_max")
        if not np.all(np.isfinite(self.residual)) or self.residual.min() <= 0:
            raise Refused("trace: residuals must be positive")

    @cached_property
    def histograms(self) -> NDArray[np.int64]:
        """[S, gamma_max + 1]: of each step, the requests with 0, 1, ... gamma_max right tokens."""
        width = self.header.gamma_max + 1
        step = np.repeat(np.arange(len(self.batch)), self.batch)
        flat = np.bincount(step * width + self.prefix, minlength=len(self.batch) * width)
        return flat.reshape(len(self.batch), width)

    @cached_property
    def emitted(self) -> NDArray[np.int64]:
        """[S, gamma_max + 1]: tokens that each step emits at 0, 1, ... gamma_max drafted tokens, bonus tokens included."""
        reached = self.histograms[:, ::-1].cumsum(axis=1)[:, ::-1]  # requests with at least k right tokens
        return reached.cumsum(axis=1)

    @cached_property
    def bins(self) -> list[range]:
        """The steps of each bin of `BIN_S` seconds; empty where nothing ran."""
        edges = np.arange(int(np.ceil(self.header.duration_s / BIN_S)) + 1) * BIN_S
        cuts = np.searchsorted(self.at_s, edges).tolist()
        return [range(a, b) for a, b in pairwise(cuts)]


def save(trace: Trace, path: Path) -> None:
    """Write `trace` to `path`."""
    tensors: dict[str, Any] = {
        "at_s": trace.at_s.astype(np.float64),
        "batch": trace.batch.astype(np.int32),
        "residual": trace.residual.astype(np.float32),
        "prefix": trace.prefix.astype(np.uint8),
    }
    save_file(tensors, path, {"schema": SCHEMA, "trace": json.dumps(to_plain(trace.header), allow_nan=False)})


def load(path: Path) -> Trace:
    """Read a trace. Raises `Refused` for a file that is none, naming what is wrong."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as exc:
        raise Refused(f"{path}: no trace can be read: {exc}") from exc
    if metadata.get("schema") != SCHEMA or "trace" not in metadata:
        raise Refused(f"{path}: no trace of schema {SCHEMA}")
    missing = {"at_s", "batch", "residual", "prefix"} - tensors.keys()
    if missing:
        raise Refused(f"{path}: {', '.join(sorted(missing))} missing")
    try:
        header = from_plain(Header, json.loads(metadata["trace"]))
    except ValueError as exc:
        raise Refused(f"{path}: its description is no JSON: {exc}") from exc
    return Trace(header, tensors["at_s"], tensors["batch"], tensors["residual"], tensors["prefix"])
