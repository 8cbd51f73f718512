"""200 swaps under load: what they cost the requests in flight, and that they change no answer.

`python -m bench.engines.swaps [vllm|sglang ...]`. One float32 server answers the same prompts, eight at a time: twice without a swap,
then while drafts are exchanged without end. Answers are compared token by token with those of the first run. A difference is a tie when
the first run's two best logits there are closer than two orders of summing them. The target's weights are digested before and after.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.drafts import code_draft
from bench.engines.rig import Rig, rig
from bench.engines.servers import Engine
from bench.identity import TIE_GAP, gaps_of
from bench.load import NO_CAPTURE, Answer, client, each, longest_gap
from bench.model import DEFAULT
from bench.report import Claim, at_least, at_most, one_of, publish
from bench.swap import second_draft
from bench.traffic import DOMAINS, Prompt
from tided.draft import checkpoint
from tided.model.errors import Refused
from tided.wire.control import Swap

CONCURRENCY, GAMMA, TOKENS = 8, 3, 64
SWAPS = 200
PROMPTS = {"vllm": 64, "sglang": 24}
PAUSE_MS = {"vllm": 100.0, "sglang": 200.0}
BETWEEN_S = 0.25
DIGESTED = {"vllm": "embeddings, norms and head", "sglang": "weights"}
ENGINES = {
    "vllm": Engine(
        "vllm",
        options={"--worker-extension-cls": "bench.engines.checksum.TargetChecksum"},
        environment={"VLLM_SERVER_DEV_MODE": "1"},  # for the digest alone: tided needs no developer mode
    ),
    "sglang": Engine("sglang", kind="sglang"),
}


@dataclass
class Swapped:
    """What the run with swaps gave. `calls`: when each swap was asked for and answered; `pauses_s`: what its steps paused."""

    answers: list[list[Answer]] = field(default_factory=list[list[Answer]])
    calls: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    pauses_s: list[float] = field(default_factory=list[float])


async def measure(kind: str, model: Path, swaps: int) -> list[Claim]:
    """The claims of one kind of engine."""
    first = code_draft(model).resolve()
    with tempfile.TemporaryDirectory(prefix="tided-swaps-") as name:
        drafts = [second_draft(first, Path(name) / "second"), first]
        async with rig(model, replace(ENGINES[kind], draft=first), "float32") as started:
            await started.peer.here()
            await started.drafts(GAMMA)
            before = await _target_digest(kind, started.url)
            prompts = _prompts(PROMPTS[kind])
            quiet = [await _answers(started, prompts) for _ in range(2)]
            swapped = await _swapping(started, prompts, drafts, swaps)
            after = await _target_digest(kind, started.url)
    return _claims(kind, model, quiet, swapped, before == after)


def _prompts(count: int) -> list[Prompt]:
    found = itertools.islice(DOMAINS["code"].prompts("measure", seed=5), count)
    return [replace(prompt, max_tokens=TOKENS) for prompt in found]


async def _answers(started: Rig, prompts: Sequence[Prompt]) -> list[Answer]:
    """In the order of the prompts. SGLang streams no token ids: there they are those of the text."""
    streamed = started.kind == "vllm"
    load = await each(started.url, prompts, CONCURRENCY, token_ids=streamed, headers=NO_CAPTURE)
    answers = load.answers if streamed else [_with_ids(started, answer) for answer in load.answers]
    by_prompt = {answer.prompt: answer for answer in answers}
    return [by_prompt[prompt] for prompt in prompts]


def _with_ids(started: Rig, answer: Answer) -> Answer:
    return replace(answer, token_ids=tuple(started.tokenizer(answer.text, add_special_tokens=False)["input_ids"]))


async def _swapping(started: Rig, prompts: Sequence[Prompt], drafts: Sequence[Path], swaps: int) -> Swapped:
    """The prompts again and again, until so many swaps are done."""
    done = Swapped()
    commands = itertools.cycle([Swap(checkpoint.version_of(draft), str(draft)) for draft in drafts])

    async def exchange() -> None:
        for _ in range(swaps):
            began_s = time.monotonic()
            reply = await started.peer.ask(next(commands))
            if not reply.ok:
                raise Refused(f"swap {len(done.calls) + 1}: {reply.error}")
            done.calls.append((began_s, time.monotonic()))
            done.pauses_s.append(float(reply.data["seconds"]))
            await asyncio.sleep(BETWEEN_S)

    exchanging = asyncio.create_task(exchange())
    while not exchanging.done():
        done.answers.append(await _answers(started, prompts))
    await exchanging
    return done


async def _target_digest(kind: str, url: str) -> Any:
    """The target's weights as the engine itself digests them."""
    async with client(url) as http:
        if kind == "vllm":
            answer = await http.post("/collective_rpc", json={"method": "target_checksum"})
        else:
            answer = await http.post("/weights_checker", json={"action": "checksum", "selector": "target"})
    answer.raise_for_status()
    return answer.json()


def _claims(kind: str, model: Path, quiet: Sequence[list[Answer]], swapped: Swapped, unchanged: bool) -> list[Claim]:
    runs = [*quiet, *swapped.answers]
    failed = sum(bool(answer.error) for run in runs for answer in run)
    pauses = [1000 * seconds for seconds in swapped.pauses_s]
    busy = [answer for run in swapped.answers for answer in run]
    calm = [answer for run in quiet for answer in run]
    silences = [1000 * longest_gap(busy, began, ended) for began, ended in swapped.calls]
    lengths = [ended - began for began, ended in swapped.calls]
    usual = _silences(calm, float(np.median(lengths)))
    label = f"{kind}: " + ("stand-in CPU kernels; " if kind == "sglang" else "")
    quiet_different = _different(quiet[0], quiet[1])
    swap_different = [pair for run in swapped.answers for pair in _different(quiet[0], run)]
    compared = sum(len(run) for run in swapped.answers)
    gaps = gaps_of(model, swap_different)
    most = PAUSE_MS[kind]
    return [
        at_least(f"{kind}.swaps", f"{label}swaps under load at concurrency {CONCURRENCY}", len(pauses), SWAPS),
        at_most(f"{kind}.failed", f"{label}failed requests of {sum(map(len, runs))}", failed, 0),
        at_most(
            f"{kind}.pause", f"{label}steps paused by a swap, p99", float(np.quantile(pauses, 0.99)), most, "ms", pauses
        ),
        Claim(f"{kind}.pause.median", f"{label}steps paused by a swap, median", float(np.median(pauses)), "ms"),
        at_most(
            f"{kind}.silence",
            f"{label}longest silence of a stream while a swap is under way, p99, beyond that of as long a time without one",
            max(0.0, float(np.quantile(silences, 0.99)) - 1000 * float(np.quantile(usual, 0.99))),
            most,
            "ms",
            silences,
        ),
        Claim(f"{kind}.call", f"{label}a swap from command to answer, median", 1000 * float(np.median(lengths)), "ms"),
        Claim(
            f"{kind}.diverged.quiet",
            f"{label}of {len(quiet[1])} answers, those that differ without swaps",
            len(quiet_different),
        ),
        at_most(
            f"{kind}.diverged",
            f"{label}of {compared} answers, those that differ under swaps, ties aside (fp32; by a tie: {sum(g <= TIE_GAP for g in gaps)})",
            sum(gap > TIE_GAP for gap in gaps),
            0,
        ),
        at_most(
            f"{kind}.target",
            f"{label}digest of the target's {DIGESTED[kind]} changed (0: no, 1: yes)",
            int(not unchanged),
            0,
        ),
    ]


def _different(one: Sequence[Answer], other: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    pairs = zip(one, other, strict=True)
    return [(a, b) for a, b in pairs if not a.error and not b.error and a.token_ids != b.token_ids]


def _silences(answers: Sequence[Answer], seconds: float) -> list[float]:
    """The longest silence in each of the stretches of `seconds` that the answers took."""
    arrived = sorted(at_s for answer in answers for at_s in answer.arrived_s)
    starts = np.arange(arrived[0], arrived[-1], seconds)
    return [found for start in starts if (found := longest_gap(answers, float(start), float(start) + seconds))]


def main() -> None:
    """Measure and publish; each kind's claims beside the other's."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.swaps", description=__doc__)
    parser.add_argument("kinds", nargs="*", type=one_of(PROMPTS), default=["vllm"])
    parser.add_argument("--model", type=Path, default=DEFAULT)
    options = parser.parse_args()
    for kind in options.kinds:
        publish("engines-swaps", asyncio.run(measure(kind, options.model, SWAPS)), keep=True)


if __name__ == "__main__":
    main()
