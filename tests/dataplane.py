"""A producer and a look at the shards, for the tests of the data plane. Rows carry their own identity, so that a set of rows on
disk can be compared with the set that was sent: state value = token id, and (request, position) names the row."""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.device import DEVICE
from tided.draft.tensors import read_header, read_tensor_entry, to_float32
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.model.ids import prompt_group
from tided.store.samples import SampleStore, Split

TARGET = "ab" * 32
STATES, HIDDEN = 3, 8
CREDIT_BYTES = 64 << 20


def settings(incarnation: str = "i-1", *, engine: str = "e1", slots: int = 8, flush_s: float = 0.02) -> TapSettings:
    return TapSettings(engine, incarnation, TARGET, STATES, HIDDEN, ring_slots=slots, flush_s=flush_s)


def tokens_of(request: str, count: int) -> list[int]:
    """Token ids below 256, which bfloat16 holds exactly."""
    seed = int.from_bytes(request.encode()[-3:], "big")
    return [(seed + 7 * i) % 251 for i in range(count)]


@dataclass
class Producer:
    """A tap and its publisher on a real server. `sent` are the rows (request, position, token) that were recorded."""

    tap: Tap
    publisher: Publisher
    sent: set[tuple[str, int, int]] = field(default_factory=set[tuple[str, int, int]])
    ended: int = 0

    @classmethod
    def start(cls, url: str, incarnation: str = "i-1", *, engine: str = "e1", slots: int = 8) -> "Producer":
        tap = Tap(settings(incarnation, engine=engine, slots=slots))
        tap.set_capture(True, CREDIT_BYTES)
        publisher = Publisher(url, tap)
        publisher.start()
        return cls(tap, publisher)

    def request(self, name: str, prompt: int = 5, rows: int = 12, step: int = 4) -> None:
        """One whole request: `rows` rows in records of `step`, of which the first `prompt` are its prompt; two tokens follow."""
        tokens = tokens_of(name, rows + 2)
        self.tap.begin(name, tokens[:prompt], False)
        for at in range(0, rows, step):
            self.rows(name, tokens, at, min(step, rows - at))
        self.tap.end(name, "stop", tokens[rows:])
        self.ended += 1

    def rows(self, name: str, tokens: list[int], at: int, count: int) -> None:
        ids = tokens[at : at + count]
        self.tap.record([(name, at, count)], ids, states_of(ids))
        self.sent |= {(name, at + i, token) for i, token in enumerate(ids)}

    def close(self) -> bool:
        return self.publisher.close(60.0)


def states_of(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.float32, device=DEVICE)[:, None, None].expand(-1, STATES, HIDDEN)


@contextmanager
def producing(url: str, incarnation: str = "i-1") -> Generator[Producer]:
    producer = Producer.start(url, incarnation)
    try:
        yield producer
    finally:
        producer.close()


def store_at(root: Path) -> SampleStore:
    return SampleStore(root, held_out_fraction=0.3, max_bytes=1 << 30, max_age_s=86400)


@dataclass(frozen=True)
class StoredRun:
    request: str
    first_position: int
    rows: int
    ids: tuple[int, ...]
    prompt_tokens: int
    held_out: bool


def stored_runs(root: Path) -> list[StoredRun]:
    """All runs that readers can see; checks on the way that states, ids and groups belong together."""
    found: list[StoredRun] = []
    for split in Split:
        for shard in store_at(root).shards(split):
            found += _runs_of(shard.path, split)
    return found


def _runs_of(path: Path, split: Split) -> list[StoredRun]:
    header = read_header(path)
    table = {name: np.asarray(read_tensor_entry(path, entry)) for name, entry in header.entries.items()}
    found: list[StoredRun] = []
    row = token = 0
    for i, request in enumerate(json.loads(header.metadata["requests"])):
        rows, count = int(table["run_rows"][i]), int(table["run_ids"][i])
        ids = [int(value) for value in table["ids"][token : token + count]]
        states = to_float32(table["states"][row : row + rows])
        assert (states == np.array(ids[:rows], dtype=np.float32)[:, None, None]).all()
        prompt = int(table["prompt_tokens"][i])
        group = prompt_group(np.array(tokens_of(request, prompt), dtype="<i4").tobytes())
        assert table["groups"][i].tobytes() == group
        first = int(table["first_position"][i])
        found.append(StoredRun(request, first, rows, tuple(ids), prompt, split is Split.HELD_OUT))
        row, token = row + rows, token + count
    assert row == len(table["states"])
    assert token == len(table["ids"])
    return found


def stored_rows(root: Path) -> list[tuple[str, int, int]]:
    """Every stored row as (request, position, token), with repetitions."""
    return [(run.request, run.first_position + i, run.ids[i]) for run in stored_runs(root) for i in range(run.rows)]


@contextmanager
def collector_process(
    url: str, root: Path, failpoint: str = "", config: str = ""
) -> Generator[subprocess.Popen[bytes]]:
    """A real tided-collector that writes shards at once. What it says is inherited, so that a failed test shows it."""
    path = root.parent / "collector.toml"
    path.write_text(config or "[samples]\nheld_out_fraction = 0.3\nshard_age_s = 0.05\n")
    command = [
        sys.executable,
        "-m",
        "tided.services.collector",
        "--config",
        str(path),
        "--redis",
        url,
        "--root",
        str(root),
    ]
    process = subprocess.Popen(command, env={**os.environ, "TIDED_FAILPOINT": failpoint})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
