"""What is in stock to train on and to judge by, and what stays as replay when a training has used its shards up.

Each domain of a target has its own reserve, so that a new one does not push the others' samples out: what is trained on next replays
them, and forgets nothing.
"""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import anyio.to_thread

from tided.services.context import Context
from tided.store.samples import Shard, Split

STATE = "reserve"
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
class Newest:
    """Shards of the newest requests, and how many tokens of each can be scored, on average."""

    shards: tuple[str, ...]
    tokens_per_request: float


@dataclass(frozen=True, slots=True)
class Reserve:
    """File names of shards of one domain that were trained on and are kept. Domain 0: there is no pool of drafts."""

    domain: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    reserves: tuple[Reserve, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for reserve in self.reserves for name in reserve.names)

    def of(self, domain: int) -> tuple[str, ...]:
        return next((reserve.names for reserve in self.reserves if reserve.domain == domain), ())


class Stockroom:
    """Counts shards, at most once a second for each target (by digest): those of all its engines."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cached: dict[str, tuple[float, tuple[int, int], Stock]] = {}

    async def stock(self, target: str, since_ms: int, domain: int = 0) -> Stock:
        """What there is of a target, since `since_ms`; the reserves of other domains than `domain` are the first to be replayed.

        Raises `Unavailable`.
        """
        now_s, about = time.monotonic(), (since_ms, domain)
        cached = self._cached.get(target)
        if cached is not None and now_s - cached[0] < FRESH_S and cached[1] == about:
            return cached[2]
        replay = await self.replay(target)
        stock = await anyio.to_thread.run_sync(self._count, target, since_ms, replay, domain)
        self._cached[target] = (now_s, about, stock)
        return stock

    async def replay(self, target: str) -> Replay:
        """What is kept of each domain; some of it may have expired."""
        return await self._context.state.get(Replay, STATE, target) or Replay()

    async def reserved(self, target: str) -> dict[int, int]:
        """Rows that are kept of each domain."""
        replay = await self.replay(target)
        shards = await anyio.to_thread.run_sync(self._context.samples.shards, Split.TRAIN, target)
        rows = {shard.path.name: shard.rows for shard in shards}
        return {reserve.domain: sum(rows.get(name, 0) for name in reserve.names) for reserve in replay.reserves}

    async def newest(self, target: str, since_ms: int, scored: int, requests: int, most: int) -> Newest | None:
        """The newest shards of both sides that were made since `since_ms`, up to about `most` scored rows; None while there are fewer
        than `scored`, or fewer requests than `requests`. What is that new was never trained on."""
        replay = await self.replay(target)
        shards = await anyio.to_thread.run_sync(self._since, target, since_ms, replay.names)
        chosen: list[Shard] = []
        rows = runs = 0
        for shard in shards:
            if rows >= max(scored, most) and runs >= requests:
                break
            chosen.append(shard)
            rows, runs = rows + shard.scored, runs + shard.runs
        return Newest(_paths(chosen), rows / runs) if rows >= scored and runs >= requests else None

    async def retire(self, target: str, trained: tuple[str, ...], domain: int, domains: Collection[int]) -> None:
        """Shards were trained on in `domain`: keep a bounded part of them and of its reserve, consume the rest, and the reserves of all
        that are none of `domains`. Safe to repeat."""
        context = self._context
        before = await self.replay(target)
        after, gone = await anyio.to_thread.run_sync(self._split, target, trained, before, domain, frozenset(domains))
        await context.state.put(STATE, target, after, context.leadership.require())
        await anyio.to_thread.run_sync(context.samples.consume, gone)
        self._cached.pop(target, None)

    def _count(self, target: str, since_ms: int, replay: Replay, domain: int) -> Stock:
        store, config = self._context.samples, self._context.config
        train = store.shards(Split.TRAIN, target)
        fresh = [shard for shard in train if shard.created_ms >= since_ms and shard.path.name not in replay.names]
        fresh_rows = sum(shard.rows for shard in fresh)
        names = {shard.path.name for shard in fresh}
        fraction = self._context.training_for(target).replay_fraction
        old = [shard for shard in train if shard.path.name not in names]
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
            replay=_paths(_replayed(old, replay, domain, fraction / (1.0 - fraction) * fresh_rows)),
            held_out=_paths(held_out),
            fresh_rows=fresh_rows,
            held_out_scored=scored,
            held_out_runs=runs,
            judgeable=scored >= config.gate.min_tokens and runs >= config.gate.min_requests,
        )

    def _since(self, target: str, since_ms: int, but: frozenset[str]) -> list[Shard]:
        found = [
            shard for split in (Split.TRAIN, Split.HELD_OUT) for shard in self._context.samples.shards(split, target)
        ]
        new = [shard for shard in found if shard.created_ms >= since_ms and shard.path.name not in but]
        return _by_age(new)

    def _split(
        self, target: str, trained: tuple[str, ...], before: Replay, domain: int, domains: frozenset[int]
    ) -> tuple[Replay, list[str]]:
        """(reserves, paths to consume): half of the domain's budget for what was just trained on, half for what was kept before."""
        rows, size = self._budget(target)
        by_name = {s.path.name: s for s in self._context.samples.shards(Split.TRAIN, target)}
        just = [by_name[name] for name in (path.rsplit("/", 1)[-1] for path in trained) if name in by_name]
        older = [by_name[name] for name in before.of(domain) if name in by_name and by_name[name] not in just]
        # A small old part leaves its room to the new one, not the other way round: the new regime is what is served.
        kept_old = _newest(older, rows / 2, size / 2)
        kept_new = _newest(just, rows - sum(s.rows for s in kept_old), size - sum(s.bytes for s in kept_old))
        kept = frozenset(shard.path.name for shard in (*kept_old, *kept_new))
        others = tuple(
            Reserve(reserve.domain, tuple(name for name in reserve.names if name in by_name))
            for reserve in before.reserves
            if reserve.domain in domains and reserve.domain != domain
        )
        after = Replay((*others, Reserve(domain, tuple(sorted(kept)))))
        leaving = before.names | {shard.path.name for shard in just}
        return after, [str(by_name[name].path) for name in sorted(leaving - after.names) if name in by_name]

    def _budget(self, target: str) -> tuple[float, float]:
        """(rows, bytes) of one domain's reserve: no more than a training replays, and no more than its share of the disk."""
        settings, config = self._context.training_for(target), self._context.config
        rows = settings.replay_fraction / (1.0 - settings.replay_fraction) * settings.min_rows
        return rows, config.pool.reserve_share * config.samples.max_bytes / config.pool.size


def _replayed(old: list[Shard], replay: Replay, domain: int, rows: float) -> list[Shard]:
    """The reserves of other domains, as much of each, then whatever else is old, newest first: whole shards until they hold `rows`. A
    trainer draws no more than its share from them."""
    by_name = {shard.path.name: shard for shard in old}
    others = [
        [by_name[name] for name in reserve.names if name in by_name]
        for reserve in replay.reserves
        if reserve.domain != domain
    ]
    chosen: list[Shard] = []
    shares = [shards for shards in others if shards]
    for left, shards in zip(range(len(shares), 0, -1), sorted(shares, key=_rows), strict=True):
        chosen += _until(shards, (rows - _rows(chosen)) / left)
    return [*chosen, *_until([shard for shard in old if shard not in chosen], rows - _rows(chosen))]


def _until(shards: Iterable[Shard], rows: float) -> list[Shard]:
    """The newest shards, until they hold `rows`."""
    chosen: list[Shard] = []
    for shard in _by_age(shards):
        if _rows(chosen) >= rows:
            break
        chosen.append(shard)
    return chosen


def _newest(shards: Iterable[Shard], rows: float, size: float) -> list[Shard]:
    """The newest shards that fit into `rows` and `size` bytes together."""
    chosen: list[Shard] = []
    for shard in _by_age(shards):
        if shard.rows <= rows and shard.bytes <= size:
            rows, size = rows - shard.rows, size - shard.bytes
            chosen.append(shard)
    return chosen


def _by_age(shards: Iterable[Shard]) -> list[Shard]:
    """Newest first."""
    return sorted(shards, key=lambda shard: shard.created_ms, reverse=True)


def _rows(shards: Iterable[Shard]) -> int:
    return sum(shard.rows for shard in shards)


def _paths(shards: Iterable[Shard]) -> tuple[str, ...]:
    return tuple(str(shard.path) for shard in shards)
