"""Training from tapped states against recomputing them from the target, as in the paper's Table II, on one core.

`python -m bench.recompute` writes build/bench/recompute.json. The same samples and the same training (cold start, EPOCHS passes):

    tapped   the states come with the traffic: only the training is paid
    offline  the target's forward over all samples once, its states written to a shard, then the training
    online   the target's forward again for every pass

The paper's figures are for three epochs: 15.32 h - 9.16 h is one forward over its samples, and 27.64 h - 9.16 h is three. The forward is
that of transformers, in the faster of bf16 and float32, over batches of runs of like length, without its head; it gives the states that a
shard has. Loading the target is not counted, nor its memory. CPU seconds of this process, which has one thread.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench import cold, model, report
from bench.drafts import code_samples, first_draft
from bench.report import Claim, Interval, at_least
from tided.draft import checkpoint, target
from tided.draft.eagle3 import tensor_of
from tided.draft.tensors import Array, write_file
from tided.training.data import Run, read_runs
from tided.training.losses import Frozen
from tided.training.memory import keep_freed
from tided.training.vocabulary import adapt

EPOCHS, TURNS = 3, 3
GAMMA = 4
BATCH = 16
OFFLINE, ONLINE = 1.67, 3.02
"""What the paper has."""


def main() -> None:
    """Measure in turns and publish."""
    argparse.ArgumentParser(prog="python -m bench.recompute", description=__doc__).parse_args()
    model_dir = model.make(model.DEFAULT)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    keep_freed()
    samples = code_samples(model_dir)
    source = checkpoint.load(first_draft(model_dir))
    runs = read_runs(samples.train, source.config.hidden, source.config.vocab)
    first = adapt(source, runs, model_dir)
    frozen = Frozen.read(model_dir, first, "cpu")
    targets = [Target(model_dir, dtype) for dtype in (torch.bfloat16, torch.float32)]
    forward_s, training_s, tokens = list[float](), list[float](), list[int]()
    rates = [_rate(item, runs[:BATCH]) for item in targets]
    chosen = targets[int(np.argmax(rates))]
    apart = 0.0
    for _ in range(TURNS):
        began = time.process_time()
        states = list(chosen.states(runs))
        _write(states, report.BENCH_DIR / "recompute-states.safetensors")
        forward_s.append(time.process_time() - began)
        apart = max(apart, distance(states, runs))
        (standing, _) = cold.train(first, runs, frozen, {"passes": EPOCHS}, GAMMA)[-1]
        training_s.append(standing.seconds)
        tokens.append(standing.tokens)
    rows = sum(len(run.states) for run in runs)
    report.publish("recompute", claims_of(forward_s, training_s, tokens, rows, rates, apart))


class Target:
    """The served model, and the states that a tap would give of it."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        self._layers = target.read_config(model_dir).aux_layers

    @torch.inference_mode()
    def states(self, runs: Sequence[Run]) -> Iterator[tuple[int, Array]]:
        """(index of a run, its states [rows, 4, hidden] as BF16 bits), for all runs."""
        order = sorted(range(len(runs)), key=lambda i: len(runs[i].states))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows = [len(runs[i].states) for i in chosen]
            ids = torch.zeros(len(chosen), max(rows), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for at, i in enumerate(chosen):
                ids[at, : rows[at]] = tensor_of(runs[i].ids[: rows[at]])
                mask[at, : rows[at]] = 1
            out = self._model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            found = torch.stack([*(out.hidden_states[k] for k in self._layers), out.last_hidden_state], 2)
            bits: Array = found.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            yield from ((i, bits[at, : rows[at]]) for at, i in enumerate(chosen))


def _rate(model: Target, runs: Sequence[Run]) -> float:
    """Rows a second, after one batch to warm up."""
    list(model.states(runs))
    began = time.process_time()
    rows = sum(len(states) for _, states in model.states(runs))
    return rows / (time.process_time() - began)


def _write(states: Sequence[tuple[int, Array]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, {"states": np.concatenate([array for _, array in states])})
    path.unlink()


def distance(states: Sequence[tuple[int, Array]], runs: Sequence[Run]) -> float:
    """Median over the rows of the relative distance of recomputed states from the tapped ones: that they are the same."""
    distances = list[Array]()
    for i, array in states:
        ours, theirs = tensor_of(array).float(), tensor_of(runs[i].states).float()
        distances.append(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).flatten().numpy())
    return float(np.median(np.concatenate(distances)))


def claims_of(
    forward_s: Sequence[float],
    training_s: Sequence[float],
    tokens: Sequence[int],
    rows: int,
    rates: Sequence[float],
    apart: float,
) -> list[Claim]:
    """From one forward over all samples and one training in each turn."""
    offline = report.paired_ratio([f + t for f, t in zip(forward_s, training_s, strict=True)], training_s)
    online = report.paired_ratio([EPOCHS * f + t for f, t in zip(forward_s, training_s, strict=True)], training_s)
    what = "total time, recomputed states over tapped ones"
    return [
        at_least("offline", f"{what}, offline (once){_words(offline)}", offline.median, OFFLINE, "x"),
        at_least("online", f"{what}, online ({EPOCHS} epochs){_words(online)}", online.median, ONLINE, "x"),
        Claim("training-s", f"training alone, {EPOCHS} passes", report.median(training_s), "s", runs=training_s),
        Claim("training-tokens", "tokens that it trained", report.median(tokens), "tokens"),
        Claim("forward-s", f"the target's forward over {rows} rows", report.median(forward_s), "s", runs=forward_s),
        Claim("forward-bf16", "its rows a second in bf16", rates[0], "rows/s"),
        Claim("forward-float32", "and in float32", rates[1], "rows/s"),
        Claim("apart", "relative distance of recomputed states from tapped ones, median row", apart),
    ]


def _words(found: Interval) -> str:
    return f" (95% {found.low:.2f}..{found.high:.2f}, {found.pairs} turns)"


if __name__ == "__main__":
    main()
