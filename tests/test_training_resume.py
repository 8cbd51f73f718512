"""Training that is killed goes on from its checkpoint, in one process or in several, with the loss curve of one that ran through."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shards import train_spec
from tests.support import eventually
from tided.draft import checkpoint
from tided.draft.tensors import read_header
from tided.model.codec import from_plain, to_plain
from tided.model.errors import Refused
from tided.model.jobs import CHECKPOINT_FILE, JobResult, JobSpec
from tided.training.report import JSON_FILE
from tided.training.trainer import train

OPTIONS = {
    "packs": 2,
    "batch_tokens": 16,
    "passes": 12,
    "precision": "fp32",
    "validation_interval_s": 1e6,
    "validation_share": 0.2,
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return replace(train_spec(tmp_path_factory.mktemp("job"), **OPTIONS), budget_s=1e6)


@pytest.fixture(scope="module")
def unbroken(spec: JobSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a training that ran through in this process."""
    out = tmp_path_factory.mktemp("unbroken")
    train(spec, out, lambda _: None)
    return out


@contextmanager
def started(spec: JobSpec, out: Path, processes: int = 0) -> Generator[subprocess.Popen[bytes]]:
    """The job as a command that writes a checkpoint after every step; by torchrun for `processes`, started again once."""
    out.mkdir(exist_ok=True)
    (out / "spec.json").write_text(
        json.dumps(to_plain(replace(spec, options=spec.options | {"checkpoint_interval_s": 0})))
    )
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts", "1"]
    command = [sys.executable, *(several if processes else [])]
    command += ["-m", "tided.training", "train", str(out / "spec.json"), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        yield process
        process.kill()


def ended(process: subprocess.Popen[bytes]) -> JobResult:
    output, errors = process.communicate(timeout=180)
    if process.returncode:
        pytest.fail(f"exit status {process.returncode}: {output[-500:]!r}\n{errors.decode()[-8000:]}")
    return from_plain(JobResult, json.loads(output.splitlines()[-1])["result"])


def steps_in(path: Path) -> int:
    """How many steps a checkpoint has; 0 while there is none."""
    return json.loads(read_header(path).metadata["standing"])["steps"] if path.exists() else 0


def curve(out: Path) -> list[float]:
    report: dict[str, Any] = json.loads((out / JSON_FILE).read_text())
    return report["losses"]


def same_training(out: Path, unbroken: Path) -> None:
    losses = curve(unbroken)
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5]), "a training that learns nothing shows nothing"
    np.testing.assert_allclose(curve(out), losses, rtol=2e-3)
    mine, theirs = (checkpoint.load(path / "draft").tensors for path in (out, unbroken))
    for name, bits in mine.items():
        if bits.dtype == np.uint16:
            a, b = ((array.astype(np.uint32) << 16).view(np.float32) for array in (bits, theirs[name]))
            np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3, err_msg=name)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_killed_training_goes_on(spec: JobSpec, unbroken: Path, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_FILE
    with started(spec, tmp_path) as process:
        await eventually(lambda: steps_in(path) >= 5, timeout_s=90)
        process.send_signal(signal.SIGKILL)
    left = steps_in(path)
    assert 5 <= left < len(curve(unbroken))
    result = train(spec, tmp_path, lambda _: None)
    assert result.metrics["resumed_at"] == left
    assert result.metrics["steps"] == len(curve(unbroken))
    same_training(tmp_path, unbroken)
    assert not path.exists()


async def test_two_processes_train_as_one_does_and_go_on_when_one_is_killed(
    spec: JobSpec, unbroken: Path, tmp_path: Path
) -> None:
    path = tmp_path / CHECKPOINT_FILE
    with started(spec, tmp_path, processes=2) as process:
        await eventually(lambda: steps_in(path) >= 5, timeout_s=120)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        result = ended(process)
    assert 5 <= result.metrics["resumed_at"] < result.metrics["steps"]
    same_training(tmp_path, unbroken)


def test_a_checkpoint_is_its_jobs(spec: JobSpec, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: Any) -> None:
        if (tmp_path / CHECKPOINT_FILE).exists():
            raise Stopped

    often = replace(spec, options=spec.options | {"checkpoint_interval_s": 0.0})
    with pytest.raises(Stopped):
        train(often, tmp_path, stop)
    with pytest.raises(Refused, match="another training"):
        train(replace(spec, options=spec.options | {"learning_rate": 1e-4}), tmp_path, lambda _: None)
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Refused, match="truncated"):
        train(spec, tmp_path, lambda _: None)


def test_processes_share_a_step_evenly(spec: JobSpec, tmp_path: Path) -> None:
    from tided.training.ranks import Ranks

    with pytest.raises(Refused, match="2 packs a step cannot be shared by 3 processes"):
        train(spec, tmp_path, lambda _: None, Ranks(0, 3))
