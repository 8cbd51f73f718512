"""Drafts for benches: a training job as a worker runs it, and one draft that knows the code domain, trained once."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.samples import shards
from tided.config import Config
from tided.draft import checkpoint
from tided.draft.init import init_draft
from tided.draft.target import describe
from tided.model.codec import from_plain, to_plain
from tided.model.drafts import DraftOrigin, Evaluation
from tided.model.jobs import Candidate, JobKind, JobResult, JobSpec
from tided.store.drafts import DraftStore

WORK = Path("build/bench/trainer")
TRAIN_REQUESTS, HELD_OUT_REQUESTS = 112, 48
BUDGET_S = 60.0


@dataclass(frozen=True)
class Samples:
    """Paths of shards. What is measured by asking for prompts of split "measure" is in `held_out` only. `replay`: of earlier domains."""

    train: list[str]
    held_out: list[str]
    replay: list[str] = field(default_factory=list[str])


def code_samples(model_dir: Path) -> Samples:
    """Answers of the real model to prompts of the code domain with their states; made once (minutes)."""
    return Samples(
        shards(model_dir, "code", "train", TRAIN_REQUESTS, WORK),
        shards(model_dir, "code", "measure", HELD_OUT_REQUESTS, WORK),
    )


def run_job(
    model_dir: Path, draft: Path, samples: Samples, out: Path, budget_s: float, seed: int = 0
) -> tuple[JobResult, float]:
    """A training job in a process of its own; its result, and its seconds from start to end."""
    spec = JobSpec(
        kind=JobKind.TRAIN,
        engine="bench",
        target="",
        target_dir=str(model_dir),
        draft_dir=str(draft),
        shards=tuple(samples.train),
        replay=tuple(samples.replay),
        held_out=tuple(samples.held_out),
        budget_s=budget_s,
        options={"adapt_vocabulary": True, "seed": seed},
    )
    began = time.perf_counter()
    return _run(spec, out), time.perf_counter() - began


def score(model_dir: Path, drafts: Sequence[Path], held_out: Sequence[str], out: Path) -> list[Evaluation]:
    """Evaluations of all drafts on the same requests, in the drafts' order: a score job, as a worker runs it for the pool."""
    first, *others = drafts
    spec = JobSpec(
        kind=JobKind.SCORE,
        engine="bench",
        target="",
        target_dir=str(model_dir),
        draft_dir=str(first),
        held_out=tuple(held_out),
        candidates=tuple(Candidate(checkpoint.load(other).version, str(other)) for other in others),
    )
    result = _run(spec, out)
    assert result.candidate is not None
    return [result.candidate, *result.scores]


def _run(spec: JobSpec, out: Path) -> JobResult:
    out.mkdir(parents=True, exist_ok=True)
    spec_file = out / "spec.json"
    spec_file.write_text(json.dumps(to_plain(spec)))
    command = [sys.executable, "-m", "tided.training", spec.kind.value, str(spec_file), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return from_plain(JobResult, last["result"])


def first_draft(model_dir: Path) -> Path:
    """Version 0 of the model, made once."""
    directory = WORK / "draft"
    if not (directory / "config.json").exists():
        init_draft(model_dir, directory)
    return directory


def code_draft(model_dir: Path) -> Path:
    """A draft that was trained on the code domain for BUDGET_S; trained once."""
    directory = WORK / "code-draft"
    if not directory.exists():
        print(f"training a draft for {BUDGET_S:.0f} s, once", file=sys.stderr, flush=True)
        result, _ = run_job(model_dir, first_draft(model_dir), code_samples(model_dir), WORK / "code-job", BUDGET_S)
        copied = shutil.copytree(result.staged, WORK / "code-draft.partial", dirs_exist_ok=True)
        Path(copied).rename(directory)
    return directory


def store_code_draft(config: Config, model_dir: Path) -> None:
    """Puts it into tided's store before tided starts: an engine that serves what tided does not know is left alone."""
    now_ms = round(time.time() * 1000)
    store, draft, target = DraftStore(config.drafts_dir), code_draft(model_dir), describe(model_dir)
    store.add(draft, lineage="code", parent="", origin=DraftOrigin.IMPORTED, target=target, now_ms=now_ms)
