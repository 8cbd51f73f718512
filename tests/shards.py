"""Shards made in tests: real states of a tiny target, or random ones, in the format of docs/architecture.md."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.tiny import VOCAB, make_draft, make_target
from tided.draft.tensors import to_bf16, write_file
from tided.model.ids import prompt_group
from tided.model.jobs import JobKind, JobSpec


@dataclass(frozen=True)
class Sample:
    """One run from position 0: `states` float32 [rows, 3 or 4, hidden], `ids` up to two beyond the rows."""

    states: NDArray[np.float32]
    ids: NDArray[np.int64]
    prompt_tokens: int
    first_position: int = 0

    @property
    def group(self) -> bytes:
        prompt = self.ids[: max(1, self.prompt_tokens - self.first_position)]
        return prompt_group(prompt.astype("<i4").tobytes())


def write_shard(path: Path, samples: Sequence[Sample], **metadata: str) -> Path:
    """Write `samples` as one shard."""
    tensors: dict[str, NDArray[Any]] = {
        "states": to_bf16(np.concatenate([sample.states for sample in samples])),
        "ids": np.concatenate([sample.ids for sample in samples]).astype(np.int32),
        "run_rows": np.array([len(sample.states) for sample in samples], np.int32),
        "run_ids": np.array([len(sample.ids) for sample in samples], np.int32),
        "first_position": np.array([sample.first_position for sample in samples], np.int32),
        "prompt_tokens": np.array([sample.prompt_tokens for sample in samples], np.int32),
        "groups": np.stack([np.frombuffer(sample.group, np.uint8) for sample in samples]),
    }
    requests = json.dumps([f"r{i}" for i in range(len(samples))])
    defaults = {"schema": "1", "target": "", "engine": "test", "has_last": "1", "created_ms": "0", "requests": requests}
    defaults["since_ms"] = metadata.get("created_ms", "0")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, defaults | metadata)
    return path


@torch.inference_mode()
def greedy_samples(target_dir: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Sample]:
    """The target's greedy answers with the states that an engine would tap: rows of every token but the last one."""
    model = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers
    samples: list[Sample] = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        hidden = model.model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        states = torch.stack([hidden[k][0] for k in (2, layers // 2, layers - 3, layers)], 1).numpy()
        samples.append(Sample(states, np.array(ids, np.int64), len(prompt)))
    return samples


def prompts(count: int, vocab: int, length: int = 9, seed: int = 0) -> list[list[int]]:
    """Distinct random prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length + i % 3).tolist() for i in range(count)]


def train_spec(root: Path, **options: Any) -> JobSpec:
    """A train job on 24 prompts of a tiny target under `root`, 8 of them held out."""
    target = make_target(root / "target")
    samples = greedy_samples(target, prompts(24, VOCAB), 10)
    return JobSpec(
        kind=JobKind.TRAIN,
        engine="e",
        target="t",
        target_dir=str(target),
        draft_dir=str(make_draft(target, root / "draft", draft_vocab=64)),
        shards=(str(write_shard(root / "train" / "a.safetensors", samples[:16])),),
        held_out=(str(write_shard(root / "held-out" / "a.safetensors", samples[16:])),),
        budget_s=20.0,
        gamma=3,
        options={"batch_tokens": 32, "validation_share": 0.2, **options},
    )
