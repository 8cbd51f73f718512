"""The SDK for a serving stack of one's own: its draft is trained on its traffic and swapped while it serves.

Needs redis and msgpack; hidden states are numpy arrays, torch tensors or plain bytes. A stack tells what happens on its step loop and
asks how many tokens to draft; threads of the SDK do the talking. Nothing that the step loop calls waits or raises: without Redis, or
when tided is slow, rows are shed and counted (`totals`), and what goes wrong is counted in `errors` and logged once.

>>> target = TargetInfo(digest="ab" * 32, name="tiny", layers=8, hidden=4, vocab=100, aux_layers=(2, 4, 5))
>>> stack = Stack(engine="mine", target=target, dtype="float32", max_batch=8, gamma_max=3)
>>> with Producer(REDIS_URL, stack) as producer:
...     producer.begin("req-1", prompt_ids=[11, 12])
...     producer.record("req-1", position=0, ids=[11, 12], states=bytes(2 * 3 * 4 * 4))  # the prefill's rows
...     gamma = producer.gamma(batch=1)  # as tided wants it now
...     producer.step(gamma, accepted={"req-1": 0}, seconds=0.02)
...     producer.record("req-1", position=2, ids=[13], states=bytes(3 * 4 * 4))  # the accepted rows only
...     producer.end("req-1", "stop", output_tokens=2, tail=[14])  # the newest token has no row
>>> producer.totals.tapped, producer.errors  # capture is off until tided switches it on
(0, 0)

A draft is swapped by the function that the stack gives. It loads beside the draft that serves, exchanges between two steps, and
raises `Refused` to keep what it had:

>>> def swap(path: Path, draft: DraftIdentity) -> Swapped:
...     raise Refused("this stack is only an example")
>>> [capability.value for capability in Producer(REDIS_URL, stack, on_swap=swap).capabilities]
['tap', 'schedule', 'swap']
"""

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from tided.draft.identity import DraftIdentity, identify
from tided.engine.agent import Counters, EngineAgent
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.model.codec import to_plain
from tided.model.engines import Capability, EngineInfo, LatencyProfile, RequestStats, StepCounts, TapTotals, TargetInfo
from tided.model.errors import Refused, TideError, Unavailable
from tided.model.ids import new_id
from tided.wire.control import Body, MeasureProfile, SetSchedule, Swap
from tided.wire.samples import ITEM_BYTES

if TYPE_CHECKING:
    import torch

    from tided.engine.tap import HostRows

__all__ = [
    "AsyncProducer",
    "DraftIdentity",
    "LatencyProfile",
    "Producer",
    "Refused",
    "Stack",
    "Swapped",
    "TapTotals",
    "TargetInfo",
    "TideError",
    "Unavailable",
    "identify",
]

log = logging.getLogger(__name__)

MAX_FINISHED = 4096
"""Finished requests kept for the next report; without Redis the older ones are dropped."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What a serving stack is. `target` must be what tided computes of the same checkpoint (tided.draft.target.describe).

    `dtype` is that of the states: "bfloat16", "float16" or "float32". `last_hidden`: behind the aux layers' states each row has the
    last hidden state after the final norm. `gamma_max` above 0 says that the stack asks `Producer.gamma` before each step. `draft` is
    what it serves at first (`identify`), None for nothing. `swaps_vocabulary`: a draft with another vocabulary map may be swapped in.
    `ring_slots`: chunks of about 1 MB that may wait in memory. `build`: what it calls itself, with its version.
    """

    engine: str
    target: TargetInfo
    max_batch: int
    dtype: str = "bfloat16"
    last_hidden: bool = False
    gamma_max: int = 0
    gammas: tuple[int, ...] = (0,)
    draft: DraftIdentity | None = None
    swaps_vocabulary: bool = False
    profile: LatencyProfile | None = None
    kind: str = "redis"
    url: str = ""
    build: str = ""
    ring_slots: int = 16
    report_interval_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Swapped:
    """What serves now, read back from what was loaded, and how many seconds the steps paused for it."""

    draft: DraftIdentity
    seconds: float


OnSwap = Callable[[Path, DraftIdentity], Swapped]
OnProfile = Callable[[], LatencyProfile]


@dataclass(slots=True)
class _Steps:
    accepted: list[int]
    steps: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Request:
    prompt_tokens: int
    temperature: float | None
    cached_tokens: int | None
    spec_steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Counts:
    """Since the last report."""

    steps: dict[tuple[int, int], _Steps] = field(default_factory=dict[tuple[int, int], _Steps])
    finished: list[RequestStats] = field(default_factory=list[RequestStats])


class _Engine:
    """The stack as the agent's threads see it (tided.engine.agent.EngineControl), and what the step loop counts."""

    def __init__(self, stack: Stack, on_swap: OnSwap | None, on_profile: OnProfile | None) -> None:
        if not stack.gammas or not all(0 <= gamma <= stack.gamma_max for gamma in stack.gammas):
            raise Refused(f"gammas must be one or more numbers in 0..{stack.gamma_max}")
        if stack.dtype not in ITEM_BYTES:
            raise Refused(f"dtype {stack.dtype!r} is none of {', '.join(ITEM_BYTES)}")
        self.stack, self.incarnation = stack, new_id("run")
        self.gammas, self.draft, self.profile = stack.gammas, stack.draft, stack.profile
        self.waiting = self.faults = 0
        self._on_swap, self._on_profile = on_swap, on_profile
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}
        self._counts = _Counts()

    @property
    def version(self) -> str:
        return self.draft.version if self.draft is not None else ""

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        declared = {
            Capability.TAP: True,
            Capability.LAST_HIDDEN: self.stack.last_hidden,
            Capability.SCHEDULE: self.stack.gamma_max > 0,
            Capability.SWAP: self._on_swap is not None,
            Capability.SWAP_VOCABULARY: self._on_swap is not None and self.stack.swaps_vocabulary,
            Capability.PROFILE: self._on_profile is not None,
        }
        return tuple(capability for capability, there in declared.items() if there)

    # --- the agent's threads ---

    def info(self) -> EngineInfo:
        stack = self.stack
        return EngineInfo(
            engine=stack.engine,
            incarnation=self.incarnation,
            kind=stack.kind,
            url=stack.url,
            target=stack.target,
            version=self.version,
            vocab_id=self.draft.vocab_id if self.draft is not None else "",
            gamma_max=stack.gamma_max,
            max_batch=stack.max_batch,
            capabilities=self.capabilities,
            gammas=self.gammas,
            capturing=False,  # the agent fills in this and the epoch
            epoch=0,
            profile=self.profile,
            pid=os.getpid(),
            build=stack.build,
        )

    def apply(self, body: Body) -> dict[str, Any]:
        if isinstance(body, SetSchedule):
            return self._schedule(body.gammas)
        if isinstance(body, Swap) and self._on_swap is not None:
            return self._swap(Path(body.path), body.version, self._on_swap)
        if isinstance(body, MeasureProfile) and self._on_profile is not None:
            self.profile = self._on_profile()
            return {"profile": to_plain(self.profile)}
        raise Refused(f"this stack does not apply {type(body).__name__}")

    def _schedule(self, gammas: tuple[int, ...]) -> dict[str, Any]:
        most = self.stack.gamma_max
        if not most:
            raise Refused("this stack has no schedule")
        if not gammas or not all(0 <= gamma <= most for gamma in gammas):
            raise Refused(f"gammas must be one or more whole numbers in 0..{most}, one for each batch size")
        self.gammas = gammas
        return {"gammas": list(gammas)}

    def _swap(self, path: Path, version: str, on_swap: OnSwap) -> dict[str, Any]:
        found = identify(path)
        if found.version != version:
            raise Refused(f"{path} holds version {found.version[:12]}, not {version[:12]}; nothing was changed")
        if self.draft is not None and found.vocab_id != self.draft.vocab_id and not self.stack.swaps_vocabulary:
            raise Refused(f"{path}: another vocabulary map, which this stack cannot swap; restart it on this draft")
        swapped = on_swap(path, found)
        self.draft = swapped.draft
        return {"version": swapped.draft.version, "seconds": float(swapped.seconds)}

    def observe(self) -> Counters:
        with self._lock:
            counts, self._counts = self._counts, _Counts()
            running = len(self._requests)
        steps = tuple(
            StepCounts(batch, gamma, item.steps, item.seconds, tuple(item.accepted))
            for (batch, gamma), item in sorted(counts.steps.items())
        )
        return Counters(steps, tuple(counts.finished), running, self.waiting, self.version)

    # --- the step loop ---

    def begin(self, request: str, prompt_tokens: int, temperature: float | None, cached_tokens: int | None) -> None:
        with self._lock:
            self._requests[request] = _Request(prompt_tokens, temperature, cached_tokens)

    def step(self, gamma: int, accepted: Mapping[str, int], seconds: float) -> None:
        if not accepted or not all(0 <= count <= gamma for count in accepted.values()):
            self.faults += 1
            if self.faults == 1:
                log.error("tided.client: a step's accepted tokens are not within 0..gamma; it is not counted")
            return
        with self._lock:
            found = self._counts.steps.setdefault((len(accepted), gamma), _Steps([0] * (gamma + 1)))
            found.steps += 1
            found.seconds += seconds
            for request, count in accepted.items():
                found.accepted[count] += 1
                known = self._requests.get(request)
                if known is not None:
                    known.spec_steps += int(gamma > 0)
                    known.drafted += gamma
                    known.accepted += count

    def end(self, request: str, output_tokens: int) -> None:
        with self._lock:
            known = self._requests.pop(request, None)
            if known is None:
                return
            told = (known.prompt_tokens, output_tokens, known.spec_steps, known.drafted, known.accepted)
            self._counts.finished.append(RequestStats(*told, self.version, known.temperature, known.cached_tokens))
            del self._counts.finished[:-MAX_FINISHED]


class Producer:
    """One life of a serving stack, connected to tided: `with Producer(...)`, or `start` and `close`.

    `begin`, `record`, `step` and `end` come from one thread, the step loop's. `on_swap` and `on_profile` are called from a thread of
    the SDK, one at a time, and may take seconds; what they raise is the answer (`Refused`, `Unavailable`), with nothing changed.
    `drafts_dir`: where drafts are kept that tided sends over Redis; None: the stack sees tided's own under the same path.
    """

    def __init__(
        self,
        redis_url: str,
        stack: Stack,
        *,
        on_swap: OnSwap | None = None,
        on_profile: OnProfile | None = None,
        drafts_dir: Path | None = None,
    ) -> None:
        """Raises `Refused` for a stack that tided would not take; Redis need not be there."""
        self.stack = stack
        self._engine = _Engine(stack, on_swap, on_profile)
        self.incarnation = self._engine.incarnation
        self._tap = Tap(
            TapSettings(
                engine=stack.engine,
                incarnation=self.incarnation,
                target=stack.target.digest,
                states=len(stack.target.aux_layers) + int(stack.last_hidden),
                hidden=stack.target.hidden,
                dtype=stack.dtype,
                has_last=stack.last_hidden,
                ring_slots=stack.ring_slots,
            )
        )
        self._publisher = Publisher(redis_url, self._tap)
        self._agent = EngineAgent(
            redis_url,
            stack.engine,
            self.incarnation,
            self._engine,
            self._tap,
            report_interval_s=stack.report_interval_s,
            drafts_dir=drafts_dir,
        )

    def start(self) -> None:
        """Connect in the background."""
        self._publisher.start()
        self._agent.start()

    def close(self, deadline_s: float = 5.0) -> bool:
        """Send what is left, for at most `deadline_s`, and take the heartbeat away. False when rows had to be shed."""
        whole = self._publisher.close(deadline_s)
        self._agent.close()
        return whole

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the step loop ---

    def begin(
        self,
        request: str,
        prompt_ids: Sequence[int],
        *,
        private: bool = False,
        temperature: float | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """A request begins, with its whole prompt (also what a prefix cache will serve). `private`: it is never captured.

        `temperature`: what its tokens are sampled at, 0.0 for greedy; None where more than that shapes what is sampled from.
        `cached_tokens`: of the prompt, taken from a prefix cache; None when that is not known.
        """
        self._engine.begin(request, len(prompt_ids), temperature, cached_tokens)
        self._tap.begin(request, prompt_ids, private)

    def record(self, request: str, position: int, ids: Sequence[int], states: "torch.Tensor | HostRows") -> None:
        """Rows of one request: consecutive tokens from `position` on, prompt or accepted, with their states [rows, states, hidden].

        numpy arrays in the stack's dtype (bfloat16: its bits as uint16), torch tensors, or the bytes. Copied before this returns.
        """
        self._tap.record([(request, position, len(ids))], ids, states)

    def record_step(
        self, segments: Sequence[tuple[str, int, int]], ids: Sequence[int], states: "torch.Tensor | HostRows"
    ) -> None:
        """Rows of a whole step at once: `segments` are (request, first position, rows), in the order of the rows."""
        self._tap.record(segments, ids, states)

    def gamma(self, batch: int) -> int:
        """How many tokens to draft in a step of `batch` requests, as tided wants it now."""
        gammas = self._engine.gammas
        return gammas[min(max(batch, 1), len(gammas)) - 1]

    def step(self, gamma: int, accepted: Mapping[str, int], seconds: float) -> None:
        """One decoding step: for each request in it, how many of its `gamma` drafted tokens were accepted (0 at gamma 0)."""
        self._engine.step(gamma, accepted, seconds)

    def end(self, request: str, finish: str, *, output_tokens: int, tail: Sequence[int] = ()) -> None:
        """A request is over. `finish`: "stop", "length" or "abort"; `tail`: token ids after its last row, which have no states."""
        self._tap.end(request, finish, tail)
        self._engine.end(request, output_tokens)

    def queued(self, waiting: int) -> None:
        """How many requests wait to be begun, for the reports."""
        self._engine.waiting = waiting

    # --- what is ---

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What follows from how the stack was described."""
        return self._agent.declared(self._engine.capabilities)

    @property
    def gammas(self) -> tuple[int, ...]:
        """The schedule in force."""
        return self._engine.gammas

    @property
    def version(self) -> str:
        """The draft that serves now, or ""."""
        return self._engine.version

    @property
    def capturing(self) -> bool:
        """Whether requests that begin now are tapped. Where it is False, a stack may leave their states on the device."""
        return self._tap.capturing

    @property
    def totals(self) -> TapTotals:
        """Rows tapped, sent, shed, waiting and skipped."""
        return self._tap.totals()

    @property
    def errors(self) -> int:
        """What went wrong so far: wrong calls, failed attempts to send, lost connections."""
        return self._engine.faults + self._tap.errors + self._publisher.errors + self._agent.errors


class AsyncProducer(Producer):
    """The same for a stack whose step loop is an asyncio task: `async with AsyncProducer(...)`.

    What the step loop calls never waits, so it is not awaited: `begin`, `record`, `step` and `end` are those of `Producer`. `on_swap`
    and `on_profile` are coroutine functions and run in the loop, between two of its tasks' steps.

    >>> async def measure() -> LatencyProfile:
    ...     return LatencyProfile(tokens=(1, 8), target_s=(0.02, 0.03), batches=(1,), draft_s=(0.002,))
    >>> async def serve(stack: Stack) -> bool:
    ...     async with AsyncProducer(REDIS_URL, stack, on_profile=measure) as producer:
    ...         producer.begin("req-1", prompt_ids=[11, 12])
    ...         return "profile" in producer.capabilities
    >>> target = TargetInfo(digest="ab" * 32, name="tiny", layers=8, hidden=4, vocab=100, aux_layers=(2, 4, 5))
    >>> asyncio.run(serve(Stack(engine="mine", target=target, max_batch=8)))
    True
    """

    def __init__(
        self,
        redis_url: str,
        stack: Stack,
        *,
        on_swap: Callable[[Path, DraftIdentity], Awaitable[Swapped]] | None = None,
        on_profile: Callable[[], Awaitable[LatencyProfile]] | None = None,
        drafts_dir: Path | None = None,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            redis_url,
            stack,
            on_swap=None if on_swap is None else self._in_loop(on_swap),
            on_profile=None if on_profile is None else self._in_loop(on_profile),
            drafts_dir=drafts_dir,
        )

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, deadline_s: float = 5.0) -> bool:
        """As `close`, without holding up the loop; a cancellation does not cut it short."""
        closing = asyncio.create_task(asyncio.to_thread(self.close, deadline_s))
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled
        return closing.result()

    def _in_loop(self, handler: Callable[P, Awaitable[T]]) -> Callable[P, T]:
        """`handler`, called from a thread of the SDK, as a coroutine of the loop."""

        async def run(*args: P.args, **kwargs: P.kwargs) -> T:
            return await handler(*args, **kwargs)

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._loop is None or self._loop.is_closed():
                raise Unavailable("the loop of this stack is not running")
            return asyncio.run_coroutine_threadsafe(run(*args, **kwargs), self._loop).result()

        return call
