"""What the tap costs: one engine that taps everything against one without a tap, on the same core, in interleaved turns.

`python -m bench.tap` writes build/bench/tap.json. Both answer the same prompts to the same number of tokens, without speculation;
tided, Valkey and the collector, which take what is tapped, run on the other core, and nothing is trained.
"""

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.configs import free_port, write_config
from bench.control import Control
from bench.load import each
from bench.model import DEFAULT
from bench.report import Claim, at_most, paired_ratio, publish
from bench.traffic import DOMAINS, Prompt
from tided.local import LocalStack, Service, services, split_cores

NEVER_ROWS = 1_000_000_000
TURN_TOKENS = 48
MAX_CONTEXT = 512
PAIRS = {1: 20, 8: 20}


async def measure(model: Path, pairs: dict[int, int], device: str = "cpu") -> list[Claim]:
    """The claims, one for each concurrency."""
    threads, ring_slots = (1, 16) if device == "cpu" else (4, 512)  # rows of large targets are many bytes
    with tempfile.TemporaryDirectory(prefix="tided-tap-") as directory:
        work, ports = Path(directory), {"on": free_port(), "off": free_port()}
        config_file = work / "config.toml"
        config = write_config(
            config_file,
            {
                "daemon": {"state_dir": str(work / "state")},
                "target": {"path": str(model)},
                "engine": {
                    "port": ports["on"],
                    "max_context": MAX_CONTEXT,
                    "max_batch": max(pairs),
                    "device": device,
                    "threads": threads,
                },
                "capture": {"ring_slots": ring_slots},
                "training": {"min_rows": NEVER_ROWS},
                "self_test": {"enabled": False},  # there is no worker here
            },
        )
        cores, _ = split_cores(threads)
        plain = (
            "--device",
            device,
            "--threads",
            str(threads),
            "--max-batch",
            str(max(pairs)),
            "--model",
            str(model),
            "--port",
            str(ports["off"]),
            "--no-profile",
            "--engine-id",
            "off",
            "--max-context",
            str(MAX_CONTEXT),
        )
        async with LocalStack(work / "logs", lambda line: print(line, flush=True)) as stack:
            tided, engine, _ = services(config_file, config)
            await stack.start(tided)
            await stack.start(engine)
            await stack.start(Service("off", "tided.engine.embedded.server", plain, cores, threads))
            control = Control(config.daemon.socket_path)
            await control.has_draft()
            await asyncio.to_thread(control.client.post, "/v1/policy", {"mode": "off"})
            await control.wait_for(
                lambda status: status.engines[0].info.capturing and not any(status.engines[0].info.gammas), 30
            )
            urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
            claims = [await _compare(urls, concurrency, count) for concurrency, count in pairs.items()]
            samples = (await control.engine()).samples
    claims.append(Claim("tap.rows", "rows tapped meanwhile", samples.tapped))
    claims.append(at_most("tap.shed", "rows shed meanwhile", samples.shed, 0))
    return claims


async def turns(urls: Mapping[str, str], concurrency: int, count: int, rest_s: float = 0.0) -> dict[str, list[float]]:
    """Tokens/s of each server in `count` turns: all answer the same prompts, one server after the other, in an order that alternates.

    `rest_s`: how long a server goes on using its core after its turn.
    """
    source = DOMAINS["code"].endless("train")
    rates: dict[str, list[float]] = {name: [] for name in urls}
    for turn in range(count + 1):
        prompts = [_sized(prompt) for prompt in itertools.islice(source, concurrency)]
        for name in list(urls) if turn % 2 else list(urls)[::-1]:
            await asyncio.sleep(rest_s)
            load = await each(urls[name], prompts, concurrency, ignore_eos=True)
            if load.errors:
                raise RuntimeError(f"{load.errors} requests failed on the server {name}")
            if turn:  # the first turn warms all up
                rates[name].append(load.tokens_per_s)
    return rates


async def _compare(urls: Mapping[str, str], concurrency: int, pairs: int) -> Claim:
    rates = await turns(urls, concurrency, pairs)
    ratio = paired_ratio(rates["on"], rates["off"])
    return at_most(
        f"tap.cost.{concurrency}",
        f"tokens/s lost by the tap at concurrency {concurrency}"
        f" (95% interval {100 * (1 - ratio.high):.1f}..{100 * (1 - ratio.low):.1f})",
        100 * (1 - ratio.median),
        2.0,
        "%",
        [100 * (1 - on / off) for on, off in zip(rates["on"], rates["off"], strict=True)],
    )


def _sized(prompt: Prompt) -> Prompt:
    return replace(prompt, max_tokens=TURN_TOKENS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(prog="python -m bench.tap", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT)
    publish("tap", asyncio.run(measure(parser.parse_args(arguments).model, PAIRS)))


if __name__ == "__main__":
    main()
