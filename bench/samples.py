"""Real samples for benches that need no engine: the small model's greedy answers and the states that a tap would give."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bench.traffic import DOMAINS, Prompt, Split
from tided.draft import target
from tided.draft.tensors import write_file
from tided.model.ids import prompt_group

_BATCH = 16


@dataclass(frozen=True)
class Answer:
    """One request: ids of prompt and answer, and states [len(ids) - 1, 4, hidden] as BF16."""

    ids: list[int]
    prompt_tokens: int
    states: torch.Tensor


def shards(model_dir: Path, domain: str, split: Split, requests: int, directory: Path) -> list[str]:
    """Paths of shards with the answers to the first `requests` prompts; made once, then found in `directory`."""
    path = directory / f"{domain}-{split}-{requests}.safetensors"
    if not path.exists():
        print(f"generating {requests} answers ({domain}, {split}), once", file=sys.stderr, flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        prompts = DOMAINS[domain].prompts(split)[:requests]
        write_shard(path, list(_answers(model_dir, prompts)))
    return [str(path)]


@torch.inference_mode()
def _answers(model_dir: Path, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    config = target.read_config(model_dir)
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        ids = [tokenizer.apply_chat_template(p.messages, add_generation_prompt=True, return_dict=False) for p in batch]
        yield from _generate(model, ids, batch[0].max_tokens, config)


def _generate(model: Any, prompts: list[list[int]], new_tokens: int, config: target.TargetConfig) -> list[Answer]:
    """Greedy answers of a left-padded batch, with the states of every row that was computed."""
    width = max(map(len, prompts))
    pad = [width - len(prompt) for prompt in prompts]
    fed = torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(pad, prompts, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    ids = [list(prompt) for prompt in prompts]
    states: list[list[torch.Tensor]] = [[] for _ in prompts]
    alive = [True] * len(prompts)
    for step in range(new_tokens):
        out = model.model(
            input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=cache, output_hidden_states=True
        )
        rows = torch.stack([*(out.hidden_states[k] for k in config.aux_layers), out.last_hidden_state], 2)
        best = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        for i, token in enumerate(best.tolist()):
            if alive[i]:
                states[i].append(rows[i, 0 if step else pad[i] :].clone())
                ids[i].append(token)
                alive[i] = token not in config.eos
        if not any(alive):
            break
        fed, positions = best.unsqueeze(1), mask.sum(1, keepdim=True)
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], 1)
    return [
        Answer(ids[i], len(prompt), torch.cat(parts))
        for i, (prompt, parts) in enumerate(zip(prompts, states, strict=True))
    ]


def write_shard(path: Path, answers: Sequence[Answer]) -> None:
    """A shard as a collector writes it."""
    groups = [prompt_group(np.array(a.ids[: a.prompt_tokens], "<i4").tobytes()) for a in answers]
    states = torch.cat([answer.states for answer in answers]).contiguous()
    write_file(
        path,
        {
            "states": states.view(torch.int16).numpy().view(np.uint16),
            "ids": np.concatenate([np.array(answer.ids, np.int32) for answer in answers]),
            "run_rows": np.array([len(answer.states) for answer in answers], np.int32),
            "run_ids": np.array([len(answer.ids) for answer in answers], np.int32),
            "first_position": np.zeros(len(answers), np.int32),
            "prompt_tokens": np.array([answer.prompt_tokens for answer in answers], np.int32),
            "groups": np.stack([np.frombuffer(group, np.uint8) for group in groups]),
        },
        {
            "schema": "1",
            "target": "",
            "engine": "bench",
            "has_last": "1",
            "created_ms": "0",
            "requests": json.dumps([f"r{i}" for i in range(len(answers))]),
        },
    )
