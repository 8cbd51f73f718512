"""What an engine's tap gives, row by row: against transformers in full precision, beside transformers in the engine's own.

`python -m bench.engines.tap [vllm|sglang]`. A row is one state of one token. Prefill rows are those of the prompt, verification rows
those of generated tokens, which were tapped while drafted tokens were verified. The control compares with the next layer's states.
"""

import argparse
import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench.drafts import code_draft
from bench.engines.counters import drafted
from bench.engines.rig import Rig, drafted_by, rig
from bench.engines.servers import Engine
from bench.load import client
from bench.model import DEFAULT
from bench.report import Claim, at_least, at_most, one_of, publish
from bench.traffic import DOMAINS
from tests.contract.peer import Tapped
from tests.support import eventually
from tided.draft.target import describe

PROMPTS = {1: 8, 8: 24}
DTYPES = {"vllm": "bfloat16", "sglang": "float32"}
REFERENCES = {"bfloat16": torch.float32, "float32": torch.float64}
GAMMA, TOKENS = 3, 48
LAST_REPORT_S = 10.0


@dataclass
class Errors:
    """Relative L2 errors of rows against the reference: the tap's, transformers' in the engine's dtype, and the wrong layer's."""

    tap: list[float] = field(default_factory=list[float])
    own: list[float] = field(default_factory=list[float])
    wrong: list[float] = field(default_factory=list[float])


@dataclass
class Counted:
    """What must be exact."""

    requests: int = 0
    rows: int = 0
    wrong_ids: int = 0
    wrong_counts: int = 0


async def measure(kind: str, model: Path) -> list[Claim]:
    """The claims of one kind of engine."""
    dtype, states = DTYPES[kind], States(model, DTYPES[kind])
    errors = {(concurrency, stage): Errors() for concurrency in PROMPTS for stage in ("prefill", "verification")}
    counted = Counted()
    async with rig(model, Engine(kind, kind=kind, draft=code_draft(model).absolute()), dtype) as started:
        await started.peer.here()
        await started.drafts(GAMMA)
        await started.peer.capture()
        source = iter(DOMAINS["code"].prompts("measure", seed=3))
        for concurrency, count in PROMPTS.items():
            prompts = [started.prompt_ids(prompt) for prompt in itertools.islice(source, count)]
            answers = await _answers(started, prompts, concurrency)
            for ids, answer in zip(prompts, answers, strict=True):
                (request,) = await started.peer.ended(ids)
                tokens = [*ids, *answer]
                _count(counted, request, tokens)
                of = {stage: errors[concurrency, stage] for stage in ("prefill", "verification")}
                states.compare(request, tokens, len(ids), of)
        ours, theirs = await _acceptance(started)
    return _claims(kind, dtype, errors, counted, ours, theirs)


async def _answers(started: Rig, prompts: Sequence[list[int]], concurrency: int) -> list[list[int]]:
    """In the order of the prompts, so many at a time."""
    room = asyncio.Semaphore(concurrency)

    async def one(ids: list[int]) -> list[int]:
        async with room:
            return await started.complete(http, ids, TOKENS)

    async with client(started.url) as http:
        return list(await asyncio.gather(*(one(ids) for ids in prompts)))


class States:
    """transformers on the same tokens."""

    def __init__(self, model: Path, dtype: str) -> None:
        self._layers = describe(model).aux_layers
        self._reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=REFERENCES[dtype]).eval()
        self._own: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def compare(self, request: Tapped, tokens: Sequence[int], prompt: int, errors: dict[str, Errors]) -> None:
        """Adds one request's rows."""
        positions = sorted(request.rows)
        got = np.stack([request.rows[position] for position in positions]).astype(np.float64)
        want, wrong = self._states(self._reference, tokens)
        own, _ = self._states(self._own, tokens)
        aux = len(self._layers)
        found = {
            "tap": _relative(got, want[positions]),
            "own": _relative(own[positions], want[positions]),
            "wrong": _relative(got[:, :aux], wrong[positions]),
        }
        generated = np.array(positions) >= prompt
        for stage, chosen in (("prefill", ~generated), ("verification", generated)):
            for name, values in found.items():
                getattr(errors[stage], name).extend(values[chosen].ravel().tolist())

    @torch.inference_mode()
    def _states(self, model: Any, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """[tokens, layers + 1, hidden]: what is to be tapped, and [tokens, layers, hidden]: each aux state one layer too late."""
        hidden = model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
        right = [hidden[layer] for layer in self._layers] + [hidden[-1]]
        late = [hidden[layer + 1] for layer in self._layers]
        return _stacked(right), _stacked(late)


def _stacked(states: Sequence[torch.Tensor]) -> np.ndarray:
    return np.asarray(torch.cat(list(states)).transpose(0, 1).double().numpy())


def _relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative L2 error of each state of each token."""
    return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)


def _count(counted: Counted, request: Tapped, tokens: Sequence[int]) -> None:
    """Every token but the newest has a row, but for a head of the prompt that a prefix cache served."""
    first = min(request.ids)
    counted.requests += 1
    counted.rows += len(request.rows)
    counted.wrong_ids += sum(request.ids[position] != tokens[position] for position in request.ids)
    counted.wrong_counts += int(len(request.rows) != len(tokens) - 1 - first)


async def _acceptance(started: Rig) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(steps, drafted, accepted) by the plugin's reports, and by vLLM's own counters, once the last report has come."""
    async with client(started.url) as http:
        own = await drafted(http)
    theirs = (own.steps, own.drafted, own.accepted)
    with contextlib.suppress(AssertionError):  # the claim shows both
        await eventually(lambda: drafted_by(started.peer) == theirs, LAST_REPORT_S)
    return drafted_by(started.peer), theirs


def _claims(
    kind: str,
    dtype: str,
    errors: dict[tuple[int, str], Errors],
    counted: Counted,
    ours: tuple[int, int, int],
    theirs: tuple[int, int, int],
) -> list[Claim]:
    claims: list[Claim] = []
    for (concurrency, stage), found in errors.items():
        label = f"{kind} {dtype}, {stage}, concurrency {concurrency} ({len(found.tap)} rows)"
        for name, q in (("median", 0.5), ("99th percentile", 0.99)):
            ratio = float(np.quantile(found.tap, q) / np.quantile(found.own, q))
            claims.append(
                at_most(
                    f"{kind}.{stage}.{concurrency}.{q}",
                    f"{label}: {name} error over transformers' own",
                    ratio,
                    2.0,
                    "x",
                )
            )
        claims.append(
            Claim(
                f"{kind}.{stage}.{concurrency}.error", f"{label}: median relative L2 error", float(np.median(found.tap))
            )
        )
        control = float(np.median(found.wrong) / np.median(found.tap))
        claims.append(
            at_least(
                f"{kind}.{stage}.{concurrency}.control",
                f"{label}: a wrong layer's median error over it",
                control,
                10,
                "x",
            )
        )
    claims.append(at_most(f"{kind}.ids", f"{kind}: wrong token ids in {counted.rows} rows", counted.wrong_ids, 0))
    claims.append(
        at_most(
            f"{kind}.counts",
            f"{kind}: of {counted.requests} requests, those with a row too many or too few",
            counted.wrong_counts,
            0,
        )
    )
    if kind == "vllm":
        difference = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        what = f"vllm: drafting steps, drafted and accepted tokens {ours}, difference from vLLM's own {theirs}"
        claims.append(at_most("vllm.acceptance", what, difference, 0))
    return claims


def main() -> None:
    """Measure and publish; each kind's claims beside the other's."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.tap", description=__doc__)
    parser.add_argument("kinds", nargs="*", type=one_of(DTYPES), default=["vllm"])
    parser.add_argument("--model", type=Path, default=DEFAULT)
    options = parser.parse_args()
    for kind in options.kinds:
        publish("engines-tap", asyncio.run(measure(kind, options.model)), keep=True)


if __name__ == "__main__":
    main()
