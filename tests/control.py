"""The services of a leading tided in the test's own event loop, on a real Valkey, without the daemon around them."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.conftest import Valkey
from tests.shards import Sample, write_shard
from tests.support import eventually
from tided.config import Config, parse
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.model.drafts import Draft, DraftOrigin
from tided.model.events import Event
from tided.services.context import Context
from tided.services.controller import Controller
from tided.services.leadership import Leadership
from tided.services.plane import ControlPlane
from tided.store.client import connect
from tided.store.engines import EngineStore
from tided.store.lease import LeaderLease


@dataclass
class Control:
    """`cycle()` runs one control cycle; nothing runs by itself."""

    context: Context
    controller: Controller
    plane: ControlPlane
    lease: LeaderLease

    async def cycle(self) -> list[str]:
        return await self.controller.cycle()

    async def converge(self) -> None:
        """Cycle until a cycle has nothing to do."""

        async def nothing() -> bool:
            return await self.cycle() == []

        await eventually(nothing)

    async def events(self, *kinds: str) -> list[Event]:
        return [event for event in await self.context.events.read("0", 1000) if not kinds or event.kind in kinds]


def settings(root: Path, target: Path, /, **sections: dict[str, object]) -> Config:
    """A configuration with short times below `root`."""
    base: dict[str, dict[str, object]] = {
        "daemon": {"state_dir": str(root / "s"), "cycle_s": 0.1, "lease_ttl_s": 600.0, "start_collector": False},
        "target": {"path": str(target)},
        "self_test": {"enabled": False},
        "training": {"min_rows": 200, "cool_down_s": 0, "draft_vocab": 64, "short_window": 4, "long_window": 32},
        "gate": {"min_requests": 4, "min_tokens": 20},
        "deployment": {"swap_deadline_s": 120.0, "watch_requests": 5, "watch_s": 600.0, "canary_requests": 5},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return parse(base, "test")


@contextlib.asynccontextmanager
async def leading(valkey: Valkey, config: Config, name: str = "test") -> AsyncGenerator[Control]:
    """Services that lead."""
    redis = connect(valkey.url)
    engines = EngineStore(redis)
    lease = LeaderLease(redis, name, 600.0)
    context = Context.of(config, redis, Leadership(lease, engines, 600.0))
    controller = Controller(context)
    context.leadership.problem = ""
    assert await lease.acquire(max((info.epoch for info in await engines.list()), default=0)) is not None
    try:
        yield Control(context, controller, ControlPlane(controller), lease)
    finally:
        await lease.release()
        await redis.aclose()


def variant(draft: Path, to: Path, seed: int) -> Path:
    """Another valid checkpoint of the same shape and vocabulary: one norm differs."""
    loaded = checkpoint.load(draft)
    tensors = dict(loaded.tensors)
    norm = tensors["norm.weight"].copy()
    norm[: 1 + seed] ^= np.uint16(1)
    checkpoint.write(to, loaded.config, tensors | {"norm.weight": norm})
    return to


def store_draft(control: Control, directory: Path, target: Path, parent: str = "") -> Draft:
    """Put a checkpoint into the draft store."""
    return control.context.drafts.add(
        directory,
        lineage="tiny",
        parent=parent,
        origin=DraftOrigin.IMPORTED,
        target=describe(target),
        now_ms=1,
    )


def store_samples(config: Config, target: Path, engine: str, train: int, held_out: int, created_ms: int) -> None:
    """Shards on disk: so many requests of 25 rows on each side. Their content is never read by the daemon."""
    digest = describe(target).digest
    random = np.random.default_rng(created_ms)
    for split, count in (("train", train), ("held-out", held_out)):
        if not count:
            continue
        samples = [
            Sample(random.normal(size=(25, 4, 48)).astype(np.float32), random.integers(3, 90, 27), 5)
            for _ in range(count)
        ]
        write_shard(
            config.samples_dir / split / f"{split}-{created_ms:013d}.safetensors",
            samples,
            target=digest,
            engine=engine,
            created_ms=str(created_ms),
            scored=str(20 * count),
        )
