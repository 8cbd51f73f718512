"""Temperature 0.7 on vLLM on a processor: what it accepts, what the draft could give, and whether tided sees the difference for what it is.

`python -m bench.engines.temperature`. vLLM 0.32 loses the temperature of sampled requests that it drafts for (tided.engine.vllm.sampling).
Two arms, one after the other, under a whole tided with a worker: vLLM as it comes, and with what the plugin mends. Each answers as many
greedy requests as sampled ones, mixed, and drafts three tokens with a trained draft. Served is what the engine's reports say of the
requests of one temperature; scored is what a worker finds that the draft gives on the samples of them.
"""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import redis

from bench.configs import free_port, write_config
from bench.control import Control
from bench.drafts import code_draft, store_code_draft
from bench.engines.servers import Engine, service
from bench.load import Answer, ask, client
from bench.model import DEFAULT
from bench.report import Claim, at_least, at_most, one_of, publish
from bench.tap import MAX_CONTEXT, NEVER_ROWS
from bench.traffic import DOMAINS, Prompt
from tests.contract.peer import Peer
from tided.config import Config
from tided.local import LocalStack, services
from tided.model.jobs import JobKind
from tided.model.status import Status
from tided.model.verification import VerificationState
from tided.policies.faults import accepted_at

Arm = Literal["stock", "mended"]
ENVIRONMENT: Mapping[Arm, Mapping[str, str]] = {"stock": {"TIDED_MEND_SAMPLING": "0"}, "mended": {}}
TEMPERATURE, REQUESTS, TOKENS, GAMMA, CONCURRENCY = 0.7, 160, 48, 3, 8
CHECK_S = 10.0
PATIENCE_S = 90.0
"""How long after the last request the alarm may take, or must stay away."""


@dataclass(frozen=True)
class Seen:
    """Acceptance lengths by temperature: as served, and as a draft that samples (or drafts its likeliest token) would give. `alarm_s`: from
    the first request to the event, None without one."""

    served: Mapping[float, float]
    scored: Mapping[float, float]
    likeliest: Mapping[float, float]
    alarm_s: float | None
    message: str
    trainings: int
    failed: int


async def measure(model: Path, arm: Arm) -> Seen:
    """One arm."""
    with tempfile.TemporaryDirectory(prefix="tided-temperature-") as name:
        work = Path(name)
        config = _config(model, work)
        store_code_draft(config, model)
        control = Control(config.daemon.socket_path)
        async with LocalStack(work / "logs", lambda line: print(line, flush=True)) as stack:
            daemon, _, worker = services(work / "config.toml", config)
            await stack.start(daemon)
            await stack.start(worker)
            port = free_port()
            engine = Engine("vllm", draft=code_draft(model).absolute(), environment=ENVIRONMENT[arm])
            await stack.start(service(config, engine, port))
            await asyncio.to_thread(control.client.post, "/v1/policy", {"mode": "fixed", "gamma": GAMMA})
            # Its self-test first: in one batch with sampled requests, greedy ones are answered wrongly too, and that sees it.
            await control.wait_for(_ready, 120)
            began_ms = round(time.time() * 1000)
            answers = await _traffic(f"http://127.0.0.1:{port}")
            return await _seen(config, control, answers, began_ms)


def _ready(status: Status) -> bool:
    """Whether the engine has passed its self-test, captures, and drafts as it should."""
    if not status.engines:
        return False
    (engine,) = status.engines
    verified = engine.verification is not None and engine.verification.state is VerificationState.VERIFIED
    return verified and engine.info.capturing and set(engine.info.gammas) == {GAMMA}


def _config(model: Path, work: Path) -> Config:
    return write_config(
        work / "config.toml",
        {
            "daemon": {"state_dir": str(work / "state")},
            "target": {"path": str(model)},
            "engine": {"id": "vllm", "max_context": MAX_CONTEXT},
            "training": {"min_rows": NEVER_ROWS, "fault_check_s": CHECK_S},
            "samples": {"held_out_fraction": 0.4, "shard_age_s": 4.0, "shard_rows": 2048},
        },
    )


async def _traffic(url: str) -> list[Answer]:
    """Greedy and sampled requests in one random order."""
    prompts = itertools.cycle(DOMAINS["code"].prompts("train", seed=11))
    wanted = [(replace(next(prompts), max_tokens=TOKENS), t) for t in (0.0, TEMPERATURE) for _ in range(REQUESTS)]
    random.Random(0).shuffle(wanted)
    source, answers = iter(wanted), list[Answer]()

    async def one() -> None:
        prompt: Prompt
        for prompt, temperature in source:
            answers.append(await ask(http, prompt, temperature=temperature, ignore_eos=True))

    async with client(url) as http, asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(one())
    return answers


async def _seen(config: Config, control: Control, answers: Sequence[Answer], began_ms: int) -> Seen:
    """Waits for the alarm, and for a score of each temperature."""
    deadline = time.monotonic() + PATIENCE_S
    scores: dict[float, Any] = {}
    while True:
        events = await control.events("")
        jobs: list[dict[str, Any]] = await control.get("/v1/jobs")
        for job in reversed(jobs):
            for score in ((job["result"] or {}).get("candidate") or {}).get("sampling", ()):
                scores[round(score["temperature"], 1)] = score
        alarm = next((event for event in events if event.kind == "engine-fault-suspected"), None)
        if (alarm is not None and len(scores) == 2) or time.monotonic() > deadline:
            break
        await asyncio.sleep(1.0)
    return Seen(
        served=_served(config),
        scored={t: 1 + accepted_at(score["conditional"], GAMMA) for t, score in scores.items()},
        likeliest={t: 1 + accepted_at(score["likeliest"], GAMMA) for t, score in scores.items()},
        alarm_s=(alarm.at_ms - began_ms) / 1000 if alarm is not None else None,
        message=alarm.message if alarm is not None else "",
        trainings=sum(job["spec"]["kind"] == JobKind.TRAIN.value for job in jobs),
        failed=sum(bool(answer.error) for answer in answers),
    )


def _served(config: Config) -> dict[float, float]:
    """Acceptance length by temperature, over all requests that were reported."""
    with redis.Redis.from_url(config.redis_url) as connection:
        reports = Peer(connection, "vllm").observations()
    sums: dict[float, list[int]] = {}
    for request in (request for report in reports for request in report.requests if request.temperature is not None):
        of = sums.setdefault(round(request.temperature or 0.0, 1), [0, 0])
        of[0] += request.accepted
        of[1] += request.spec_steps
    return {temperature: 1 + accepted / steps for temperature, (accepted, steps) in sums.items() if steps}


def claims_of(arm: Arm, seen: Seen) -> list[Claim]:
    """What an arm showed."""
    claims: list[Claim] = []
    for temperature, served in sorted(seen.served.items()):
        label = f"{arm}, temperature {temperature:g}: acceptance length"
        claims.append(Claim(f"{arm}.{temperature}.served", f"{label} served, {GAMMA} drafted tokens", served))
        for what, values in (
            ("its draft scores, sampled", seen.scored),
            ("its draft scores, likeliest token", seen.likeliest),
        ):
            if temperature in values:
                claims.append(Claim(f"{arm}.{temperature}.{what[-7:]}", f"{label} that {what}", values[temperature]))
    alarms = int(seen.alarm_s is not None)
    if arm == "stock":
        claims.append(at_least("stock.alarm", f"stock: engine faults suspected ({seen.message or 'none'})", alarms, 1))
        if seen.alarm_s is not None:
            claims.append(Claim("stock.alarm_s", "stock: from the first request to the alarm", seen.alarm_s, "s"))
    else:
        claims.append(at_most("mended.alarm", "mended: engine faults suspected", alarms, 0))
    claims.append(at_most(f"{arm}.trainings", f"{arm}: trainings begun", seen.trainings, 0))
    claims.append(at_most(f"{arm}.failed", f"{arm}: failed requests of {2 * REQUESTS}", seen.failed, 0))
    return claims


def main() -> None:
    """Measure and publish, arm by arm."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.temperature", description=__doc__)
    parser.add_argument("arms", nargs="*", type=one_of(ENVIRONMENT), default=list(ENVIRONMENT))
    parser.add_argument("--model", type=Path, default=DEFAULT)
    options = parser.parse_args()
    for arm in options.arms:
        publish("engines-temperature", claims_of(arm, asyncio.run(measure(options.model, arm))), keep=True)


if __name__ == "__main__":
    main()
