"""Continuous batching: one `step()` admits requests, drafts gamma tokens, verifies them in one target forward and accepts.

Running requests stay compact in slots 0..b-1. A request with t tokens has states and keys for its first t - 1; its newest token is
the next step's first input. Everything that changes how steps run (schedule, draft, profile) happens between two steps.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tided.engine.boundary import perform
from tided.engine.embedded.drafter import Context, Drafter
from tided.engine.embedded.sampling import Proposal, SamplingParams, accept_greedy, accept_sampled, generator
from tided.engine.embedded.target import Target
from tided.model.engines import RequestStats, StepCounts
from tided.model.errors import Refused, Unavailable

PREFILL_CHUNK = 512
"""Prompt rows computed at once, and prompt rows after which a step stops admitting."""
GREEDY = SamplingParams()
MAX_FINISHED = 4096
"""Finished requests kept for the next report; older ones are dropped when nobody reads them."""


class TapLike(Protocol):
    """What the scheduler calls of tided.engine.tap.Tap."""

    def begin(self, request_id: str, prompt_ids: Sequence[int], opt_out: bool) -> None: ...
    def record(self, segments: Sequence[tuple[str, int, int]], ids: Sequence[int], rows: torch.Tensor) -> None: ...
    def end(self, request_id: str, finish: str, tail: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of a request. The last output has none, but `finish` ("stop", "length" or "abort") and `stats`."""

    tokens: list[int]
    finish: str = ""
    stats: RequestStats | None = None
    decode_steps: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """`emit` is called from the step thread and must not block."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    emit: Callable[[Output], None]
    params: SamplingParams = GREEDY
    ignore_eos: bool = False
    opt_out: bool = False
    gamma_limit: int | None = None  # drafted tokens a step at most, while it runs alone


@dataclass(slots=True)
class _Running:
    request: Request
    tokens: list[int]
    limit: int  # tokens at which the request ends
    context: Context
    finish: str = ""
    decode_steps: int = 0
    spec_steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def rows(self) -> int:
        """Rows whose states and keys are known."""
        return len(self.tokens) - 1


@dataclass(slots=True)
class _Counts:
    accepted: list[int]
    steps: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Totals:
    """Since the engine began. Token counts are of finished requests."""

    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Inbox:
    """What other threads leave for the step thread."""

    waiting: deque[Request] = field(default_factory=lambda: deque[Request]())
    cancelled: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    actions: deque[tuple[Callable[[], Any], "Future[Any]"]] = field(
        default_factory=lambda: deque[tuple[Callable[[], Any], "Future[Any]"]]()
    )
    closed: bool = False


class Scheduler:
    """`submit`, `cancel`, `set_gammas`, `between_steps`, `take_counts` and `close` may be called from any thread."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        tap: TapLike | None = None,
        *,
        gammas: tuple[int, ...] = (0,),
        last_hidden: bool = True,
    ) -> None:
        """`last_hidden`: the tap gets the last hidden state behind the aux states."""
        self.target, self.drafter, self._tap = target, drafter, tap
        self._tapped_states = len(target.info.aux_layers) + int(last_hidden)
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._inbox = _Inbox()
        self._counts: dict[tuple[int, int], _Counts] = {}
        self._finished: deque[RequestStats] = deque(maxlen=MAX_FINISHED)
        self.totals = Totals()
        self.gammas: tuple[int, ...] = (0,)
        self.set_gammas(gammas)

    # --- any thread ---

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `Refused` when its prompt does not fit, `Unavailable` when the engine is shutting down."""
        room = self.target.max_context - len(request.prompt)
        if not request.prompt or room < 1:
            raise Refused(
                f"the prompt has {len(request.prompt)} tokens; this engine takes 1 to {self.target.max_context - 1}"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self.target.vocab:
            raise Refused(f"the prompt holds a token id outside the vocabulary of {self.target.vocab}")
        if request.max_tokens < 1:
            raise Refused("max_tokens must be at least 1")
        with self._changed:
            if self._inbox.closed:
                raise Unavailable("the engine is shutting down")
            self._inbox.waiting.append(request)
            self._changed.notify_all()

    def cancel(self, request_id: str, finish: str = "abort") -> None:
        """End a request at the next step boundary, with `finish`. Unknown and finished ones are ignored."""
        with self._changed:
            self._inbox.cancelled[request_id] = finish
            self._changed.notify_all()

    def set_gammas(self, gammas: Sequence[int]) -> None:
        """Drafted tokens at batch size 1, 2, ..., in force from the next step. Raises `Refused` for what cannot run."""
        most = self.target.gamma_max if self.drafter is not None else 0
        if not gammas or any(not 0 <= gamma <= most for gamma in gammas):
            raise Refused(f"gammas must be one or more whole numbers in 0..{most}, one for each batch size")
        self.gammas = tuple(gammas)

    def between_steps(self, action: Callable[[], Any]) -> "Future[Any]":
        """Have the step thread run `action` before its next step; the future gives its result or exception."""
        future: Future[Any] = Future()
        with self._changed:
            if self._inbox.closed:
                future.set_exception(Unavailable("the engine is shutting down"))
                return future
            self._inbox.actions.append((action, future))
            self._changed.notify_all()
        return future

    def take_counts(self) -> tuple[tuple[StepCounts, ...], tuple[RequestStats, ...]]:
        """Counters since the last call."""
        with self._changed:
            counts, self._counts = self._counts, {}
            finished, self._finished = tuple(self._finished), deque[RequestStats](maxlen=MAX_FINISHED)
        steps = [
            StepCounts(batch, gamma, item.steps, item.seconds, tuple(item.accepted))
            for (batch, gamma), item in sorted(counts.items())
        ]
        return tuple(steps), finished

    @property
    def version(self) -> str:
        """The draft that serves now, or ""."""
        return self.drafter.draft.version if self.drafter is not None else ""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._inbox.waiting)

    def close(self) -> None:
        """Take no more requests; `run` returns once those accepted so far are done."""
        with self._changed:
            self._inbox.closed = True
            self._changed.notify_all()

    # --- the step thread ---

    def run(self) -> None:
        """Step until closed and drained."""
        while True:
            with self._changed:
                while not (self._running or self._inbox.waiting or self._inbox.actions or self._inbox.closed):
                    self._changed.wait()
                if self._inbox.closed and not (self._running or self._inbox.waiting or self._inbox.actions):
                    return
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Actions, cancellations, admission, then one decoding step of everything that runs."""
        self._act()
        self._drop_cancelled()
        self._admit()
        if self._running:
            self._decode()

    def abort_all(self) -> None:
        """End every request now, as aborted."""
        with self._changed:
            waiting, self._inbox.waiting = list(self._inbox.waiting), deque[Request]()
        for request in waiting:
            request.emit(Output([], "abort", _stats(request, 0, self.version)))
        for running in self._running:
            running.finish = "abort"
        self._remove_finished()

    def _act(self) -> None:
        while self._inbox.actions:
            perform(*self._inbox.actions.popleft())

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._inbox.cancelled = self._inbox.cancelled, {}
            dropped = [request for request in self._inbox.waiting if request.id in cancelled]
            for request in dropped:
                self._inbox.waiting.remove(request)
        for request in dropped:
            request.emit(Output([], cancelled[request.id], _stats(request, 0, self.version)))
        for running in self._running:
            running.finish = cancelled.get(running.request.id, "")
        self._remove_finished()

    def _admit(self) -> None:
        first, rows = len(self._running), 0
        while rows < PREFILL_CHUNK and len(self._running) < self.target.max_batch:
            with self._changed:
                if not self._inbox.waiting:
                    break
                request = self._inbox.waiting.popleft()
                rows += len(request.prompt)
                self._running.append(self._start(request))
        for count in _groups([len(running.request.prompt) for running in self._running[first:]]):
            self._prefill(first, count)
            first += count
        self._remove_finished()

    def _start(self, request: Request) -> _Running:
        tokens = list(request.prompt)
        context = Context(tokens, request.params, generator(request.params, self.target.device))
        limit = min(len(tokens) + request.max_tokens, self.target.max_context)
        return _Running(request, tokens, limit, context)

    def _prefill(self, first: int, count: int) -> None:
        """Compute the prompts in slots first.. together and choose their first tokens.

        Shorter prompts are padded behind their end; what the padding leaves in the caches is overwritten before it is seen.
        """
        group = self._running[first : first + count]
        for slot, running in enumerate(group, first):
            if self.drafter is not None:
                self.drafter.reset(slot)
            if self._tap is not None:
                self._tap.begin(running.request.id, running.request.prompt, running.request.opt_out)
        width = max(len(running.request.prompt) for running in group)
        last = torch.empty(count, self.target.hidden, dtype=self.target.dtype, device=self.target.device)
        for start in range(0, width, PREFILL_CHUNK):
            n = min(width - start, PREFILL_CHUNK)
            chunks = [list(running.request.prompt[start : start + n]) for running in group]
            ids = torch.tensor([chunk + [0] * (n - len(chunk)) for chunk in chunks], device=self.target.device)
            states = self.target.forward(ids, first, [start] * count)
            for i, (running, chunk) in enumerate(zip(group, chunks, strict=True)):
                rows = states[i, : len(chunk)]
                self._keep(first + i, start, rows)
                if self._tap is not None and chunk:
                    segment = (running.request.id, start, len(chunk))
                    self._tap.record([segment], chunk, rows[:, : self._tapped_states])
                if chunk and start + len(chunk) == len(running.request.prompt):
                    last[i] = rows[-1, -1]
        logits = self.target.logits(last)
        best = logits.argmax(dim=-1).tolist()
        for i, running in enumerate(group):
            self._extend(running, self._verify(running, None, [], logits[i : i + 1], [best[i]]))

    def _decode(self) -> None:
        started = time.perf_counter()
        batch = len(self._running)
        gamma = self.gammas[min(batch, len(self.gammas)) - 1]
        limit = self._running[0].request.gamma_limit
        if batch == 1 and limit is not None:
            gamma = min(gamma, limit)
        drafted: list[list[int]] = [[] for _ in self._running]
        proposals: list[Proposal | None] = [None] * batch
        if gamma and self.drafter is not None:
            drafted, proposals = self.drafter.propose([running.context for running in self._running], gamma)
        inputs = [[running.tokens[-1], *tokens] for running, tokens in zip(self._running, drafted, strict=True)]
        starts = [running.rows for running in self._running]
        states = self.target.forward(torch.tensor(inputs, device=self.target.device), 0, starts)
        logits = self.target.logits(states[:, :, -1])
        best = logits.argmax(dim=-1).tolist()
        accepted = [0] * (gamma + 1)
        segments: list[tuple[str, int, int]] = []
        for slot, running in enumerate(self._running):
            tokens = self._verify(running, proposals[slot], drafted[slot], logits[slot], best[slot])
            accepted[len(tokens) - 1] += 1
            running.decode_steps += 1
            running.spec_steps += int(gamma > 0)
            running.drafted += gamma
            running.accepted += len(tokens) - 1
            kept = self._extend(running, tokens)
            self._keep(slot, starts[slot], states[slot, :kept])
            segments.append((running.request.id, starts[slot], kept))
        self._record(segments, inputs, states)
        self._count(batch, gamma, accepted, time.perf_counter() - started)
        self._remove_finished()

    def _verify(
        self, running: _Running, proposal: Proposal | None, drafted: list[int], logits: torch.Tensor, best: list[int]
    ) -> list[int]:
        """The accepted tokens and one more. logits: [len(drafted) + 1, vocab]; best: their argmax."""
        context = running.context
        if context.source is not None:
            return accept_sampled(proposal, logits, context.params, context.source)
        return accept_greedy(drafted, best)

    def _extend(self, running: _Running, tokens: list[int]) -> int:
        """Append the tokens up to the request's end, emit them, and say how many there were."""
        tokens = tokens[: running.limit - len(running.tokens)]
        if not running.request.ignore_eos:
            end = next((i for i, token in enumerate(tokens) if token in self.target.eos), None)
            if end is not None:
                tokens, running.finish = tokens[: end + 1], "stop"
        running.tokens.extend(tokens)
        if not running.finish and len(running.tokens) >= running.limit:
            running.finish = "length"
        running.request.emit(Output(tokens))
        return len(tokens)

    def _keep(self, slot: int, position: int, states: torch.Tensor) -> None:
        if self.drafter is not None:
            self.drafter.feed(slot, position, states[:, :-1])

    def _record(self, segments: list[tuple[str, int, int]], inputs: list[list[int]], states: torch.Tensor) -> None:
        """Hand the step's accepted rows to the tap: request i's are its first segments[i][2] inputs."""
        if self._tap is None:
            return
        b, n = states.shape[:2]
        rows = states[:, :, : self._tapped_states].reshape(b * n, self._tapped_states, -1)
        chosen = [slot * n + j for slot, (_, _, kept) in enumerate(segments) for j in range(kept)]
        if len(chosen) < b * n:
            rows = rows[torch.tensor(chosen, device=rows.device)]
        ids = [token for row, (_, _, kept) in zip(inputs, segments, strict=True) for token in row[:kept]]
        self._tap.record(segments, ids, rows)

    def _count(self, batch: int, gamma: int, accepted: list[int], seconds: float) -> None:
        with self._changed:
            counts = self._counts.setdefault((batch, gamma), _Counts([0] * (gamma + 1)))
            counts.steps += 1
            counts.seconds += seconds
            counts.accepted = [total + new for total, new in zip(counts.accepted, accepted, strict=True)]
        self.totals.steps += 1
        self.totals.step_s += seconds

    def _remove_finished(self) -> None:
        """Take finished requests out, filling each hole with the last slot so that the running ones stay compact."""
        for slot in reversed(range(len(self._running))):
            running = self._running[slot]
            if not running.finish:
                continue
            stats = self._stats(running)
            if self._tap is not None:
                self._tap.end(running.request.id, running.finish, running.tokens[running.rows :])
            with self._changed:
                self._finished.append(stats)
            self._total(running.finish, stats)
            running.request.emit(Output([], running.finish, stats, running.decode_steps))
            last = self._running.pop()
            if last is not running:
                self.target.cache.move(len(self._running), slot, last.rows)
                if self.drafter is not None:
                    self.drafter.move(len(self._running), slot, last.rows)
                self._running[slot] = last

    def _total(self, finish: str, stats: RequestStats) -> None:
        totals = self.totals
        totals.finished[finish] += 1
        totals.prompt_tokens += stats.prompt_tokens
        totals.output_tokens += stats.output_tokens
        totals.drafted += stats.drafted
        totals.accepted += stats.accepted

    def _stats(self, running: _Running) -> RequestStats:
        prompt = len(running.request.prompt)
        return RequestStats(
            prompt_tokens=prompt,
            output_tokens=len(running.tokens) - prompt,
            spec_steps=running.spec_steps,
            drafted=running.drafted,
            accepted=running.accepted,
            version=self.version,
            temperature=running.request.params.plain,
            cached_tokens=0,  # it has no prefix cache
        )


def _groups(lengths: list[int]) -> list[int]:
    """Sizes of runs of neighbouring prompts that are computed together: those whose padding costs at most a quarter."""
    sizes: list[int] = []
    group: list[int] = []
    for length in lengths:
        group.append(length)
        if len(group) > 1 and len(group) * max(group) <= 1.25 * sum(group):
            sizes[-1] += 1
        else:
            sizes.append(1)
            group = [length]
    return sizes


def _stats(request: Request, output_tokens: int, version: str) -> RequestStats:
    return RequestStats(len(request.prompt), output_tokens, 0, 0, 0, version, request.params.plain, 0)
