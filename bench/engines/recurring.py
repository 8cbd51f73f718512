"""The study of recurring domains on real vLLM: how soon acceptance is back with the pool of drafts, and how soon by retraining.

`python -m bench.engines.recurring [pool|retrain]` runs the parts that are missing, one after the other; each part's raw figures are
written under build/engines-recurring/, and the report's claims, as soon as it is done. A part is an arm from a cold start: a server with
tided in it, its worker on the other core, and steady traffic that goes from domain to domain without a pause, always with the same
number of drafted tokens.

    pool     code, French, code, French
    retrain  code, French, code, without the pool and without replay: what is forgotten is trained again

A domain that comes again comes with prompts that were never asked before. Acceptance is what the engine itself reports.
"""

import argparse
import asyncio
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis

from bench.engines.recurring_plan import ARMS, Phase, Plan, full, smoke
from bench.engines.recurring_report import write_report
from bench.engines.shift import Arms
from bench.engines.shift_plan import TIDED
from bench.load import Traffic
from bench.model import DEFAULT
from bench.report import one_of
from bench.study import Parts, digest_of, noting, prompts_of, run, timeline, unless_ended
from bench.traffic import Prompt
from tests.contract.peer import Peer
from tided.config import Config
from tided.local import LocalStack
from tided.model.codec import to_plain
from tided.model.engines import Observation
from tided.store.valkey import EmbeddedValkey

SAY_EVERY_S = 10.0


def reported(config: Config) -> list[Observation]:
    """What the engine has reported since its start."""
    valkey = EmbeddedValkey(config.daemon.state_dir / "valkey", config.redis.maxmemory_bytes)
    with redis.Redis(unix_socket_path=str(valkey.socket)) as client:
        return Peer(client, TIDED).observations()


def drafted(observation: Observation) -> dict[str, Any]:
    """A report's request-steps that drafted, and the drafted tokens that were accepted in them."""
    counts = [item.accepted for item in observation.steps if item.gamma]
    return {
        "at_ms": observation.at_ms,
        "version": observation.version,
        "steps": sum(map(sum, counts)),
        "accepted": sum(k * n for accepted in counts for k, n in enumerate(accepted)),
    }


async def run_arm(arms: Arms, plan: Plan, arm: str) -> dict[str, Any]:
    """One arm's phases; gives their raw figures."""
    phases = plan.arms[arm]
    # One source for each domain: when it comes again it goes on where it was left.
    sources = {p.domain: prompts_of(p.domain, "train", 0, 0, plan.server.max_tokens) for p in phases}
    asked: list[list[Prompt]] = [[] for _ in phases]
    changed_ms: list[int] = []
    began_s = time.monotonic()
    async with (
        timeline(arms, began_s) as moments,
        Traffic(arms.urls[TIDED], noting(sources[phases[0].domain], asked[0]), plan.concurrency) as traffic,
    ):
        for index, phase in enumerate(phases):
            traffic.prompts = noting(sources[phase.domain], asked[index])
            changed_ms.append(round(time.time() * 1000))
            await _pass(phase, moments)
        ended_ms = round(time.time() * 1000)
        await traffic.pause()
        load = traffic.load
    engine = (await arms.wait_for(lambda status: status.engines[0].samples.in_flight == 0, 60)).engines[0]
    return {
        "arm": arm,
        "phases": [asdict(phase) for phase in phases],
        "changed_ms": changed_ms,
        "ended_ms": ended_ms,
        "prompts": [[digest_of(prompt) for prompt in prompts] for prompts in asked],
        "reports": [drafted(item) for item in await asyncio.to_thread(reported, arms.config)],
        "timeline": moments,
        "requests": len(load.answers),
        "errors": load.errors,
        "events": [to_plain(event) for event in await arms.events("")],
        "samples": to_plain(engine.samples),
        "drafts": await arms.get("/v1/drafts"),
        "jobs": await arms.get("/v1/jobs"),
    }


async def _pass(phase: Phase, moments: Sequence[Mapping[str, Any]]) -> None:
    """The phase's time, with a line about it now and then."""
    ends_s = time.monotonic() + phase.seconds
    while (left_s := ends_s - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, SAY_EVERY_S))
        now = moments[-1] if moments else {}
        print(
            f"{phase.domain} {phase.seconds - left_s:4.0f}/{phase.seconds:.0f} s: acceptance length {now.get('accept_length')},"
            f" draft {now.get('draft')}, {now.get('training')}, rows {now.get('rows')}, drifts {now.get('drifts')}",
            flush=True,
        )


async def study(plan: Plan, wanted: Sequence[str], name: str, model: Path) -> None:
    """Every part of those wanted that is missing. Raises `TideError` when a process of the stack could not start, or ended."""
    work = Path("build") / name
    parts = Parts(work, plan.digest)
    for arm in wanted:
        if parts.read(arm) is not None:
            continue
        shutil.rmtree(work / arm, ignore_errors=True)
        async with LocalStack(work / arm / "logs", lambda line: print(line, flush=True)) as stack:
            arms = await Arms.start(stack, plan.started(arm), model, work / arm)
            parts.write(arm, await unless_ended(stack, run_arm(arms, plan, arm)))
        _report(plan, name)


def _report(plan: Plan, name: str) -> Path:
    """Written from the parts that have run."""
    found = map(Parts(Path("build") / name, plan.digest).read, ARMS)
    return write_report(name, plan, [part for part in found if part is not None])


def main() -> None:
    """`python -m bench.engines.recurring [pool|retrain] [--smoke] [--report]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.recurring", description=__doc__)
    parser.add_argument("arms", nargs="*", type=one_of(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that the harness works")
    parser.add_argument("--report", action="store_true", help="only write the report again, from the raw parts")
    options = parser.parse_args()
    plan, name = (smoke(), "engines-recurring-smoke") if options.smoke else (full(), "engines-recurring")
    if not options.report:
        run(study(plan, options.arms or ARMS, name, options.model))
    print(f"report: {_report(plan, name)}")


if __name__ == "__main__":
    main()
