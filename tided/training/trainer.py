"""The jobs train and score: from a draft and shards to a checkpoint and its evaluation.

The gate's held-out requests are only touched to score parent and child, by the same code on the same requests.
"""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tided.draft import checkpoint
from tided.draft.checkpoint import Checkpoint
from tided.draft.eagle3 import Eagle3, array_of
from tided.model.drafts import Evaluation
from tided.model.errors import Refused
from tided.model.jobs import CHECKPOINT_FILE, Candidate, JobResult, JobSpec, Progress
from tided.training.chains import chains_of
from tided.training.data import Run, read_runs, split_prompts
from tided.training.evaluate import evaluate
from tided.training.loop import Loop, Report
from tided.training.losses import Frozen, whole_head
from tided.training.options import OptimizerName, Precision, TrainOptions, options_for, usable
from tided.training.ranks import Ranks, device_of, gathered
from tided.training.report import write_report
from tided.training.sampling import evaluate_sampling
from tided.training.vocabulary import adapt

_STAGED = "draft"
_OF_THE_HOST = ("threads", "device", "checkpoint_interval_s")
_RESERVE = 3.0  # the child's evaluation costs up to this multiple of a cold parent's: its chains are longer


def train(spec: JobSpec, out_dir: Path, report: Report, ranks: Ranks | None = None) -> JobResult:
    """Run a train job: evaluate the parent, train, write the child to `out_dir`/draft, evaluate it, and report on both.

    While it trains, `out_dir` has a checkpoint from which the same job goes on; the job may be run by more or fewer processes then.
    Raises `Refused` for samples or checkpoints that do not fit, and when there is nothing to train on.
    """
    started = time.monotonic()
    ranks = ranks or Ranks()
    options = _usable(spec)
    if options.packs % ranks.count:
        raise Refused(f"options.packs: {options.packs} packs a step cannot be shared by {ranks.count} processes")
    if ranks.mesh is not None and options.optimizer is OptimizerName.MUON:
        raise Refused("options.optimizer: muon needs whole matrices; several processes train with adamw")
    torch.manual_seed(options.seed)
    target_dir = Path(spec.target_dir)
    parent = checkpoint.load(Path(spec.draft_dir))
    shape = (parent.config.hidden, parent.config.vocab, spec.target)
    fresh, held_out = read_runs(spec.shards, *shape), read_runs(spec.held_out, *shape)
    replay = read_runs(spec.replay, *shape)
    if not spec.held_out:
        fresh, held_out = split_prompts(fresh, options.held_out_share, b"held-out")
        replay, _ = split_prompts(replay, options.held_out_share, b"held-out")
    held_out = bounded(held_out, options.held_out_tokens)
    fresh, validation = split_prompts(fresh, options.validation_share, b"validation")
    replay, _ = split_prompts(replay, options.validation_share, b"validation")
    if not any(len(run.queries(0)) for run in fresh):
        raise Refused("the shards hold no generated token to train on")
    report(Progress(0.0, "scoring the incumbent"))
    frozen = Frozen.read(target_dir, parent, options.device, options.precision.dtype)
    incumbent = _score(parent, held_out, frozen, spec.gamma, options) if ranks.leads else None
    scored_s = ranks.told(time.monotonic() - started)
    job = _digest(spec, parent, [fresh, replay, validation])
    if options.adapt_vocabulary:
        parent = adapt(parent, [*fresh, *replay], target_dir)
        frozen = frozen.for_draft(target_dir, parent)
    draft = Eagle3.of(parent, device=options.device)
    resumable = out_dir / CHECKPOINT_FILE
    loop = Loop(draft, frozen, options, fresh, replay, validation, spec.gamma, report, resumable, job, ranks)
    loop.run(max(1.0, spec.budget_s - scored_s - _RESERVE * scored_s))
    tensors = {name: array_of(gathered(tensor)) for name, tensor in draft.state_dict().items()}
    result = JobResult(trained_tokens=loop.at.tokens, metrics=loop.metrics())
    if not ranks.leads:
        return result
    report(Progress(0.98, "scoring the candidate", accept_length=loop.at.best))
    staged = out_dir / _STAGED
    version = checkpoint.write(staged, draft.config, tensors)
    candidate = _score(checkpoint.load(staged), held_out, frozen, spec.gamma, options)
    result = replace(
        result,
        staged=str(staged),
        version=version,
        incumbent=incumbent,
        candidate=candidate,
        seconds=time.monotonic() - started,
    )
    write_report(out_dir, result, loop.losses)
    resumable.unlink(missing_ok=True)
    return result


def _usable(spec: JobSpec) -> TrainOptions:
    """The job's options on this machine."""
    options = options_for(spec.recipe, spec.options)
    device = device_of(options.device)
    torch.set_num_threads(options.threads)
    return replace(options, device=device, precision=usable(options.precision, device))


def _digest(spec: JobSpec, parent: Checkpoint, samples: Sequence[Sequence[Run]]) -> str:
    """What the course of a training follows from, so that it may go on where another attempt at it stopped."""
    options = {name: value for name, value in spec.options.items() if name not in _OF_THE_HOST}
    plain = [options, spec.recipe, spec.gamma, spec.budget_s, parent.version]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for runs in samples:
        digest.update(b"|")
        for run in runs:
            digest.update(run.group + len(run.ids).to_bytes(8, "little"))
    return digest.hexdigest()


def score(spec: JobSpec, report: Report) -> JobResult:
    """Run a score job: `candidate` is the evaluation of the job's draft on its held-out shards, `chains` what its groups must give,
    `scores` the evaluations of its candidates on the same requests.

    With a `mix` it is about what is served, not about this draft against another: then no prompt is taken before any other, and the
    answers to one that came often are not all taken.
    """
    started = time.monotonic()
    options = _usable(spec)
    draft = checkpoint.load(Path(spec.draft_dir))
    runs = read_runs(spec.held_out, draft.config.hidden, draft.config.vocab, spec.target)
    if spec.groups:
        runs = [run for run in runs if run.group.hex() in spec.groups]
    held_out = (drawn if spec.mix else bounded)(runs, options.held_out_tokens)
    report(Progress(0.0, "scoring"))
    frozen = Frozen.read(Path(spec.target_dir), draft, options.device, options.precision.dtype)
    evaluation = _score(draft, held_out, frozen, spec.gamma, options)
    if spec.mix:
        head = whole_head(Path(spec.target_dir), options.device, options.precision.dtype)
        source = Eagle3.of(draft, device=options.device)
        autocast = options.precision is Precision.BF16
        sampling = evaluate_sampling(source, held_out, frozen, head, spec.gamma, spec.mix, autocast)
        evaluation = replace(evaluation, sampling=sampling)
    chains = (
        chains_of(draft, _previous(spec), held_out, frozen, Path(spec.target_dir), spec.gamma) if spec.groups else ()
    )
    scores: list[Evaluation] = []
    for number, other in enumerate(spec.candidates, 1):
        report(Progress(number / (1 + len(spec.candidates)), f"scoring {other.version[:12]}"))
        source = _read(other)
        shared = frozen if source.vocab_id == draft.vocab_id else frozen.for_draft(Path(spec.target_dir), source)
        scores.append(_score(source, held_out, shared, spec.gamma, options))
    return JobResult(
        version=draft.version,
        candidate=evaluation,
        seconds=time.monotonic() - started,
        chains=tuple(chains),
        scores=tuple(scores),
    )


def _read(candidate: Candidate) -> Checkpoint:
    source = checkpoint.load(Path(candidate.path))
    if source.version != candidate.version:
        raise Refused(f"{candidate.path}: is draft {source.version[:12]}, not {candidate.version[:12]}")
    return source


def _previous(spec: JobSpec) -> Checkpoint | None:
    return checkpoint.load(Path(spec.previous_dir)) if spec.previous_dir else None


def _score(source: Checkpoint, runs: Sequence[Run], frozen: Frozen, gamma: int, options: TrainOptions) -> Evaluation:
    draft = Eagle3.of(source, device=options.device)
    return evaluate(draft, runs, frozen, gamma, options.precision is Precision.BF16)


def bounded(runs: Sequence[Run], tokens: int) -> list[Run]:
    """Whole prompts up to `tokens` in all, the same ones for the same runs: in the order of their groups, which are hashes."""
    return _up_to(sorted(runs, key=lambda run: (run.group, run.first_position)), tokens)


def drawn(runs: Sequence[Run], tokens: int) -> list[Run]:
    """Runs up to `tokens` in all, drawn from all of them alike; the same ones for the same runs."""
    return _up_to(random.Random(0).sample(runs, len(runs)), tokens)


def _up_to(runs: Sequence[Run], tokens: int) -> list[Run]:
    chosen: list[Run] = []
    for run in runs:
        if tokens <= 0:
            break
        chosen.append(run)
        tokens -= len(run.queries(1))
    return chosen
