"""Records a trace of a live engine's traffic: `python -m bench.record ENGINE FILE`, while tided holds it at gamma_max.

Reads the engine's reports from Redis, and nothing else: no tokens, no text. `tidectl policy set gamma=N` before, `auto` after.
"""

import argparse
import asyncio
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from tided.config import Config, load
from tided.model.engines import EngineInfo, Observation
from tided.model.errors import NotFound, Refused, TideError
from tided.replay.record import recorded
from tided.replay.trace import SUFFIX, Trace, save
from tided.store.client import connect
from tided.store.engines import EngineStore

POLL_S = 0.5


async def record(redis_url: str, engine: str, meanwhile: Coroutine[Any, Any, None], name: str, about: str) -> Trace:
    """The trace of what `engine` serves while `meanwhile` runs. Raises `TideError`, and what `meanwhile` raises."""
    redis = connect(redis_url)
    task: asyncio.Task[None] | None = None
    try:
        store = EngineStore(redis)
        _, cursor = await store.observations(engine)
        reports: list[Observation] = []
        task = asyncio.create_task(meanwhile)
        ended = False
        while not ended:
            ended = bool((await asyncio.wait({task}, timeout=POLL_S))[0])
            found, cursor = await store.observations(engine, cursor)
            reports += found
        task.result()
        return recorded(name, about, await _info(store, engine), reports)
    finally:
        if task is not None:
            task.cancel()
        meanwhile.close()
        await redis.aclose()


async def _info(store: EngineStore, engine: str) -> EngineInfo:
    for info in await store.list():
        if info.engine == engine:
            return info
    raise NotFound(f"there is no engine {engine!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("file", type=Path, help=f"ends in {SUFFIX}")
    parser.add_argument("--config", type=Path, help="the file that names Redis; else the defaults")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--about", default="recorded", help="one line about the traffic")
    given = parser.parse_args(arguments)
    config = load(given.config) if given.config is not None else Config()
    try:
        if not given.file.name.endswith(SUFFIX):
            raise Refused(f"{given.file}: a trace's name ends in {SUFFIX}")
        name = given.file.name.removesuffix(SUFFIX)
        trace = asyncio.run(record(config.redis_url, given.engine, asyncio.sleep(given.seconds), name, given.about))
        save(trace, given.file)
    except TideError as exc:
        sys.exit(f"error: {exc}")
    print(
        f"{given.file}: {len(trace.at_s):,} steps in {trace.header.duration_s:.0f} s, {given.file.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
