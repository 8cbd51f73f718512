"""Our trainer against that of `speculators` 0.9 (from PyPI): same samples, vocabulary map, draft size and unroll, on one core each.

`python -m bench.peers` runs the parts that are missing, and writes the claims after each seed; raw figures are under build/peers/. A part
is one of these trainings, each with every seed, the seeds one after the other:

    defaults  `speculators` with its own defaults, but packs of two runs: its 8,192 rows would give it two steps an epoch of these samples,
              and with 1,024 it reached 1.21 where it reached 1.94 with these (one seed)
    settings  `speculators` with our settings, as far as it has them: our version 0 to begin with, AdamW, loss, schedule, step weights,
              and packs of one run
    tokens    ours with as many passes as its epochs
    time      ours with as many seconds as the faster of its two took

Its schedule ends with its last epoch, ours with each training's budget. bench/peers_run.py says what a trained token and a second are. Our
seconds include the validation that chooses our weights, and what it needs of the samples is not trained on; its validation is left out.
All drafts are scored by one evaluator on the same held-out requests, which is not timed. Intervals are over requests and seeds.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cold, model, report
from bench.drafts import Samples, code_samples, first_draft
from bench.forgetting import difference
from bench.peers_draft import read
from bench.report import Claim, at_least
from bench.study import Parts
from tests.engines.environment import CHECKOUT, engine_environment
from tided.draft import checkpoint
from tided.draft.checkpoint import Checkpoint
from tided.draft.eagle3 import Eagle3
from tided.draft.formats import export_speculators
from tided.model.codec import from_plain, to_plain
from tided.model.drafts import Evaluation
from tided.model.jobs import Recipe
from tided.training.data import Run, read_runs
from tided.training.evaluate import evaluate
from tided.training.losses import Frozen
from tided.training.memory import keep_freed
from tided.training.options import options_for
from tided.training.vocabulary import adapt

NAME = "peers"
SEEDS, EPOCHS = 3, 2
GAMMA = UNROLL = 3
DEFAULTS, SETTINGS, TOKENS, TIME = "defaults", "settings", "tokens", "time"
THEIRS = {DEFAULTS: "speculators, its defaults", SETTINGS: "speculators, our settings"}
OURS = {TOKENS: "after the same tokens", TIME: "after the same time"}
ARMS = (TOKENS, *THEIRS, TIME)
"""In the order in which they run: the last one takes its seconds from theirs."""
OUT = Path("build/peers")
ROWS = {DEFAULTS: 272, SETTINGS: 136}
"""Of a pack of theirs: two runs of these samples, or one, which has about as many trained tokens as a pack of ours."""


class Bench:
    """Samples and the draft to begin with, for both trainers; made once in `OUT`."""

    def __init__(self, model_dir: Path, samples: Samples) -> None:
        self._model_dir = model_dir
        source = checkpoint.load(first_draft(model_dir))
        self._train = read_runs(samples.train, source.config.hidden, source.config.vocab)
        self._held_out = read_runs(samples.held_out, source.config.hidden, source.config.vocab)
        self._draft = adapt(source, self._train, model_dir)
        self._frozen = Frozen.read(model_dir, self._draft, "cpu")
        self._data = OUT / "samples"
        (shard,) = samples.train
        if not self._data.exists():
            partial = OUT / "samples.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            checkpoint.write(partial / "first", self._draft.config, self._draft.tensors)
            export_speculators(partial / "first", model_dir, partial / "theirs", GAMMA)
            for name in ("d2t", "t2d"):
                np.save(partial / f"{name}.npy", self._draft.tensors[name])
            _theirs("samples", shard, model_dir, partial / "rows")
            partial.rename(self._data)

    def training(self, arm: str, seed: int, epochs: int, faster: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One training: tokens, steps, seconds and an evaluation after each epoch, the last at the end. `faster`: that of its two."""
        if arm in THEIRS:
            return self._their_training(arm, seed, epochs)
        if arm == TOKENS:
            return self._our_training({"seed": seed, "passes": epochs}, cold.NO_BUDGET_S, [])
        *marks, budget_s = (epoch["seconds"] for epoch in faster)
        return self._our_training({"seed": seed}, budget_s, marks)

    def _their_training(self, arm: str, seed: int, epochs: int) -> list[dict[str, Any]]:
        out = OUT / f"{arm}-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        rows = len(self._train)
        options: dict[str, Any] = {
            "verifier-name-or-path": self._model_dir,
            "data-path": self._data / "rows",
            "d2t-path": self._data / "d2t.npy",
            "t2d-path": self._data / "t2d.npy",
            "save-path": out / "drafts",
            "log-dir": out / "logs",
            "train-data-ratio": (rows + 0.5) / (rows + 1),
            "total-seq-len": ROWS[arm],
            "ttt-steps": UNROLL,
            "epochs": epochs,
            "seed": seed,
            "num-workers": 0,
            "on-missing": "raise",
            "draft-attn-impl": "sdpa",
            "loss-implementation": "eager",
        }
        if arm == SETTINGS:
            ours = options_for(Recipe.COLD, {})
            options |= {
                "from-pretrained": self._data / "theirs",
                "optimizer": "adamw",
                "lr": ours.learning_rate,
                "weight-decay": 0.0,
                "scheduler-type": "cosine",
                "scheduler-warmup-ratio": ours.warmup_fraction,
                "ttt-step-loss-decay": ours.step_decay,
                "loss-fn": json.dumps({"kl_div": 1.0, "ce": ours.hard_weight}),
            }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        _theirs("train", out / "epochs.json", *words, log=out / "log")
        done: list[dict[str, Any]] = json.loads((out / "epochs.json").read_text())
        for epoch in done:
            draft = read(out / "drafts" / str(epoch["epoch"]), self._model_dir, out / "read")
            epoch["evaluation"] = self._score(draft)
        shutil.rmtree(out)
        return done

    def _our_training(self, given: dict[str, Any], budget_s: float, marks: Sequence[float]) -> list[dict[str, Any]]:
        """Our recipe for a cold start; at `marks` seconds and at its end what `_their_training` gives after epochs."""
        done = cold.train(
            self._draft, self._train, self._frozen, {"unroll_steps": UNROLL, **given}, GAMMA, budget_s, marks
        )
        return [{**asdict(standing), "evaluation": self._score(draft)} for standing, draft in done]

    def _score(self, draft: Eagle3) -> dict[str, Any]:
        return to_plain(evaluate(draft, self._held_out, self._frozen, GAMMA))


def _theirs(*words: object, log: Path = OUT / "log") -> None:
    """Run bench/peers_run.py on this core, in the environment of `speculators`."""
    built = engine_environment("speculators")
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(built.python), str(CHECKOUT / "bench" / "peers_run.py"), *map(str, words)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            command, env=built.environment | quiet, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"speculators failed: see {log}")


def claims_of(parts: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """From the trainings of each seed, by arm."""
    claims: list[Claim] = []
    ends = {arm: [part[arm][-1] for part in parts] for arm in ARMS}
    rates = {arm: [end["tokens"] / end["seconds"] for end in found] for arm, found in ends.items()}
    for arm, label in {**THEIRS, TIME: "ours"}.items():
        what = f"{label}: trained tokens a CPU second, median of {len(parts)} seeds"
        claims.append(Claim(f"rate.{arm}", what, report.median(rates[arm]), "tokens/s", runs=rates[arm]))
    for arm, label in THEIRS.items():
        ratio = report.paired_ratio(rates[TIME], rates[arm])
        what = f"trained tokens/s, ours over {label} (95% {ratio.low:.2f}..{ratio.high:.2f})"
        claims.append(at_least(f"rate.over.{arm}", what, ratio.median, 1.5, "x"))
    for arm, label in {**THEIRS, TOKENS: "ours, same tokens", TIME: "ours, same time"}.items():
        for at in range(min(len(part[arm]) for part in parts)):
            claims.append(_reached(f"reached.{arm}.{at}", label, [part[arm][at] for part in parts]))
    for ours, when in OURS.items():
        for arm, label in THEIRS.items():
            found = difference(_evaluations(ends[ours]), _evaluations(ends[arm]))
            what = f"held-out acceptance length {when}, ours less {label}"
            claims.append(Claim(f"{ours}.over.{arm}", f"{what} (95% {found.low:.3f}..{found.high:.3f})", found.median))
            claims.append(at_least(f"{ours}.over.{arm}.low", f"{what}: lower end", found.low, 0.0))
    return claims


def _reached(id: str, label: str, found: Sequence[Mapping[str, Any]]) -> Claim:
    scored = difference(_evaluations(found))
    tokens, seconds = (report.median([end[key] for end in found]) for key in ("tokens", "seconds"))
    what = f"{label}: acceptance length after {tokens:,.0f} tokens, {seconds:.0f} s"
    what += f" (95% {scored.low:.3f}..{scored.high:.3f}, {scored.pairs} requests)"
    return Claim(id, what, scored.median, runs=[item.length for item in _evaluations(found)])


def _evaluations(found: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    return [from_plain(Evaluation, item["evaluation"]) for item in found]


class Done:
    """The parts that have run, each under the plan that its figures follow from, beside the code."""

    def __init__(self, epochs: int, draft: Checkpoint, runs: Sequence[Run]) -> None:
        common = [epochs, UNROLL, GAMMA, draft.version, *(run.group.hex() for run in runs)]
        ours = to_plain(options_for(Recipe.COLD, {}))
        plans = {arm: [common, ROWS.get(arm), None if arm == DEFAULTS else ours] for arm in ARMS}
        self._parts = {
            arm: Parts(OUT, hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:20]) for arm, plan in plans.items()
        }

    def read(self, arm: str, seed: int) -> list[dict[str, Any]] | None:
        """What `Bench.training` gave; None when it has not run."""
        part = self._parts[arm].read(f"{arm}-{seed}")
        return None if part is None else part["epochs"]

    def write(self, arm: str, seed: int, epochs: list[dict[str, Any]]) -> None:
        """Keep it."""
        self._parts[arm].write(f"{arm}-{seed}", {"epochs": epochs})

    def faster(self, seed: int) -> list[dict[str, Any]]:
        """Of the other trainer's two trainings, the one that took less time; nothing before both have run."""
        found = [self.read(arm, seed) for arm in THEIRS]
        return (
            min((epochs for epochs in found if epochs), key=lambda epochs: epochs[-1]["seconds"]) if all(found) else []
        )

    def whole(self, seeds: int) -> list[dict[str, list[dict[str, Any]]]]:
        """By arm, for each seed whose trainings have all run."""
        found = [{arm: epochs for arm in ARMS if (epochs := self.read(arm, seed))} for seed in range(seeds)]
        return [by_arm for by_arm in found if len(by_arm) == len(ARMS)]


def main() -> None:
    """Run what is missing; publish the seeds that are whole after each part."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of speculators")
    parser.add_argument(
        "--parts", type=int, default=SEEDS * len(ARMS), help="run at most that many of those that are missing"
    )
    given = parser.parse_args()
    model_dir = model.make(model.DEFAULT)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    keep_freed()
    samples = code_samples(model_dir)
    source = checkpoint.load(first_draft(model_dir))
    runs = read_runs([*samples.train, *samples.held_out], source.config.hidden, source.config.vocab)
    done = Done(given.epochs, source, runs)
    missing = [(seed, arm) for seed in range(given.seeds) for arm in ARMS if done.read(arm, seed) is None]
    bench = Bench(model_dir, samples) if missing else None
    for seed, arm in missing[: given.parts]:
        assert bench is not None
        epochs = bench.training(arm, seed, given.epochs, done.faster(seed))
        done.write(arm, seed, epochs)
        print(f"seed {seed}, {arm}: {epochs[-1]['seconds']:.0f} s", flush=True)
        if whole := done.whole(given.seeds):
            report.write(NAME, claims_of(whole))
    if whole := done.whole(given.seeds):
        report.publish(NAME, claims_of(whole))


if __name__ == "__main__":
    main()
