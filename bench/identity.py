"""Greedy identity in fp32: the same prompts with and without speculation must give the same tokens, ties aside.

A difference is a tie when, where the two answers part, the plain run's best two logits are at most `TIE_GAP` apart: then the order
in which floating-point sums were made decides, not the method. The gap is computed afterwards with transformers, over the prompt
and the part of the answer that both agree on.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.arms import Frozen
from bench.configs import free_port
from bench.load import Answer, each
from bench.shift_plan import Places, Plan
from bench.traffic import DOMAINS, Prompt
from tided.local import LocalStack, Service, split_cores

TIE_GAP = 1e-3


def prompts_of(plan: Plan) -> list[Prompt]:
    """The measurement prompts of the plan's domains, in turn."""
    domains = dict.fromkeys(phase.domain for phase in plan.phases)
    sources = [iter(DOMAINS[domain].prompts("measure", seed=1)) for domain in domains]
    mixed = (next(source) for source in itertools.cycle(sources))
    return [
        Prompt(p.domain, p.system, p.user, plan.identity_tokens, p.example)
        for p in itertools.islice(mixed, plan.identity_prompts)
    ]


async def compare(plan: Plan, places: Places, draft: Frozen) -> dict[str, Any]:
    """Runs one fp32 engine over all prompts, without and with `draft`, and counts the differences."""
    prompts, port = prompts_of(plan), free_port()
    cores, _ = split_cores(1)
    arguments = ["--model", str(places.model), "--draft", draft.path, "--dtype", "float32", "--port", str(port)]
    arguments += ["--gamma-max", str(plan.gamma_max), "--max-batch", str(plan.concurrency), "--no-profile"]
    arguments += ["--max-context", str(plan.max_context)]
    service = Service("identity", "tided.engine.embedded.server", tuple(arguments), cores)
    url = f"http://127.0.0.1:{port}"
    async with LocalStack(places.work / "logs", lambda line: print(line, flush=True)) as stack:
        await stack.start(service)
        plain = await _answers(url, 0, plan.concurrency, prompts)
        drafted = await _answers(url, plan.gamma_max, plan.concurrency, prompts)
    failed = [answer.error for answer in (*plain, *drafted) if answer.error]
    pairs = [(a, b) for a, b in zip(plain, drafted, strict=True) if not a.error and not b.error]
    different = [(a, b) for a, b in pairs if a.token_ids != b.token_ids]
    gaps = gaps_of(places.model, different)
    return {
        "compared": len(pairs),
        "tokens": sum(len(a.token_ids) for a, _ in pairs),
        "mismatches": sum(gap > TIE_GAP for gap in gaps),
        "ties": sum(gap <= TIE_GAP for gap in gaps),
        "gaps": gaps,
        "errors": failed,
        "version": draft.version,
        "accepted": sum(b.accepted for _, b in pairs),
    }


async def _answers(url: str, gamma: int, concurrency: int, prompts: Sequence[Prompt]) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        (await http.post("/admin/gammas", json={"gammas": [gamma]})).raise_for_status()
    load = await each(url, prompts, concurrency, token_ids=True)
    by_prompt = {answer.prompt: answer for answer in load.answers}
    return [by_prompt[prompt] for prompt in prompts]


def gaps_of(model_dir: Path, different: Sequence[tuple[Answer, Answer]]) -> list[float]:
    """For each pair of different answers to a prompt, the first one's top-2 logit gap where the answers part."""
    if not different:
        return []
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    gaps: list[float] = []
    for plain, drafted in different:
        text = tokenizer.apply_chat_template(plain.prompt.messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        shared = next(
            (i for i, (a, b) in enumerate(zip(plain.token_ids, drafted.token_ids, strict=False)) if a != b),
            min(len(plain.token_ids), len(drafted.token_ids)),
        )
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *plain.token_ids[:shared]]])).logits[0, -1]
        best = logits.topk(2).values
        gaps.append(float(best[0] - best[1]))
    return gaps
