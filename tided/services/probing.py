"""Probes: short fixed prompts sent to an engine's own HTTP server, and the rows that its tap made of them.

Each prompt is one of the reference's sequences and two tokens that are new in each round, so that its group marks the rows of this
round and of no other. The answer, sent as a prompt in a second round, says whether rows tapped while decoding are those of prefill.
The collector puts the rows of probes aside (tided.store.aside): they never train.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import numpy as np
from redis.asyncio import Redis

from tided.backends.base import Backend
from tided.draft.reference import Reference, sequences
from tided.model.engines import Capability, EngineInfo, RequestStats
from tided.model.errors import Refused, Unavailable
from tided.model.ids import prompt_group
from tided.model.verification import Check, CheckOutcome
from tided.services import diagnosis
from tided.services.acceptance import Drafted
from tided.services.context import Target
from tided.services.diagnosis import Probed, Shape, Tapped
from tided.services.embeddings import resemble
from tided.store.aside import set_aside
from tided.store.samples import Run, SampleStore, Split, read_runs

if TYPE_CHECKING:
    import httpx  # at run time only when there is something to probe: it is slow to import

ANSWER_TOKENS = 12
NONCE_TOKENS = 2
POLL_S = 0.1
REPORTS_S = 10.0
"""How long after their rows the reports of the probes' requests may come."""
_RESPONSE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Prober:
    """What probing needs of its surroundings."""

    redis: Redis
    backend: Backend
    samples: SampleStore
    target: Target
    tolerance: float
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what was tapped of each probe, and what is known of how it was drafted for."""

    probed: tuple[Probed, ...]
    drafted: Drafted


async def probe(prober: Prober, info: EngineInfo, attempt: int, gamma: int, *, again: bool) -> Round:
    """Send the probes and wait for their rows. Capture must be on, and `gamma` tokens be drafted in every step (0: not so).

    `again`: send prompts and answers together, too, as prompts.
    Raises `Unavailable` when the engine does not answer or rows do not arrive within the time, `Refused` when it will not answer.
    """
    with_nonce = [(*ids, *_nonce(info, attempt, k)) for k, ids in enumerate(sequences(info.target.vocab))]
    failure = f"engine {info.engine}: its probes were not answered, or their rows did not arrive, within {prober.timeout_s:g} s"
    try:
        with anyio.fail_after(prober.timeout_s):
            async with _client(info) as client:
                model = await _model(client)
                _, cursor = await prober.backend.observe("")
                first, shards = await _round(prober, client, info, model, with_nonce, ANSWER_TOKENS)
                probed = tuple(
                    Probed(prompt, k, tapped) for k, (prompt, tapped) in enumerate(zip(with_nonce, first, strict=True))
                )
                reports = await _reports(prober, info, cursor, with_nonce)
                if again:
                    second, _ = await _round(prober, client, info, model, [_whole(item) for item in probed], 1)
                    probed = tuple(replace(item, again=tapped) for item, tapped in zip(probed, second, strict=True))
    except TimeoutError as exc:
        raise Unavailable(f"{failure}: is its tap installed, and is the collector running?") from exc
    groups = tuple(group_of(prompt).hex() for prompt in with_nonce)
    whole = all(bool(len(item.tapped.positions)) and not item.tapped.positions[0] for item in probed)
    return Round(probed, Drafted(groups, reports, shards, whole, gamma))


def judge(prober: Prober, info: EngineInfo, reference: Reference | None, probed: Sequence[Probed]) -> tuple[Check, ...]:
    """What the rows of a round show. Blocks: it reads the target's head."""
    shape = Shape(prober.target.info.aux_layers, Capability.LAST_HIDDEN in info.capabilities)
    return diagnosis.declared(info.target, prober.target.info), *_judged(prober, reference, probed, shape)


def _judged(prober: Prober, reference: Reference | None, probed: Sequence[Probed], shape: Shape) -> tuple[Check, ...]:
    every = [item.tapped for item in probed] + [item.again for item in probed if item.again is not None]
    rows = diagnosis.row_shape(every, shape, prober.target.info.hidden)
    if rows.outcome is CheckOutcome.FAILED:
        return (rows,)  # nothing else can be compared
    checks = [rows, diagnosis.tokens(probed), diagnosis.finite(every)]
    if reference is not None:
        checks += diagnosis.states(reference, probed, shape, prober.tolerance)
    else:
        checks.append(resemble(prober.target.path, [item.tapped for item in probed]))
    checks.append(diagnosis.decoding(probed, prober.tolerance))
    checks.append(diagnosis.greedy(prober.target.path, [item.tapped for item in probed], shape, sampled=False))
    return tuple(checks)


def group_of(prompt: Sequence[int]) -> bytes:
    """The group under which the engine's tap files a prompt."""
    return prompt_group(np.array(prompt, "<i4").tobytes())


def _nonce(info: EngineInfo, attempt: int, sequence: int) -> list[int]:
    digest = hashlib.sha256(f"{info.engine} {info.incarnation} {attempt} {sequence}".encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "big") % info.target.vocab for i in range(NONCE_TOKENS)]


def _whole(probed: Probed) -> tuple[int, ...]:
    """Prompt and answer, as far as both are known without a gap."""
    known, ids = probed.tapped.tokens, list(probed.prompt)
    while len(ids) in known:
        ids.append(known[len(ids)])
    return tuple(ids)


async def _round(
    prober: Prober,
    client: "httpx.AsyncClient",
    info: EngineInfo,
    model: str,
    prompts: Sequence[tuple[int, ...]],
    answer_tokens: int,
) -> tuple[list[Tapped], tuple[str, ...]]:
    """Send the prompts together and wait for their rows. Gives them, and the shards that hold them."""
    groups = [group_of(prompt) for prompt in prompts]
    # Before the rows can exist: the collector asks after it has read them.
    await set_aside(prober.redis, info.engine, groups=groups)
    async with anyio.create_task_group() as tasks:
        for prompt, group in zip(prompts, groups, strict=True):
            tasks.start_soon(_complete, client, model, prompt, answer_tokens, group)
    found: dict[bytes, list[Run]] = {}
    shards, seen = list[str](), set[Path]()
    while not all(group in found for group in groups):
        for path, runs in await anyio.to_thread.run_sync(_arrived, prober.samples, info.engine, seen):
            ours = [run for run in runs if run.group in groups]
            for run in ours:
                found.setdefault(run.group, []).append(run)
            shards += [str(path)] if ours else []
        await anyio.sleep(POLL_S)
    return [Tapped.of(found[group]) for group in groups], tuple(shards)


def _arrived(samples: SampleStore, engine: str, seen: set[Path]) -> list[tuple[Path, list[Run]]]:
    fresh = [shard.path for shard in samples.shards(Split.ASIDE, engine=engine) if shard.path not in seen]
    seen.update(fresh)
    return [(path, read_runs(path)) for path in fresh]


def _may_be_probe(stats: RequestStats, info: EngineInfo) -> bool:
    return stats.version == info.version and stats.temperature in (0.0, None)


async def _reports(
    prober: Prober, info: EngineInfo, cursor: str, prompts: Sequence[tuple[int, ...]]
) -> tuple[tuple[RequestStats, ...], ...]:
    """For each prompt the finished requests that may be it: as long a prompt and answer, greedy, by the draft that serves."""
    told: list[RequestStats] = []
    found = tuple(tuple[RequestStats, ...]() for _ in prompts)
    with anyio.move_on_after(REPORTS_S):
        while not all(found):
            await anyio.sleep(POLL_S)
            observations, cursor = await prober.backend.observe(cursor)
            for observation in observations:
                if observation.incarnation == info.incarnation:
                    told += [stats for stats in observation.requests if _may_be_probe(stats, info)]
            found = tuple(
                tuple(
                    stats for stats in told if (stats.prompt_tokens, stats.output_tokens) == (len(ids), ANSWER_TOKENS)
                )
                for ids in prompts
            )
    return found


def _client(info: EngineInfo) -> "httpx.AsyncClient":
    import httpx

    if urlsplit(info.url).scheme not in ("http", "https"):
        raise Refused(f"engine {info.engine}: its URL is neither http nor https")
    try:
        return httpx.AsyncClient(base_url=info.url, timeout=None, trust_env=False)
    except httpx.InvalidURL as exc:
        raise Refused(f"engine {info.engine}: its URL is not valid") from exc


async def _model(client: "httpx.AsyncClient") -> str:
    """The name under which the engine serves its target."""
    answer = await _ask(client, "GET", "/v1/models", None)
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise Refused("the engine's /v1/models names no model") from exc


async def _complete(
    client: "httpx.AsyncClient", model: str, prompt: tuple[int, ...], answer_tokens: int, salt: bytes
) -> None:
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": salt.hex(),  # a prefix cache would hide the rows
    }
    await _ask(client, "POST", "/v1/completions", body)


async def _ask(client: "httpx.AsyncClient", method: str, path: str, body: dict[str, Any] | None) -> "httpx.Response":
    """Raises `Unavailable` or `Refused`, which quote nothing of the answer: it may quote the prompt."""
    import httpx

    try:
        answer = await client.request(method, path, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise Unavailable(f"the engine's {path} cannot be reached ({type(exc).__name__})") from exc
    if answer.status_code >= 500:
        raise Unavailable(f"the engine's {path} answers {answer.status_code}")
    if answer.status_code >= 400 or len(answer.content) > _RESPONSE_BYTES:
        raise Refused(f"the engine's {path} answers {answer.status_code} to a probe")
    return answer
