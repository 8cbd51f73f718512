"""What a swap costs the requests in flight: one engine under steady load, its draft exchanged every few seconds.

`python -m bench.swap` writes build/bench/swap.json. Two things are measured: how long the steps pause, as the engine says, and how
long a stream is silent, as its client sees it; loading and checking the new draft share the engine's core with its steps.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.configs import free_port
from bench.load import Load, Traffic, client, longest_gap
from bench.model import DEFAULT
from bench.report import Claim, at_most, publish
from bench.traffic import DOMAINS
from tided.draft import checkpoint
from tided.draft.init import init_draft
from tided.draft.tensors import to_bf16, to_float32
from tided.local import LocalStack, Service, split_cores

CONCURRENCY = 8
SWAPS = 20
EVERY_S = 2.0
WINDOW_S = 1.0
GAMMAS = [3]


def second_draft(first: Path, directory: Path) -> Path:
    """Another version of the same sizes: version 0 with its last norm scaled."""
    found = checkpoint.load(first)
    tensors = dict(found.tensors)
    tensors["norm.weight"] = to_bf16(to_float32(tensors["norm.weight"]) * np.float32(0.5))
    checkpoint.write(directory, found.config, tensors)
    return directory


async def measure(model: Path, swaps: int) -> list[Claim]:
    """The claims."""
    with tempfile.TemporaryDirectory(prefix="tided-swap-") as name:
        work, port = Path(name), free_port()
        init_draft(model, work / "a", 8192)
        drafts = itertools.cycle([second_draft(work / "a", work / "b"), work / "a"])
        arguments = (
            "--model",
            str(model),
            "--draft",
            str(work / "a"),
            "--port",
            str(port),
            "--max-context",
            "512",
            "--no-profile",
        )
        cores, _ = split_cores(1)
        url, pauses, calls = f"http://127.0.0.1:{port}", list[float](), list[tuple[float, float]]()
        async with LocalStack(work / "logs", lambda line: print(line, flush=True)) as stack, client(url) as http:
            await stack.start(Service("engine", "tided.engine.embedded.server", arguments, cores))
            (await http.post("/admin/gammas", json={"gammas": GAMMAS})).raise_for_status()
            async with Traffic(url, DOMAINS["code"].endless("train"), CONCURRENCY) as traffic:
                await asyncio.sleep(EVERY_S)
                for _ in range(swaps):
                    began_s = time.monotonic()
                    answer = await http.post("/admin/swap", json={"path": str(next(drafts))})
                    answer.raise_for_status()
                    pauses.append(1000 * answer.json()["seconds"])
                    calls.append((began_s, time.monotonic()))
                    await asyncio.sleep(EVERY_S)
                await traffic.pause()
    return _claims(traffic.load, pauses, calls)


def _claims(load: Load, pauses: list[float], calls: list[tuple[float, float]]) -> list[Claim]:
    during = [1000 * longest_gap(load.answers, began, ended) for began, ended in calls]
    # The same length of time right before each swap, when nothing is being loaded.
    quiet = [1000 * longest_gap(load.answers, began - (ended - began) - WINDOW_S / 2, began) for began, ended in calls]
    waits = [with_swap - without for with_swap, without in zip(during, quiet, strict=True)]
    return [
        at_most("swap.pause", f"steps paused by a swap, the longest of {len(pauses)}", max(pauses), 100, "ms", pauses),
        at_most(
            "swap.wait",
            "longest silence of a stream around a swap over that before it, median",
            statistics.median(waits),
            100,
            "ms",
            waits,
        ),
        Claim(
            "swap.call",
            "a swap from request to answer, median",
            1000 * statistics.median(e - b for b, e in calls),
            "ms",
        ),
        at_most("swap.failed", f"failed requests of {len(load.answers)}", load.errors, 0),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT)
    publish("swap", asyncio.run(measure(parser.parse_args(arguments).model, SWAPS)))


if __name__ == "__main__":
    main()
