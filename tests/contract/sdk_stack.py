"""A serving stack of its own kind, connected with tided.client: what the contract runs the SDK in. `python -m` it with its arguments.

One step is one forward of the target for each running request, over all of its tokens: slow, and easy to see through. Its draft is
only held, not run: it proposes the tokens that followed last time, which greedy verification then accepts or not. Requests come as JSON
lines on standard input, answers leave on standard output.
"""

import argparse
import json
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tided.client import DraftIdentity, LatencyProfile, Producer, Stack, Swapped, Unavailable, identify
from tided.draft import checkpoint
from tided.draft.target import TargetShape, describe, read_config

GAMMA_MAX = 3
MAX_BATCH = 4


@dataclass
class Running:
    id: str
    prompt: list[int]
    most: int
    ignore_eos: bool
    tokens: list[int] = field(default_factory=list[int])
    rows: int = 0  # tapped

    @property
    def all(self) -> list[int]:
        return self.prompt + self.tokens


class Server:
    """The step loop."""

    def __init__(self, redis_url: str, engine: str, target: Path, draft: Path, drafts_dir: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        info, self._eos = describe(target), read_config(target).eos
        self._layers, self._shape = info.aux_layers, TargetShape(info.hidden, info.vocab)
        self._weights = checkpoint.load(draft, self._shape)
        self._running: list[Running] = []
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._waiting: list[Running] = []
        self._exchange = threading.Lock()  # held by a step, and by a swap between two
        stack = Stack(
            engine=engine,
            target=info,
            max_batch=MAX_BATCH,
            dtype="float32",
            last_hidden=True,
            gamma_max=GAMMA_MAX,
            draft=identify(draft),
            report_interval_s=0.1,
        )
        self._producer = Producer(redis_url, stack, on_swap=self._swap, on_profile=self._measure, drafts_dir=drafts_dir)

    def serve(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        with self._producer:
            _say({"ready": True})
            while self._take():
                with self._exchange, torch.inference_mode():
                    self._step()
        _say({"errors": self._producer.errors})

    def _read(self) -> None:
        for line in sys.stdin:
            self._inbox.put(json.loads(line))
        self._inbox.put({"close": True})

    def _take(self) -> bool:
        """Everything that was asked; waits while nothing runs. False at the end."""
        while not self._inbox.empty() or not (self._running or self._waiting):
            asked = self._inbox.get()
            if "close" in asked:
                return False
            if "cancel" in asked:
                self._cancel(asked["cancel"])
                continue
            request = Running(asked["id"], asked["prompt"], asked["max_tokens"], asked["ignore_eos"])
            self._producer.begin(request.id, request.prompt, private=asked["private"], temperature=0.0)
            self._waiting.append(request)
        while self._waiting and len(self._running) < MAX_BATCH:
            self._running.append(self._waiting.pop(0))
        self._producer.queued(len(self._waiting))
        return True

    def _cancel(self, name: str) -> None:
        for request in [request for request in self._running + self._waiting if request.id == name]:
            self._finish(request, "abort")

    def _step(self) -> None:
        started_s = time.perf_counter()
        decoding = [request for request in self._running if request.tokens]
        gamma = self._producer.gamma(len(decoding)) if decoding else 0
        accepted = {request.id: self._verify(request, gamma) for request in decoding}
        for request in [request for request in self._running if not request.tokens]:
            self._verify(request, 0)
        if accepted:
            self._producer.step(gamma, accepted, time.perf_counter() - started_s)
        for request in list(self._running):
            stopped = not request.ignore_eos and request.tokens[-1] in self._eos
            if stopped or len(request.tokens) >= request.most:
                self._finish(request, "stop" if stopped else "length")

    def _verify(self, request: Running, gamma: int) -> int:
        """One forward over everything and the draft; keeps what greedy decoding would have said. Gives the accepted drafts."""
        known = request.all
        drafted = [known[(known.index(known[-1]) + 1 + i) % len(known)] for i in range(gamma)]
        output = self._model(torch.tensor([known + drafted]), output_hidden_states=True)
        best = output.logits[0, len(known) - 1 :].argmax(-1).tolist()
        right = next((i for i, token in enumerate(drafted) if token != best[i]), gamma)
        new = best[: right + 1][: request.most - len(request.tokens)]
        if not request.ignore_eos:
            end = next((i for i, token in enumerate(new) if token in self._eos), len(new) - 1)
            new = new[: end + 1]
        request.tokens += new
        states = torch.cat([output.hidden_states[k] for k in (*self._layers, -1)]).transpose(0, 1).contiguous().numpy()
        last = len(request.all) - 1
        rows = np.ascontiguousarray(states[request.rows : last])
        self._producer.record(request.id, request.rows, request.all[request.rows : last], rows)
        request.rows = last
        return right

    def _finish(self, request: Running, finish: str) -> None:
        (self._running if request in self._running else self._waiting).remove(request)
        self._producer.end(
            request.id,
            finish,
            output_tokens=len(request.tokens),
            tail=request.all[request.rows :] if request.rows else [],
        )
        _say({"id": request.id, "tokens": request.tokens})

    def _swap(self, path: Path, draft: DraftIdentity) -> Swapped:
        weights = checkpoint.load(path, self._shape)
        started_s = time.perf_counter()
        with self._exchange:
            self._weights = weights
        read_back = DraftIdentity(self._weights.version, self._weights.vocab_id)
        return Swapped(read_back, time.perf_counter() - started_s)

    def _measure(self) -> LatencyProfile:
        if self._running or self._waiting:
            raise Unavailable("this stack is serving")
        seconds: list[float] = []
        with self._exchange, torch.inference_mode():
            for tokens in (1, 8):
                started_s = time.perf_counter()
                self._model(torch.ones(1, tokens, dtype=torch.long))
                seconds.append(time.perf_counter() - started_s)
        return LatencyProfile((1, 8), tuple(seconds), (1,), (1e-6,))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--drafts-dir", type=Path, required=True)
    given = parser.parse_args()
    Server(given.redis, given.engine, given.target, given.draft, given.drafts_dir).serve()
