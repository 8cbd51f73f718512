"""A training's checkpoint: where it stands, its weights in float32, its best ones so far, the optimizer's state; one safetensors file.

The file is renamed into place, so a process that is killed leaves the one before. It says which job it belongs to, and is taken up
by no other. It is not the draft's checkpoint: no engine loads it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tided.draft.tensors import Array, read_header, read_tensor_entry, write_file
from tided.model.codec import from_plain, to_plain
from tided.model.errors import Refused

_SCHEMA = "1"


@dataclass(slots=True)
class Standing:
    """How far a training has come. Acceptance lengths are those of the validation split."""

    steps: int = 0
    tokens: int = 0  # trained, counted once a pass
    train_s: float = 0.0  # of the steps alone
    elapsed_s: float = 0.0
    start: float = 0.0  # acceptance length before training
    best: float = 0.0
    stale: int = 0  # validations since the best


def save(path: Path, job: str, standing: Standing, tensors: Mapping[str, Array]) -> None:
    """Write the checkpoint of `job`, instead of an earlier one. Raises `Unavailable` when the disk does not take it."""
    write_file(path, tensors, {"schema": _SCHEMA, "job": job, "standing": json.dumps(to_plain(standing))})


def load(path: Path, job: str) -> tuple[Standing, dict[str, Array]] | None:
    """What `save` wrote, if there is anything. Raises `Refused` for another job's, or a file that is not sound."""
    if not path.exists():
        return None
    header = read_header(path)
    if header.metadata.get("schema") != _SCHEMA or header.metadata.get("job") != job:
        raise Refused(
            f"{path}: the checkpoint of another training; give this one another directory, or delete the file"
        )
    try:
        standing = from_plain(Standing, json.loads(header.metadata.get("standing", "")), str(path))
    except (ValueError, RecursionError) as exc:
        raise Refused(f"{path}: does not say where the training stands") from exc
    tensors = {name: read_tensor_entry(path, entry) for name, entry in header.entries.items()}
    for name, array in tensors.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise Refused(f"{path}: tensor {name[:80]!r} holds NaN or infinite values")
    return standing, tensors
