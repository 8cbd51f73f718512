"""What is in stock to train on and to judge by, and what stays as replay when a training has used its shards up."""

import time
from dataclasses import dataclass

import anyio.to_thread

from tided.services.context import Context
from tided.store.samples import Shard, Split

STATE = "replay"
HELD_OUT_SHARE = 4
"""Held-out shards are given to a job, newest first, until they hold so many times what the gate needs."""
FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Stock:
    """Paths of shards. `fresh` was never trained on and is of the present regime; `judgeable`: held-out suffices for the gate."""

    fresh: tuple[str, ...]
    replay: tuple[str, ...]
    held_out: tuple[str, ...]
    fresh_rows: int
    held_out_scored: int
    held_out_runs: int
    judgeable: bool


@dataclass(frozen=True, slots=True)
class Replay:
    """File names of shards that were trained on and are kept."""

    names: tuple[str, ...] = ()


class Stockroom:
    """Counts shards, at most once a second for each target (by digest): those of all its engines."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cached: dict[str, tuple[float, int, Stock]] = {}

    async def stock(self, target: str, since_ms: int) -> Stock:
        """What there is of a target, since `since_ms`. Raises `Unavailable`."""
        now_s = time.monotonic()
        cached = self._cached.get(target)
        if cached is not None and now_s - cached[0] < FRESH_S and cached[1] == since_ms:
            return cached[2]
        replay = await self._context.state.get(Replay, STATE, target) or Replay()
        stock = await anyio.to_thread.run_sync(self._count, target, since_ms, frozenset(replay.names))
        self._cached[target] = (now_s, since_ms, stock)
        return stock

    async def retire(self, target: str, trained: tuple[str, ...]) -> None:
        """Shards were trained on: keep a bounded part of them and of the replay before, consume the rest. Safe to repeat."""
        context = self._context
        before = await context.state.get(Replay, STATE, target) or Replay()
        names, gone = await anyio.to_thread.run_sync(self._split, target, trained, before.names)
        await context.state.put(STATE, target, Replay(names), context.leadership.require())
        await anyio.to_thread.run_sync(context.samples.consume, gone)
        self._cached.pop(target, None)

    def _count(self, target: str, since_ms: int, replay_names: frozenset[str]) -> Stock:
        store, config = self._context.samples, self._context.config
        train = store.shards(Split.TRAIN, target)
        fresh = [shard for shard in train if shard.created_ms >= since_ms and shard.path.name not in replay_names]
        fresh_rows = sum(shard.rows for shard in fresh)
        names = {shard.path.name for shard in fresh}
        fraction = self._context.training_for(target).replay_fraction
        replay = _newest(
            [shard for shard in train if shard.path.name not in names], fraction / (1.0 - fraction) * fresh_rows
        )
        newest = [s for s in store.shards(Split.HELD_OUT, target) if s.created_ms >= since_ms]
        held_out: list[Shard] = []
        scored = runs = 0
        for shard in reversed(newest):
            if scored >= HELD_OUT_SHARE * config.gate.min_tokens and runs >= HELD_OUT_SHARE * config.gate.min_requests:
                break
            held_out.append(shard)
            scored, runs = scored + shard.scored, runs + shard.runs
        return Stock(
            fresh=_paths(fresh),
            replay=_paths(replay),
            held_out=_paths(held_out),
            fresh_rows=fresh_rows,
            held_out_scored=scored,
            held_out_runs=runs,
            judgeable=scored >= config.gate.min_tokens and runs >= config.gate.min_requests,
        )

    def _split(
        self, target: str, trained: tuple[str, ...], kept_before: tuple[str, ...]
    ) -> tuple[tuple[str, ...], list[str]]:
        """(names to keep, paths to consume): half of the budget for what was just trained on, half for what was kept before."""
        settings = self._context.training_for(target)
        budget = settings.replay_fraction / (1.0 - settings.replay_fraction) * settings.min_rows
        by_name = {s.path.name: s for s in self._context.samples.shards(Split.TRAIN, target)}
        just = [by_name[name] for name in (path.rsplit("/", 1)[-1] for path in trained) if name in by_name]
        older = [by_name[name] for name in kept_before if name in by_name and by_name[name] not in just]
        # A small old part leaves its room to the new one, not the other way round: the new regime is what is served.
        kept_old = _newest(older, budget / 2)
        kept_new = _newest(just, budget - sum(shard.rows for shard in kept_old))
        kept = {shard.path.name for shard in (*kept_old, *kept_new)}
        return tuple(sorted(kept)), [str(s.path) for s in (*just, *older) if s.path.name not in kept]


def _newest(shards: list[Shard], rows: float) -> list[Shard]:
    """The newest shards that fit into `rows` together, newest first."""
    chosen: list[Shard] = []
    for shard in sorted(shards, key=lambda shard: shard.created_ms, reverse=True):
        if shard.rows > rows:
            break
        rows -= shard.rows
        chosen.append(shard)
    return chosen


def _paths(shards: list[Shard]) -> tuple[str, ...]:
    return tuple(str(shard.path) for shard in shards)
