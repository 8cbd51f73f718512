"""On an accelerator: the trainer's use of it at the size of a large target, FSDP2 on one device, and what the tap costs an engine there.

`python -m bench.device [PART...]` writes build/bench/device.json; figures of lent machines are kept under bench/results/.
Weights are random, with Llama-3.1-8B's sizes (the tap's target has 16 of its 32 layers): what is measured is speed alone.
"""

import argparse
import asyncio
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from bench import tap
from bench.report import Claim, at_least, at_most, median, one_of, paired_ratio, show, write
from bench.samples import Answer, write_shard
from tided.draft import init
from tided.draft.checkpoint import DraftConfig
from tided.draft.eagle3 import Eagle3
from tided.engine.device import kept
from tided.engine.embedded import target as embedded
from tided.engine.embedded.target import Target
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.model.jobs import Recipe
from tided.store.valkey import EmbeddedValkey
from tided.training import flash
from tided.training.batches import Order
from tided.training.data import Run
from tided.training.loop import Loop, Objective
from tided.training.losses import CandidateSampler, Frozen
from tided.training.options import TrainOptions, options_for
from tided.wire import keys

PARTS = ("trainer", "fsdp", "step", "tap")
WORK = Path("build/device")
LARGE = DraftConfig(
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128_256,
    draft_vocab=32_000,
    rms_eps=1e-5,
    rope_theta=500_000.0,
    max_position=8192,
)
LAYERS, VOCAB = 16, 49_152  # of the target on disk; its tokenizer is the small model's
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PACKS = (8192, 16_384)
"""Trained tokens a step."""
MEASURED_S, WARM_UP_S = 8.0, 3.0
PEAK = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}
"""Dense BF16 operations a second by the vendor's data sheet, by the beginning of the device's name."""
UTILISATION = 0.40
PROMPTS = ANSWERS = (64, 960)  # tokens: uniform between
STEP_BATCHES = (1, 8, 32)
CONTEXT, STEPS, STEP_TURNS = 192, 50, 12
TAP_PAIRS = {8: 10, 32: 10}


def main() -> None:
    """Each part writes its claims as soon as it has them."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("parts", nargs="*", type=one_of(PARTS), default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    given = parser.parse_args()
    device = torch.accelerator.current_accelerator()
    if device is None:
        sys.exit("torch finds no accelerator here; on processors: bench.trainer, bench.tap")
    name = torch.get_device_module(device).get_device_name()
    bodies = {
        "trainer": lambda: trainer(device, name, given.profile),
        "fsdp": lambda: fsdp(device),
        "step": lambda: steps(device),
        "tap": lambda: taps(device),
    }
    for part in given.parts:
        claims = bodies[part]()
        write("device", claims, keep=True, extra={"device": name})
        show(f"{part} on {name}", claims)


# --- the trainer ---


def trainer(device: torch.device, name: str, profiled: bool) -> list[Claim]:
    """Trained tokens a second of the loop that a job runs, and the operations that its matrix products take of the device's peak."""
    frozen = Frozen(
        (0.02 * torch.randn(LARGE.vocab, LARGE.hidden, device=device)).bfloat16(),
        (0.02 * torch.randn(LARGE.draft_vocab, LARGE.hidden, device=device)).bfloat16(),
        torch.arange(LARGE.vocab, device=device).where(
            torch.arange(LARGE.vocab, device=device) < LARGE.draft_vocab, -1
        ),
    )
    runs = list(synthetic(60_000, LARGE.hidden, LARGE.vocab, device))
    reached = _matrix_rate(device)
    peak = next((value for known, value in PEAK.items() if name.startswith(known)), reached)
    claims = [Claim("device-matrix", "8192 x 8192 x 8192 matrix product in BF16", reached / 1e12, "TFLOP/s")]
    for tokens in PACKS:
        options = options_for(
            Recipe.COLD,
            {"batch_tokens": tokens, "passes": 1000, "device": str(device), "patience": 1000},
        )
        with _attention(flash.available):
            claims += _rates(runs, frozen, options, peak)
        if tokens == PACKS[0]:
            if profiled:
                _profile(runs, frozen, options)
            with _attention(lambda *_: False):
                plain = _loop(runs, frozen, options, MEASURED_S)
            rate = plain.at.tokens / plain.at.elapsed_s
            what = f"the same in steps of {tokens} tokens, its attention without flash kernels"
            claims.append(Claim(f"device-plain-{tokens}", what, rate, "tokens/s"))
    best = max(float(claim.value or 0) for claim in claims if claim.id.startswith("device-mfu"))
    what = f"the best of these, of {peak / 1e12:.0f} TFLOP/s"
    return [*claims, at_least("device-mfu", what, best, UTILISATION)]


def _rates(runs: Sequence[Run], frozen: Frozen, options: TrainOptions, peak: float) -> list[Claim]:
    tokens = options.batch_tokens
    _loop(runs, frozen, options, WARM_UP_S)
    operations, candidates = operations_of(runs, frozen, options)
    torch.get_device_module(options.device).reset_peak_memory_stats()
    loop = _loop(runs, frozen, options, MEASURED_S)
    rate = loop.at.tokens / loop.at.elapsed_s
    memory = torch.get_device_module(options.device).max_memory_allocated() / 2**30
    what = f"trained tokens a second at hidden {LARGE.hidden}, {options.unroll_steps} passes, steps of {tokens} tokens"
    return [
        Claim(f"device-rate-{tokens}", what, rate, "tokens/s"),
        Claim(
            f"device-mfu-{tokens}",
            "its matrix products' share of the peak, attention left out",
            rate * operations / peak,
        ),
        Claim(
            f"device-operations-{tokens}",
            f"operations a token ({candidates} tokens in the softmax)",
            operations / 1e9,
            "GFLOP",
        ),
        Claim(f"device-memory-{tokens}", "peak memory", memory, "GiB"),
    ]


def _loop(runs: Sequence[Run], frozen: Frozen, options: TrainOptions, budget_s: float) -> Loop:
    """A training of a new draft, ended by its budget. What it waits for samples is in its time."""
    draft = _new_draft(options.device)
    loop = Loop(draft, frozen, options, runs, [], [], 4, lambda _: None, Path("not-written"), "")
    loop.run(budget_s)
    return loop


def _new_draft(device: str) -> Eagle3:
    torch.manual_seed(0)
    with torch.device(device):
        draft = Eagle3(LARGE)
    for parameter in draft.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return draft


def operations_of(runs: Sequence[Run], frozen: Frozen, options: TrainOptions) -> tuple[float, int]:
    """Operations a trained token of all matrix products of a forward and its backward but attention's, as torch counts them; and how
    many tokens the softmax runs over."""
    sampler = CandidateSampler(runs, frozen, options.negatives)
    objective = Objective(_new_draft(options.device), frozen, options, sampler.seen)
    candidates = sampler.draw(0)
    total = tokens = 0
    for batch in islice(Order(runs, [], options).batches(0), 2):
        batch.receive()
        # torch does not know flash kernels whose queries share keys; the plain attention's products are left out below.
        with _attention(lambda *_: False), FlopCounterMode(display=False) as counter:
            objective(batch.packs[0][0], candidates).backward()
        counts = counter.get_flop_counts()["Global"]
        total += sum(count for operator, count in counts.items() if str(operator) in ("aten.mm", "aten.addmm"))
        tokens += batch.tokens
    return total / tokens, len(candidates.ids)


def _profile(runs: Sequence[Run], frozen: Frozen, options: TrainOptions) -> None:
    """Print which kernels take a step's time."""
    sampler = CandidateSampler(runs, frozen, options.negatives)
    objective = Objective(_new_draft(options.device), frozen, options, sampler.seen)
    batches = list(islice(Order(runs, [], options).batches(0), 3))
    for turn, batch in enumerate(batches):
        batch.receive()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            began = time.perf_counter()
            objective(batch.packs[0][0], sampler.draw(turn)).backward()
            torch.accelerator.synchronize()
            seconds = time.perf_counter() - began
        if turn == len(batches) - 1:
            print(f"a step of {batch.tokens} tokens: {1000 * seconds:.1f} ms")
            print(found.key_averages().table(sort_by="self_device_time_total", row_limit=28, max_name_column_width=70))


def _matrix_rate(device: torch.device) -> float:
    """Operations a second, the median of ten products of random matrices."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    seconds = list[float]()
    for _ in range(13):
        torch.accelerator.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * 8192**3 / median(seconds[3:])


def synthetic(tokens: int, hidden: int, vocab: int, device: torch.device) -> Iterator[Run]:
    """Runs with `tokens` rows in all: random states, and ids as rare as ranks in a language are."""
    rng = np.random.default_rng(0)
    made = 0
    while made < tokens:
        prompt, answer = int(rng.integers(*PROMPTS)), int(rng.integers(*ANSWERS))
        rows = prompt + answer - 1
        states = torch.randn(rows, 4, hidden, device=device).bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
        ids = np.minimum(rng.zipf(1.2, rows + 1), vocab) - 1
        yield Run(states, ids, 0, prompt, rng.bytes(16))
        made += rows


@contextmanager
def _attention(available: Any) -> Generator[None]:
    """With or without flash kernels."""
    before, flash.available = flash.available, available
    try:
        yield
    finally:
        flash.available = before


# --- FSDP2 on one device ---


def fsdp(device: torch.device) -> list[Claim]:
    """The same job by torchrun, its parameters sharded over one process, and without: the same losses."""
    model = target(device)
    shard = WORK / "shard.safetensors"
    if not shard.exists():
        write_shard(shard, [_answer(run) for run in synthetic(24_000, LARGE.hidden, VOCAB, device)])
    draft = WORK / "draft"
    if not draft.exists():
        init.init_draft(model, draft, 16_384)
    spec = {
        "target_dir": str(model),
        "draft_dir": str(draft),
        "shards": [str(shard)],
        "budget_s": 600.0,
        "options": {
            "device": device.type,
            "batch_tokens": 1024,
            "passes": 1,
            "validation_share": 0.0,
            "learning_rate": 1e-4,  # of random samples nothing can be learned: at a large rate rounding decides
        },
    }
    (WORK / "job.json").write_text(json.dumps(spec))
    runner = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    alone, sharded = (_losses(WORK / name, how) for name, how in (("alone", ()), ("sharded", runner)))
    apart = max(abs(a - b) / a for a, b in zip(alone, sharded, strict=True))
    fallen = alone[-1] / alone[0]
    return [
        at_most(
            "device-fsdp",
            f"losses of {len(alone)} steps by torchrun and FSDP2, from those without, at most",
            apart,
            0.01,
        ),
        Claim("device-fsdp-loss", "the last loss over the first", fallen),
    ]


def _losses(out: Path, runner: Sequence[str]) -> list[float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, *runner, "-m", "tided.training", "train", str(WORK / "job.json"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    losses: list[float] = json.loads((out / "report.json").read_text())["losses"]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses of {out}: {losses}")
    return losses


def _answer(run: Run) -> Answer:
    states = torch.from_numpy(run.states.view(np.int16)).view(torch.bfloat16)
    return Answer(run.ids.tolist(), run.prompt_tokens, states)


def target(device: torch.device) -> Path:
    """A directory with a Llama of random weights and the small model's tokenizer, made once."""
    path = WORK / "target"
    if (path / "config.json").exists():
        return path
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=LARGE.hidden,
        intermediate_size=LARGE.intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=LARGE.heads,
        num_key_value_heads=LARGE.kv_heads,
        max_position_embeddings=LARGE.max_position,
        rms_norm_eps=LARGE.rms_eps,
        tie_word_embeddings=False,
    )
    path.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copy(Path("build/models/smollm2") / name, path)
    with torch.device(device):
        made: Any = LlamaForCausalLM(config)
        made.to(torch.bfloat16).save_pretrained(path)
    return path


# --- the tap ---


def taps(device: torch.device) -> list[Claim]:
    """`bench.tap` on the device: the embedded engine as a server. Its steps are launched kernel by kernel from Python, whose lock the
    publisher wants as well."""
    claims = asyncio.run(tap.measure(target(device), TAP_PAIRS, device.type))
    return [replace(claim, id=f"device-{claim.id}") for claim in claims]


def steps(device: torch.device) -> list[Claim]:
    """Decode steps as vLLM and SGLang run them, a graph of kernels and one wait for the tokens, with and without a tap."""
    served = Target(
        target(device), dtype=torch.bfloat16, device=device.type, max_batch=max(STEP_BATCHES), max_context=2 * CONTEXT
    )
    return asyncio.run(_with_taps(served))


async def _with_taps(served: Target) -> list[Claim]:
    claims = list[Claim]()
    with tempfile.TemporaryDirectory(prefix="tided-device-") as directory:
        valkey = EmbeddedValkey(Path(directory), 1 << 30)
        await valkey.start()
        try:
            for batch in STEP_BATCHES:
                claims += _measured(served, batch, valkey.url)
        finally:
            await valkey.stop()
    return claims


def _measured(served: Target, batch: int, url: str) -> list[Claim]:
    step = _Step(served, batch)
    taps = {name: _Tapped(served, url, name, pinned) for name, pinned in (("side", True), ("waits", False))}
    found: dict[str, list[float]] = {"none": [], **{name: [] for name in taps}}
    for turn in range(STEP_TURNS + 1):
        for name in list(found) if turn % 2 else list(found)[::-1]:
            seconds = step.turn(taps.get(name))
            if turn:
                found[name].append(seconds)
    return costs_of(batch, found, sum(tapped.close() for tapped in taps.values()))


def costs_of(batch: int, found: dict[str, list[float]], shed: int) -> list[Claim]:
    step_ms = 1000 * median(found["none"]) / STEPS
    claims = [
        Claim(
            f"device-step-{batch}", f"a decode step of {batch} requests, {LAYERS} layers, without a tap", step_ms, "ms"
        )
    ]
    for name, what in (
        ("side", "lost by the tap"),
        ("waits", "the same with a ring that is not pinned: each copy is waited for"),
    ):
        ratio = paired_ratio(found["none"], found[name])
        lost = 100 * (1 - ratio.median)
        words = f"steps/s of {batch} requests {what} (95% {100 * (1 - ratio.high):.1f}..{100 * (1 - ratio.low):.1f})"
        id = f"device-tap-{name}-{batch}"
        claims.append(at_most(id, words, lost, 2.0, "%") if name == "side" else Claim(id, words, lost, "%"))
    return [*claims, at_most(f"device-tap-shed-{batch}", "rows shed meanwhile", shed, 0)]


class _Step:
    """One decode step of `batch` requests as a graph that is replayed: always the same position, always one token each."""

    def __init__(self, served: Target, batch: int) -> None:
        starts = [CONTEXT] * batch
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=served.device)
        at = embedded.place(served.cache, 0, starts, 1, served.groups, served.dtype)
        self._read = ids, at  # a graph does not keep what it reads
        self._graph = torch.cuda.CUDAGraph()
        before, embedded.place = (
            embedded.place,
            lambda *_: at,
        )  # positions come from the host: none of it is part of a graph
        try:
            for _ in range(3):
                served.logits(served.forward(ids, 0, starts)[:, :, -1])
            torch.accelerator.synchronize()
            with torch.inference_mode(), torch.cuda.graph(self._graph):
                self._states = served.forward(ids, 0, starts)
                self._best = served.logits(self._states[:, :, -1]).argmax(-1)
        finally:
            embedded.place = before

    def turn(self, tapped: "_Tapped | None") -> float:
        """Seconds of `STEPS` steps."""
        began = time.perf_counter()
        for step in range(STEPS):
            self._graph.replay()
            tokens = self._best.flatten().tolist()
            if tapped is not None:
                tapped.record(step, tokens, self._states)
        return time.perf_counter() - began


class _Tapped:
    """A tap with its publisher, and a process that takes from the stream what is published."""

    def __init__(self, served: Target, url: str, name: str, pinned: bool) -> None:
        settings = TapSettings(
            name, "run", served.info.digest, 4, served.hidden, "bfloat16", has_last=True, ring_slots=256
        )
        self._tap = Tap(settings, pinned=pinned)
        self._tap.set_capture(True, 1 << 30)
        self._publisher = Publisher(url, self._tap)
        self._publisher.start()
        self._drain = subprocess.Popen([sys.executable, "-c", DRAIN, url, keys.samples(name), keys.credit(name)])

    def record(self, step: int, tokens: Sequence[int], states: torch.Tensor) -> None:
        rows = kept(states).flatten(0, 1)
        names = [f"r{i}" for i in range(len(tokens))]
        if not step:
            for name in names:
                self._tap.begin(name, [0] * CONTEXT, False)
        self._tap.record([(name, CONTEXT + step, 1) for name in names], tokens, rows)
        if step == STEPS - 1:
            for name in names:
                self._tap.end(name, "length", [])

    def close(self) -> int:
        """How many rows it shed."""
        shed = self._tap.totals().shed
        self._publisher.close(10.0)
        self._drain.kill()
        self._drain.wait()
        return shed


DRAIN = """
import sys, redis
client, stream, credit, last = redis.Redis.from_url(sys.argv[1]), sys.argv[2], sys.argv[3], "0"
while True:
    for _, entries in client.xread({stream: last}, count=32, block=1000) or ():
        last = entries[-1][0]
        client.xdel(stream, *(name for name, _ in entries))
        client.decrby(credit, sum(len(value) for _, fields in entries for value in fields.values()))
"""


if __name__ == "__main__":
    main()
