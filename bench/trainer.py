"""The trainer on one core: trained tokens a second, that it computes no padding, and acceptance after a minute.

`python -m bench.trainer` writes build/bench/trainer.json. Samples are greedy answers of the real model, made once.
"""

import itertools
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import cold, model, report
from bench.drafts import BUDGET_S, WORK, Samples, code_samples, first_draft, run_job
from bench.report import Claim, at_least, at_most
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3
from tided.model.jobs import Recipe
from tided.training.data import Run, equal_pieces, pack, read_runs
from tided.training.evaluate import evaluate
from tided.training.loop import Objective
from tided.training.losses import CandidateSampler, Frozen
from tided.training.optimizer import Optimizer
from tided.training.options import options_for
from tided.training.vocabulary import adapt

STEPS, WARM_UP, REPEATS = 30, 10, 3
FEW = (2000, 4000)
"""Tokens of samples that minutes of traffic give."""
GAMMA = 4


def main() -> None:
    """Measure and publish."""
    model_dir = model.make(model.DEFAULT)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    samples = code_samples(model_dir)
    claims = [*_speed(model_dir, samples.train), *_few(model_dir, samples), *_job(model_dir, samples)]
    report.publish("trainer", claims)


def _speed(model_dir: Path, fresh: Sequence[str]) -> list[Claim]:
    """Steps as the job runs them, and the rows that its matrices saw."""
    source = checkpoint.load(first_draft(model_dir))
    frozen = Frozen.read(model_dir, source, "cpu")
    options = options_for(Recipe.COLD, {})
    runs = read_runs(fresh, source.config.hidden, source.config.vocab)
    rates: list[float] = []
    computed = real = 0
    for repeat in range(REPEATS):
        draft = Eagle3.of(source)
        sampler = CandidateSampler(runs, frozen, options.negatives)
        objective = Objective(draft, frozen, options, sampler.seen)
        optimizer = Optimizer(objective, options)
        rows = _count_rows(draft)
        tokens, began = 0, 0.0
        for step, pieces in enumerate(equal_pieces(runs, options.batch_tokens, options.pack_rows)):
            if step == WARM_UP:
                tokens, began = 0, time.perf_counter()
            if step == WARM_UP + STEPS:
                break
            packed = pack(pieces)
            objective(packed, sampler.draw(step)).backward()
            optimizer.step(0.5)
            tokens += packed.tokens
            if not repeat:
                real += len(packed.positions) + packed.tokens
        rates.append(tokens / (time.perf_counter() - began))
        if not repeat:
            computed = rows["fc"] + rows["first pass"]
    padded = padded_rows(runs, options.batch_tokens) / sum(run.queries(0).stop for run in runs)
    prompts_too = padded * sum(run.queries(0).stop for run in runs) / sum(len(run.queries(0)) for run in runs)
    return [
        Claim(
            "trainer-tokens-per-s", "trained tokens a second, one core", report.median(rates), "tokens/s", runs=rates
        ),
        at_most("trainer-rows", "rows computed over rows that carry data", computed / real, 1.0),
        Claim("trainer-rows-padded", "the same, each batch padded to its longest run", padded),
        Claim(
            "trainer-rows-asked",
            "rows in attention, MLP and head a trained token, padded and with prompts",
            prompts_too,
        ),
    ]


def _count_rows(draft: Eagle3) -> dict[str, int]:
    """Rows that fc and the first pass's query projection are given, counted where they are computed."""
    rows = {"fc": 0, "first pass": 0}
    last = {"was fc": False}

    def on_fc(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows["fc"] += args[0].shape[0]
        last["was fc"] = True

    def on_query(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows["first pass"] += args[0].shape[0] if last["was fc"] else 0
        last["was fc"] = False

    draft.fc.register_forward_pre_hook(on_fc)
    draft.midlayer.self_attn.q_proj.register_forward_pre_hook(on_query)
    return rows


def padded_rows(runs: Sequence[Run], tokens: int) -> int:
    """Rows that a trainer computes which pads each batch of about `tokens` trained tokens to its longest run."""
    total = asked = longest = count = 0
    for run in runs:
        asked, longest, count = asked + len(run.queries(0)), max(longest, run.queries(0).stop), count + 1
        if asked >= tokens:
            total, asked, longest, count = total + longest * count, 0, 0, 0
    return total + longest * count


def _few(model_dir: Path, samples: Samples) -> list[Claim]:
    """Cold starts from the samples that a run of minutes gives, as `bench.hetero` predicts them."""
    source = checkpoint.load(first_draft(model_dir))
    hidden, vocab = source.config.hidden, source.config.vocab
    runs, held_out = read_runs(samples.train, hidden, vocab), read_runs(samples.held_out, hidden, vocab)
    claims = list[Claim]()
    for tokens in FEW:
        some = first_tokens(runs, tokens)
        first = adapt(source, some, model_dir)
        frozen = Frozen.read(model_dir, first, "cpu")
        lengths = list[float]()
        for seed in range(REPEATS):
            ((_, draft),) = cold.train(first, some, frozen, {"seed": seed}, GAMMA)
            lengths.append(evaluate(draft, held_out, frozen, GAMMA).length)
        what = f"held-out acceptance length after a cold start from {tokens:,} tokens of samples, gamma {GAMMA}"
        claims.append(Claim(f"trainer-acceptance-{tokens}", what, report.median(lengths), runs=lengths))
    return claims


def first_tokens(runs: Sequence[Run], tokens: int) -> list[Run]:
    """The first of `runs`, until they have `tokens` tokens to train."""
    sums = itertools.accumulate(len(run.queries(0)) for run in runs)
    return [run for run, so_far in zip(runs, sums, strict=True) if so_far <= tokens]


def _job(model_dir: Path, samples: Samples) -> list[Claim]:
    """A whole job in a process of its own: what a worker runs."""
    result, seconds = run_job(model_dir, first_draft(model_dir), samples, WORK / "job", BUDGET_S)
    assert result.incumbent is not None
    assert result.candidate is not None
    memory_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return [
        at_most(
            "trainer-job-s", f"a job with a budget of {BUDGET_S:.0f} s, start to end", seconds, BUDGET_S * 1.2, "s"
        ),
        at_least("trainer-acceptance", "held-out acceptance length after it, gamma 4", result.candidate.length, 1.8),
        Claim("trainer-acceptance-before", "and before it (version 0)", result.incumbent.length),
        Claim("trainer-job-tokens", "tokens it trained, counted once a pass", result.trained_tokens, "tokens"),
        Claim("trainer-job-memory", "its peak memory", memory_mib, "MiB"),
    ]


if __name__ == "__main__":
    main()
