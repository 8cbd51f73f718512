"""The order in which samples are trained on, as batches: the packs of one optimizer step, made ahead by a thread of their own.

The order follows from the samples and the options alone, and a batch is known by its number. So training goes on at any step, and
every process of several finds its share of a batch, with nothing stored or sent. To a device its samples go on a stream of their own,
beside what is computed there.
"""

import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from tided.training.data import Pack, Piece, Run, equal_pieces, mix, pack
from tided.training.options import TrainOptions

T = TypeVar("T")
AHEAD = 2
"""Batches that are ready or being made while one is trained on."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's samples: `packs` are this process's, with each one's share of the batch's tokens; `tokens` are those of all.

    All processes have equally many packs, for they step through them together: one that has too few repeats a pack, with share 0.
    `sent`: on a device, the event behind which they are there.
    """

    packs: tuple[tuple[Pack, float], ...]
    tokens: int
    sent: torch.Event | None = None

    def receive(self) -> None:
        """Have the current stream wait until the packs are there; their memory is its own from now on."""
        if self.sent is None:
            return
        stream = torch.accelerator.current_stream()
        stream.wait_event(self.sent)
        for one, _ in self.packs:
            for tensor in one.tensors:
                tensor.record_stream(stream)


@dataclass(frozen=True, slots=True)
class Order:
    """All passes over the samples, as process `rank` of `ranks` goes through them."""

    fresh: Sequence[Run]
    replay: Sequence[Run]
    options: TrainOptions
    rank: int = 0
    ranks: int = 1

    def batches(self, first: int) -> Iterator[Batch]:
        """From batch `first` on; the packs of earlier ones are not made."""
        stream = torch.Stream(self.options.device) if torch.device(self.options.device).type != "cpu" else None
        on_stream: AbstractContextManager[Any] = stream if stream is not None else nullcontext()
        for packs in islice(self._pieces(), first, None):
            counts = [sum(len(piece.queries) for piece in pieces) for pieces in packs]
            mine = [(i, counts[i] / sum(counts)) for i in range(self.rank, len(packs), self.ranks)]
            mine += [(0, 0.0)] * (-(-len(packs) // self.ranks) - len(mine))
            with on_stream:
                made = tuple((pack(packs[i], self.options.device), share) for i, share in mine)
            yield Batch(made, sum(counts), stream.record_event() if stream is not None else None)

    def planned_tokens(self) -> float:
        """Of all passes."""
        fresh = sum(len(run.queries(0)) for run in self.fresh)
        spare = sum(len(run.queries(0)) for run in self.replay)
        share = self.options.replay_share
        return self.options.passes * (fresh + min(spare, fresh * share / (1 - share)))

    def _pieces(self) -> Iterator[list[list[Piece]]]:
        options = self.options
        for turn in range(options.passes):
            runs = mix(self.fresh, self.replay, options.replay_share, random.Random(f"{options.seed} {turn}"))
            packs = equal_pieces(runs, options.batch_tokens, options.pack_rows)
            while batch := list(islice(packs, options.packs)):
                yield batch


def prefetched(items: Iterator[T], ahead: int = AHEAD) -> Generator[T]:
    """`items`, made by a thread that is at most `ahead` of them ahead: reading overlaps with what is done with them.

    What the thread raises is raised here. The thread ends with the generator: close it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item
