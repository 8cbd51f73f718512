"""What tided costs an engine that it does not make faster: the tap, and drafting nothing.

`python -m bench.engines.cost`. Stock vLLM servers and servers with tided in them answer the same prompts to the same number of tokens,
in interleaved turns on the same core; tided, Valkey and the collector, which take what is tapped, run on the other core.

    tap     one server that drafts 3 tokens a step, with capture switched on and off between turns
    plugin  the same server against stock vLLM with the same draft and 3 tokens
    nothing without a draft, against a draft that drafts nothing: with its forward in every step, and with the forward left out
"""

import argparse
import asyncio
import itertools
import json
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.configs import free_port, write_config
from bench.control import Control
from bench.drafts import code_draft, store_code_draft
from bench.engines.rig import rig
from bench.engines.servers import REST_S, Engine, service
from bench.load import each
from bench.model import DEFAULT
from bench.report import Claim, Interval, at_most, one_of, paired_ratio, publish
from bench.tap import MAX_CONTEXT, NEVER_ROWS, TURN_TOKENS, turns
from bench.traffic import DOMAINS
from tided.local import LocalStack, services

GAMMA = 3
PAIRS = {1: 50, 8: 40}
IDLE_PAIRS = {16: 14, 1: 16, 8: 12}
STOCK: Mapping[str, str | None] = {"--middleware": None}
NO_DRAFT: Mapping[str, str | None] = {"--speculative-config": None, **STOCK}


@asynccontextmanager
async def started(model: Path, engines: Sequence[Engine], policy: Mapping[str, Any]) -> AsyncGenerator[dict[str, str]]:
    """tided under `policy` and the servers; their URLs by name. Those with tided in them capture."""
    with tempfile.TemporaryDirectory(prefix="tided-cost-") as directory:
        work = Path(directory)
        config = write_config(
            work / "config.toml",
            {
                "daemon": {"state_dir": str(work / "state")},
                "target": {"path": str(model)},
                "engine": {"max_context": MAX_CONTEXT, "max_batch": max(*PAIRS, *IDLE_PAIRS)},
                "training": {"min_rows": NEVER_ROWS},
                "self_test": {"enabled": False},  # there is no worker here
            },
        )
        store_code_draft(config, model)
        async with LocalStack(work / "logs", lambda line: print(line, flush=True)) as stack:
            await stack.start(services(work / "config.toml", config)[0])
            urls: dict[str, str] = {}
            for engine in engines:
                port = free_port()
                await stack.start(service(config, engine, port))
                urls[engine.name] = f"http://127.0.0.1:{port}"
            control = Control(config.daemon.socket_path)
            await asyncio.to_thread(control.client.post, "/v1/policy", dict(policy))
            gamma, ours = policy.get("gamma", 0), sum(engine.tided for engine in engines)
            await control.wait_for(
                lambda status: (
                    len(status.engines) == ours
                    and all(found.info.capturing and set(found.info.gammas) == {gamma} for found in status.engines)
                ),
                60,
            )
            yield urls


async def tap(model: Path) -> list[Claim]:
    """Tokens/s lost by tapping everything: one server, whose samples are taken off the stream after each turn."""
    claims: list[Claim] = []
    async with rig(model, Engine("vllm", draft=code_draft(model).resolve()), "bfloat16") as started:
        await started.peer.here()
        await started.drafts(GAMMA)
        source = DOMAINS["code"].endless("train")
        for concurrency, pairs in PAIRS.items():
            rates: dict[str, list[float]] = {"on": [], "off": []}
            for turn in range(pairs):
                prompts = [replace(prompt, max_tokens=TURN_TOKENS) for prompt in itertools.islice(source, concurrency)]
                # Once unmeasured, so that a prefix cache serves both turns alike.
                for name in ("unmeasured", "on", "off") if turn % 2 else ("unmeasured", "off", "on"):
                    await started.peer.capture(name == "on")
                    load = await each(started.url, prompts, concurrency, ignore_eos=True)
                    if load.errors:
                        raise RuntimeError(f"{load.errors} requests failed")
                    started.peer.drain()
                    if name in rates:
                        rates[name].append(load.tokens_per_s)
            cost = _lost(rates, "on", "off")
            what = f"tokens/s lost by the tap, {GAMMA} drafted tokens, concurrency {concurrency}{_interval(cost)}"
            claims.append(at_most(f"tap.{concurrency}", what, cost.median, 1.0, "%"))
    return claims


async def plugin(model: Path) -> list[Claim]:
    """Tokens/s lost by all of tided in vLLM, tapping everything, against stock vLLM."""
    draft = code_draft(model).resolve()
    fixed = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": GAMMA}
    engines = (
        Engine("off", tided=False, options={**STOCK, "--speculative-config": json.dumps(fixed)}),
        Engine("on", draft=draft),
    )
    claims: list[Claim] = []
    async with started(model, engines, {"mode": "fixed", "gamma": GAMMA}) as urls:
        for concurrency, pairs in PAIRS.items():
            rates = await turns(urls, concurrency, pairs, REST_S)
            cost = _lost(rates, "on", "off")
            what = f"tokens/s lost to stock vLLM, {GAMMA} drafted tokens, tapping, concurrency {concurrency}{_interval(cost)}"
            claims.append(Claim(f"plugin.{concurrency}", what, cost.median, "%"))
    return claims


async def nothing(model: Path) -> list[Claim]:
    """Tokens/s lost while nothing is drafted, with the draft's forward and without."""
    engines = (
        Engine("none", tided=False, options=NO_DRAFT),
        Engine("forward", environment={"TIDED_SKIP_DRAFT_AFTER": "0"}),
        Engine("skipped"),
    )
    claims: list[Claim] = []
    async with started(model, engines, {"mode": "off"}) as urls:
        for concurrency, pairs in IDLE_PAIRS.items():
            rates = await turns(urls, concurrency, pairs, REST_S)
            for name, how in (
                ("forward", "with the draft's forward in every step"),
                ("skipped", "the forward left out"),
            ):
                cost = _lost(rates, name, "none")
                what = f"tokens/s lost while nothing is drafted, {how}, tapping, concurrency {concurrency}{_interval(cost)}"
                claims.append(Claim(f"nothing.{name}.{concurrency}", what, cost.median, "%"))
    return claims


def _lost(rates: Mapping[str, Sequence[float]], ours: str, theirs: str) -> Interval:
    """Percent."""
    ratio = paired_ratio(rates[ours], rates[theirs])
    return Interval(100 * (1 - ratio.median), 100 * (1 - ratio.high), 100 * (1 - ratio.low), ratio.pairs)


def _interval(cost: Interval) -> str:
    return f" (95% {cost.low:.1f}..{cost.high:.1f})"


PARTS = {"tap": tap, "plugin": plugin, "nothing": nothing}


def main() -> None:
    """Measure and publish, part by part."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.cost", description=__doc__)
    parser.add_argument("parts", nargs="*", type=one_of(PARTS), default=list(PARTS))
    parser.add_argument("--model", type=Path, default=DEFAULT)
    options = parser.parse_args()
    for name in options.parts:
        publish("engines-cost", asyncio.run(PARTS[name](options.model)), keep=True)


if __name__ == "__main__":
    main()
