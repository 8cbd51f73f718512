"""What a draft forgets of one domain when it is trained on another, with and without replay.

`python -m bench.forgetting` writes build/bench/forgetting.json. The draft that knows the code domain is trained on French, for the same
budget with and without code samples to replay, with several seeds; all are scored on the same held-out requests of both domains. The
samples are greedy answers of the real model, made once. What is replayed are samples that the code draft was trained on, as many as the
stockroom keeps of a domain by default: a trainer's share of what is fresh. A draft that was trained stays under build/forgetting.
"""

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench import model, report
from bench.drafts import BUDGET_S, HELD_OUT_REQUESTS, TRAIN_REQUESTS, WORK, Samples, code_draft, run_job, score
from bench.report import BOOTSTRAP_DRAWS, Claim, Interval, at_least
from bench.samples import shards
from tided.config import TrainingConfig
from tided.model.drafts import Evaluation

SEEDS = 3
BEFORE, WITHOUT, WITH = "before", "without", "with"
ARMS = {WITHOUT: "after French without replay", WITH: "after French with replay"}
OUT = Path("build/forgetting")

Scores = Mapping[str, Sequence[Evaluation]]
"""By arm, one evaluation for each seed; `BEFORE` has one."""


def replayed_requests() -> int:
    """Of the code domain, when as many requests of French are fresh: a training replays no more, so no more is kept."""
    fraction = TrainingConfig().replay_fraction
    return round(fraction / (1 - fraction) * TRAIN_REQUESTS)


def main() -> None:
    """Train, score, publish."""
    argparse.ArgumentParser(prog="python -m bench.forgetting", description=__doc__).parse_args()
    model_dir = model.make(model.DEFAULT)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    code = code_draft(model_dir)
    french = shards(model_dir, "french", "train", TRAIN_REQUESTS, WORK)
    held_out = {domain: shards(model_dir, domain, "measure", HELD_OUT_REQUESTS, WORK) for domain in ("code", "french")}
    kept = shards(model_dir, "code", "train", replayed_requests(), WORK)
    drafts: dict[str, list[Path]] = {BEFORE: [code], WITHOUT: [], WITH: []}
    tokens: dict[str, list[int]] = {WITHOUT: [], WITH: []}
    shutil.rmtree(OUT, ignore_errors=True)
    for seed in range(SEEDS):
        for arm in ARMS:
            samples = Samples(french, held_out["french"], kept if arm == WITH else [])
            result, _ = run_job(model_dir, code, samples, OUT / f"{arm}-{seed}", BUDGET_S, seed)
            drafts[arm].append(Path(result.staged))
            tokens[arm].append(result.trained_tokens)
    claims: list[Claim] = []
    scores: dict[str, Scores] = {}
    for domain, paths in held_out.items():
        found = iter(
            score(model_dir, [path for arm in drafts.values() for path in arm], paths, OUT / f"score-{domain}")
        )
        scores[domain] = {arm: [next(found) for _ in of_arm] for arm, of_arm in drafts.items()}
        claims += claims_of(domain, scores[domain])
    for arm, label in ARMS.items():
        what = f"tokens trained {label}, in {BUDGET_S:.0f} s"
        claims.append(Claim(f"tokens.{arm}", what, report.median(tokens[arm]), "tokens", runs=tokens[arm]))
    report.write(
        "forgetting",
        claims,
        extra={
            domain: {arm: [asdict(item) for item in of_arm] for arm, of_arm in by_arm.items()}
            for domain, by_arm in scores.items()
        },
    )
    report.show("forgetting", claims)


def claims_of(domain: str, scores: Scores) -> list[Claim]:
    """Acceptance lengths on one domain's held-out requests, and for that which was known before, what replay saves of it."""
    claims: list[Claim] = []
    for arm, label in {BEFORE: "before", **ARMS}.items():
        found = difference(scores[arm])
        what = f"acceptance length on {domain}, {label}{_words(found)}"
        runs = [evaluation.length for evaluation in scores[arm]]
        claims.append(Claim(f"{domain}.{arm}", what, found.median, runs=runs))
    for arm, label in ARMS.items():
        found = difference(scores[arm], scores[BEFORE])
        what = f"change on {domain}, {label}{_words(found)}"
        claims.append(Claim(f"{domain}.{arm}.change", what, found.median))
    found = difference(scores[WITH], scores[WITHOUT])
    what = f"on {domain}, with replay less without{_words(found)}"
    if domain == "code":
        claims.append(at_least("code.replay.low", f"{what}: lower end", found.low, 0.0))
    return [*claims, Claim(f"{domain}.replay", what, found.median)]


def difference(ours: Sequence[Evaluation], theirs: Sequence[Evaluation] = ()) -> Interval:
    """Mean acceptance length over the seeds, less that of `theirs`, with a 95% bootstrap interval: requests and seeds are resampled.

    Every evaluation is of the same requests in the same order.
    """
    rng = np.random.default_rng(0)
    weights = np.array(ours[0].tokens, float)
    picks = rng.integers(0, len(weights), (BOOTSTRAP_DRAWS, len(weights)))

    def means(evaluations: Sequence[Evaluation]) -> tuple[float, np.ndarray]:
        assert all(evaluation.groups == ours[0].groups for evaluation in evaluations)
        lengths = np.array([evaluation.lengths for evaluation in evaluations])
        seeds = rng.integers(0, len(lengths), (BOOTSTRAP_DRAWS, len(lengths)))
        by_request = lengths[seeds].mean(axis=1)
        drawn = np.take_along_axis(by_request * weights, picks, 1).sum(axis=1) / weights[picks].sum(axis=1)
        return float((lengths.mean(axis=0) * weights).sum() / weights.sum()), drawn

    value, drawn = means(ours)
    if theirs:
        their_value, their_drawn = means(theirs)
        value, drawn = value - their_value, drawn - their_drawn
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high), len(weights))


def _words(found: Interval) -> str:
    return f" (95% {found.low:.3f}..{found.high:.3f}, {found.pairs} requests)"


if __name__ == "__main__":
    main()
