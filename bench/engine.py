"""The embedded engine without speculation against transformers' own generate(), at batch 1 and 8, on one core.

    python -m bench.engine --model build/models/smollm2

Both serve the same prompts, greedily, to the same number of tokens, with the same weights in bf16 and one thread; turns are
interleaved (ours, theirs, theirs, ours), and the claim is the median over pairs of turns. Prefill is part of a turn.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.model import DEFAULT
from bench.report import Claim, at_least, paired_ratio, publish
from tided.engine.embedded.scheduler import Output, Request, Scheduler
from tided.engine.embedded.target import Target

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences why the sky is blue.",
    "Traduis en français : the weather is fine today and we walk to the sea.",
    "A train leaves at nine and drives 210 km at 70 km/h. When does it arrive?",
    "List five things to check before a long journey by bicycle.",
    "Summarise the story of Romeo and Juliet for a child of ten years.",
    "Write a SQL query that counts the orders of each customer.",
    "What is the difference between a process and a thread?",
)


def ours(scheduler: Scheduler, prompts: list[list[int]], tokens: int) -> float:
    """Tokens/s of one turn."""
    left = len(prompts)

    def emit(output: Output) -> None:
        nonlocal left
        left -= bool(output.finish)

    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        scheduler.submit(Request(f"r{i}", tuple(prompt), tokens, emit, ignore_eos=True))
    while left:
        scheduler.step()
    return len(prompts) * tokens / (time.perf_counter() - started)


def theirs(model: torch.nn.Module, prompts: list[list[int]], tokens: int, pad: int) -> float:
    """Tokens/s of one turn; shorter prompts are padded on the left, as generate() wants it."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return len(prompts) * tokens / (time.perf_counter() - started)


def compare(path: Path, batch: int, pairs: int, tokens: int, engine: Scheduler, model: torch.nn.Module) -> list[Claim]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts: list[list[int]] = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in PROMPTS[:batch]
    ]
    pad = tokenizer.pad_token_id or 0
    ours(engine, prompts, 4)
    theirs(model, prompts, 4, pad)
    mine: list[float] = []
    others: list[float] = []
    for pair in range(pairs):
        for first in (True, False) if pair % 2 == 0 else (False, True):
            if first:
                mine.append(ours(engine, prompts, tokens))
            else:
                others.append(theirs(model, prompts, tokens, pad))
    ratio = paired_ratio(mine, others)
    what = f"engine without speculation / transformers generate(), tokens/s, batch {batch}, bf16, 1 thread"
    what += f" (95% {ratio.low:.2f}..{ratio.high:.2f})"
    return [
        at_least(
            f"engine_to_generate_batch_{batch}",
            what,
            ratio.median,
            1.0,
            "x",
            [a / b for a, b in zip(mine, others, strict=True)],
        ),
        Claim(
            f"engine_tokens_s_batch_{batch}", f"engine, batch {batch}", sorted(mine)[pairs // 2], "tokens/s", runs=mine
        ),
        Claim(
            f"generate_tokens_s_batch_{batch}",
            f"generate(), batch {batch}",
            sorted(others)[pairs // 2],
            "tokens/s",
            runs=others,
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench.engine", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    engine = Scheduler(Target(args.model, dtype=torch.bfloat16, max_batch=8, max_context=512, gamma_max=0))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    claims: list[Claim] = []
    for batch in (1, 8):
        claims += compare(args.model, batch, args.pairs, args.tokens, engine, model)
    publish("engine", claims)


if __name__ == "__main__":
    main()
