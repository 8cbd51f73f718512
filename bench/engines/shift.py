"""The study of shifting traffic on real servers: what no speculation, a static draft, vLLM's own schedule and tided make of it.

`python -m bench.engines.shift [vllm|sglang]` runs the parts that are missing, one after the other; each part's raw figures are written
under build/engines-shift-KIND/, and the report's claims, as soon as it is done. Arms are separate servers on the same core, which have
their turns in every block, forth and back: the others are idle meanwhile. tided and its worker are on the other core.

    none    vLLM as it comes, without a draft
    static  the draft that tided served at the end of the first part, frozen, with as many drafted tokens as tided chose for batch size 1
    own     the same draft, with vLLM's own schedule by batch size, as tided had set it then
    tided   vLLM with tided in it, from a cold start

On SGLang, whose CPU kernels are stand-ins, there are static and tided only, for acceptance and swaps. Adaptation traffic goes to tided's
server alone, between the blocks; measurement prompts never occur in it, and are never tapped.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.configs import free_port, write_config
from bench.control import Control
from bench.engines.counters import drafted
from bench.engines.servers import REST_S, Engine, service
from bench.engines.shift_plan import NONE, OWN, PLANS, STATIC, TIDED, Part, Plan
from bench.engines.shift_report import write_report
from bench.load import NO_CAPTURE, Traffic, client, each
from bench.model import DEFAULT
from bench.study import Parts, digest_of, noting, prompts_of, run, timeline, unless_ended
from bench.traffic import Prompt
from bench.turns import Measured, Pair, TurnLog
from tided.config import Config
from tided.local import LocalStack, services
from tided.model.codec import to_plain
from tided.model.engines import EngineInfo

MEASURE_STRIDE = 500
"""A domain that comes again is measured on prompts so far behind those of its first part."""
NO_DRAFT: Mapping[str, str | None] = {"--speculative-config": None, "--middleware": None}


class Arms(Control):
    """The servers: tided's and the one without a draft from the start, the frozen ones once there is a draft to freeze."""

    def __init__(self, stack: LocalStack, plan: Plan, config: Config) -> None:
        super().__init__(config.daemon.socket_path)
        self.plan, self.config, self.urls = plan, config, dict[str, str]()
        self._stack = stack

    @classmethod
    async def start(cls, stack: LocalStack, plan: Plan, model: Path, work: Path) -> "Arms":
        """tided, its worker, its server and the plain one; returns when tided knows the draft that its engine serves."""
        config_file = work / "tided.toml"
        config = write_config(config_file, _changes(plan, model, work))
        arms = cls(stack, plan, config)
        daemon, _, worker = services(config_file, config)
        await stack.start(daemon)
        await stack.start(worker)
        await arms._boot(Engine(TIDED, plan.kind, options=plan.options))
        if any(NONE in part.arms for part in plan.parts):
            await arms._boot(Engine(NONE, plan.kind, tided=False, options={**plan.options, **NO_DRAFT}))
        await arms.has_draft()
        if plan.gamma is not None:
            fixed = {"mode": "fixed", "gamma": plan.gamma}
            await asyncio.to_thread(arms.client.post, "/v1/policy", fixed)
        return arms

    async def freeze(self, arms: Sequence[str], served: Mapping[str, Any]) -> None:
        """Boots the servers with a draft and a schedule that stay."""
        gammas = [max(1, served["gammas"][0]), *served["gammas"][1:]]
        for name in arms:
            if name in (STATIC, OWN):
                change = frozen(self.plan.kind, served["path"], gammas, own=name == OWN)
                await self._boot(Engine(name, self.plan.kind, tided=False, options={**self.plan.options, **change}))

    async def served(self) -> dict[str, Any]:
        """What tided's engine serves now: enough to freeze it."""
        info: EngineInfo = (await self.engine()).info
        return {
            "version": info.version,
            "path": str((self.config.drafts_dir / info.version).absolute()),
            "gammas": list(info.gammas),
        }

    async def _boot(self, engine: Engine) -> None:
        port = free_port()
        await self._stack.start(service(self.config, engine, port))
        url = self.urls[engine.name] = f"http://127.0.0.1:{port}"
        # What a server does for the first time takes longer: batches of each size, of a domain that nobody is measured on.
        for concurrency in self.plan.turns:
            prompts = itertools.islice(prompts_of("json", "measure", 0, 0, self.plan.max_tokens), 2 * concurrency)
            await each(url, prompts, concurrency, headers=NO_CAPTURE)


def frozen(kind: str, draft: str, gammas: Sequence[int], *, own: bool) -> dict[str, str | None]:
    """Options of a server without tided that drafts `gammas[0]` tokens at every batch size, or vLLM's own way by `gammas`."""
    if kind == "sglang":
        return {
            "--speculative-adaptive": None,
            "--speculative-adaptive-config": None,
            "--speculative-draft-model-path": draft,
            "--speculative-num-steps": str(gammas[0]),
            "--speculative-num-draft-tokens": str(gammas[0] + 1),
        }
    speculation: dict[str, Any] = {
        "method": "eagle3",
        "model": draft,
        "num_speculative_tokens": max(gammas) if own else gammas[0],
    }
    if own:
        speculation["num_speculative_tokens_per_batch_size"] = ranges(gammas)
    return {"--middleware": None, "--speculative-config": json.dumps(speculation)}


def ranges(gammas: Sequence[int]) -> list[list[int]]:
    """vLLM's table [first batch size, last, drafted tokens] of a list by batch size."""
    found: list[list[int]] = []
    for batch, gamma in enumerate(gammas, start=1):
        if found and found[-1][2] == gamma:
            found[-1][1] = batch
        else:
            found.append([batch, batch, gamma])
    return found


def _changes(plan: Plan, model: Path, work: Path) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {
        "daemon": {"state_dir": str(work / "state")},
        "target": {"path": str(model.absolute())},
        "engine": {
            "id": TIDED,
            "dtype": plan.dtype,
            "gamma_max": plan.gamma_max,
            "max_batch": plan.max_batch,
            "max_context": plan.max_context,
        },
        "speculation": {"gamma_max": plan.gamma_max},
    }
    for section, values in plan.changes.items():
        changes[section] = {**changes.get(section, {}), **values}
    return changes


async def turn(url: str, prompts: Sequence[Prompt], concurrency: int, began_s: float) -> tuple[Measured, int]:
    """One arm's answers to `prompts`, `concurrency` at a time, as one figure; and how many requests failed."""
    async with client(url) as http:
        before = await drafted(http)
        load = await each(url, prompts, concurrency, headers=NO_CAPTURE)
        counted = (await drafted(http)).since(before)
    at_s = time.monotonic() - began_s
    first_s = min(answer.ttft_s for answer in load.answers)
    return Measured(
        at_s, load.seconds, first_s, load.tokens, counted.steps, counted.drafted, counted.accepted
    ), load.errors


async def block(
    logs: Mapping[int, TurnLog],
    arms: Arms,
    part: Part,
    plan: Plan,
    measure: Iterator[Prompt],
    number: int,
    began_s: float,
) -> list[Prompt]:
    """Every concurrency in turn, and for each every arm; a pair at concurrency 1 is a prompt, else a whole turn. Gives the prompts."""
    asked: list[Prompt] = []
    for concurrency, count in plan.turns.items():
        prompts = list(itertools.islice(measure, count))
        asked += prompts
        units = [[prompt] for prompt in prompts] if concurrency == 1 else [prompts]
        answers: dict[str, list[tuple[Measured, int]]] = {}
        for arm in part.arms if number % 2 == 0 else part.arms[::-1]:
            await asyncio.sleep(REST_S)
            answers[arm] = [await turn(arms.urls[arm], unit, concurrency, began_s) for unit in units]
        for index in range(len(units)):
            of_unit = {arm: answers[arm][index] for arm in part.arms}
            failed = [f"{arm}: {errors} failed" for arm, (_, errors) in of_unit.items() if errors]
            logs[concurrency].errors += failed
            if not failed:
                logs[concurrency].pairs.append(Pair(number, {arm: measured for arm, (measured, _) in of_unit.items()}))
    return asked


async def run_part(arms: Arms, plan: Plan, index: int) -> dict[str, Any]:
    """One part; gives its raw figures."""
    part = plan.parts[index]
    trained: list[Prompt] = []
    measured: list[Prompt] = []
    logs = {concurrency: TurnLog() for concurrency in plan.turns}
    newest = await arms.events("")
    cursor = newest[-1].id if newest else ""
    earlier = sum(other.domain == part.domain for other in plan.parts[:index])
    measure = prompts_of(part.domain, "measure", 0, earlier * MEASURE_STRIDE, plan.max_tokens)
    train = noting(prompts_of(part.domain, "train", index, 0, plan.max_tokens), trained)
    began_s, began_ms = time.monotonic(), round(time.time() * 1000)
    async with (
        timeline(arms, began_s) as moments,
        Traffic(arms.urls[TIDED], train, plan.adapt_concurrency) as traffic,
    ):
        for number in itertools.count():
            elapsed_s = time.monotonic() - began_s
            if elapsed_s >= part.seconds:
                break
            traffic.resume()
            await asyncio.sleep(part.adapt_late_s if elapsed_s >= part.seconds * 2 / 3 else part.adapt_s)
            await traffic.pause()
            measured += await block(logs, arms, part, plan, measure, number, began_s)
            _say(part, logs, moments, time.monotonic() - began_s)
        load = traffic.load
    engine = await arms.wait_for(lambda status: status.engines[0].samples.in_flight == 0, 60)
    return {
        "part": asdict(part),
        "seconds": time.monotonic() - began_s,
        "began_ms": began_ms,
        "turns": {str(concurrency): log.to_plain() for concurrency, log in logs.items()},
        "timeline": moments,
        "adaptation": {"tokens": load.tokens, "seconds": load.seconds, "errors": load.errors},
        "trained_prompts": sorted({digest_of(prompt) for prompt in trained}),
        "measured_prompts": [digest_of(prompt) for prompt in measured],
        "events": [to_plain(event) for event in await arms.events(cursor)],
        "samples": to_plain(engine.engines[0].samples),
        "profile": to_plain(engine.engines[0].info.profile),
        "jobs": await arms.get("/v1/jobs"),
        "served": await arms.served(),
    }


def _say(part: Part, logs: Mapping[int, TurnLog], moments: Sequence[Mapping[str, Any]], at_s: float) -> None:
    now = moments[-1] if moments else {}
    ratios = "; ".join(
        f"c{concurrency} "
        + ", ".join(
            f"{arm} {sum(p.ratio(arm, NONE) for p in log.pairs[-3:]) / len(log.pairs[-3:]):.2f}"
            for arm in part.arms
            if arm != NONE
        )
        for concurrency, log in logs.items()
        if log.pairs and NONE in part.arms
    )
    print(
        f"part {part.name} ({part.domain}) {at_s:4.0f}/{part.seconds:.0f} s: over none {ratios} | gammas {now.get('gammas')},"
        f" alpha {now.get('alpha')}, rows {now.get('rows')}, {now.get('training')}, draft {now.get('draft')}",
        flush=True,
    )


@dataclass(frozen=True)
class Places:
    """Where the study of one plan reads and writes, by the plan's name."""

    name: str

    @property
    def work(self) -> Path:
        return Path("build") / f"engines-shift-{self.name}"

    def done(self, plan: Plan) -> list[dict[str, Any]]:
        """The parts that have run, in order."""
        return Parts(self.work, plan.digest).first(*(part.name for part in plan.parts))

    def report(self, plan: Plan) -> Path:
        """Written from the parts that have run."""
        return write_report(f"engines-shift-{self.name}", plan, self.done(plan))


async def study(plan: Plan, places: Places, model: Path) -> None:
    """Every part that is missing. Raises `TideError` when a process of the stack could not start, or ended."""
    done = len(places.done(plan))
    if done == len(plan.parts):
        return
    if not done:
        shutil.rmtree(places.work, ignore_errors=True)
    async with LocalStack(places.work / "logs", lambda line: print(line, flush=True)) as stack:
        arms = await Arms.start(stack, plan, model, places.work)
        for index, part in enumerate(plan.parts[done:], start=done):
            missing = [name for name in part.arms if name not in arms.urls]
            if missing:
                await arms.freeze(missing, places.done(plan)[0]["served"])
            raw = await unless_ended(stack, run_part(arms, plan, index))
            Parts(places.work, plan.digest).write(part.name, {**raw, "resumed": bool(done) and index == done})
            places.report(plan)


def main() -> None:
    """`python -m bench.engines.shift [vllm|sglang|smoke] [--report]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.shift", description=__doc__)
    parser.add_argument("plan", nargs="?", choices=list(PLANS), default="vllm")
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--report", action="store_true", help="only write the report again, from the raw parts")
    options = parser.parse_args()
    plan, places = PLANS[options.plan](), Places(options.plan)
    if not options.report:
        run(study(plan, places, options.model))
    print(f"report: {places.report(plan)}")


if __name__ == "__main__":
    main()
