"""What vLLM's scheduler knows: acceptance per request and step, batch sizes, step times; and the schedule that it drafts by."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tided.engine.plugin import Faults, plain_temperature
from tided.model.engines import RequestStats, StepCounts
from tided.model.errors import Refused

PLACE = "acceptance counts"


@dataclass(slots=True)
class _Counts:
    accepted: list[int]
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests that verified `gamma` drafted tokens in one step, by the tokens accepted of each. `share`: of the step's tokens, those of
    these requests: a step may compute prompts as well."""

    gamma: int
    accepted: list[int]
    share: float


@dataclass(slots=True)
class _Request:
    spec_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    cached: int | None = None

    def add(self, drafted: int, accepted: int) -> None:
        self.spec_steps += 1
        self.drafted += drafted
        self.accepted += accepted


class SchedulerCounts:
    """Hooks on one scheduler instance. The scheduler's thread counts, any thread takes."""

    def __init__(self, scheduler: Any, faults: Faults, version: Callable[[], str]) -> None:
        """`version` gives the draft that serves now."""
        self._scheduler, self._faults, self._version = scheduler, faults, version
        self._lock = threading.Lock()
        self._counts: dict[tuple[int, int], _Counts] = {}
        self._finished: list[RequestStats] = []
        self._requests: dict[str, _Request] = {}
        self._began_s: dict[int, float] = {}  # by id of the scheduler output
        self._ended_s = 0.0
        self._goes_on = False  # requests were left to run when the newest step ended
        self.scheduled = 0  # steps so far, whoever they were for
        self.proposed = -1  # tokens that the newest step was to draft for the next; -1: not known
        self.paused = False  # while a profile runs requests of its own
        self._hook_schedule()
        self._hook_update()
        self._hook_free()

    def take(self) -> tuple[tuple[StepCounts, ...], tuple[RequestStats, ...]]:
        """The counters and finished requests since the previous call."""
        with self._lock:
            counts, self._counts = self._counts, {}
            finished, self._finished = self._finished, []
        steps = tuple(
            StepCounts(batch, gamma, item.steps, item.seconds, tuple(item.accepted))
            for (batch, gamma), item in sorted(counts.items())
        )
        return steps, tuple(finished)

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    def _hook_schedule(self) -> None:
        original = self._scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            # From the end of the step before, where one follows the other: what vLLM does between them is time that requests wait, too.
            began = self._ended_s if self._goes_on else time.perf_counter()
            output = original(*args, **kwargs)
            self.scheduled += 1
            self.proposed = getattr(output, "num_spec_tokens_to_schedule", -1)
            if not self.paused and len(self._began_s) < 64:
                self._began_s[id(output)] = began
            return output

        self._scheduler.schedule = schedule

    def _hook_update(self) -> None:
        original = self._scheduler.update_from_output

        def update_from_output(scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
            batches: list[_Batch] = []
            if not self.paused:
                try:
                    batches = self._batches(scheduler_output, model_runner_output)
                except Exception as exc:  # noqa: BLE001 - counting must never disturb a step
                    self._faults.note(PLACE, exc)
            result = original(scheduler_output, model_runner_output, *args, **kwargs)
            self._count(scheduler_output, batches)
            return result

        self._scheduler.update_from_output = update_from_output

    def _hook_free(self) -> None:
        original = self._scheduler._free_request

        def free_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.paused:
                try:
                    self._finish(request)
                except Exception as exc:  # noqa: BLE001 - counting must never disturb a step
                    self._faults.note(PLACE, exc)
            return original(request, *args, **kwargs)

        self._scheduler._free_request = free_request

    def _batches(self, scheduled: Any, output: Any) -> list[_Batch]:
        """The decoding requests of a step with the tokens accepted by each; those that verify equally many drafted tokens are one batch."""
        sampled = output.sampled_token_ids
        if not sampled:
            return []
        accepted: defaultdict[int, list[int]] = defaultdict(list)
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            request = self._scheduler.requests.get(request_id)
            prefill = getattr(request, "prefill_stats", None)  # vLLM takes it away with the first token
            if prefill is not None and prefill.num_prompt_tokens:
                self._requests.setdefault(request_id, _Request()).cached = int(prefill.num_cached_tokens)
            emitted = sampled[output.req_id_to_index[request_id]]
            if request is None or request.is_finished() or not emitted:
                continue
            drafts = len(scheduled.scheduled_spec_decode_tokens.get(request_id, ()))
            if drafts or (request.num_output_tokens and tokens == 1):
                gamma = drafts - (scheduled.num_invalid_spec_tokens or {}).get(request_id, 0)
                accepted[gamma].append(len(emitted) - 1)
                if gamma:
                    self._requests.setdefault(request_id, _Request()).add(gamma, len(emitted) - 1)
        total = sum(scheduled.num_scheduled_tokens.values())
        return [_Batch(gamma, tokens, len(tokens) * (gamma + 1) / total) for gamma, tokens in accepted.items()]

    def _count(self, scheduled: Any, batches: list[_Batch]) -> None:
        """A step's batches with its seconds: since it was scheduled or, where steps overlap, since the one before ended."""
        now = time.perf_counter()
        began, self._ended_s = max(self._began_s.pop(id(scheduled), now), self._ended_s), now
        self._goes_on = bool(self._scheduler.running)
        with self._lock:
            for batch in batches:
                key = len(batch.accepted), batch.gamma
                counts = self._counts.setdefault(key, _Counts([0] * (batch.gamma + 1)))
                counts.steps += 1
                counts.seconds += (now - began) * batch.share
                for tokens in batch.accepted:
                    counts.accepted[tokens] += 1

    def _finish(self, request: Any) -> None:
        counts = self._requests.pop(request.request_id, None) or _Request()
        stats = RequestStats(
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=request.num_output_tokens,
            spec_steps=counts.spec_steps,
            drafted=counts.drafted,
            accepted=counts.accepted,
            version=self._version(),
            temperature=plain_temperature(request.sampling_params),
            cached_tokens=counts.cached,
        )
        with self._lock:
            self._finished.append(stats)


class Schedule:
    """Drafted tokens by batch size, by replacing the table that the scheduler looks them up in."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.gamma_max = int(scheduler.num_spec_tokens)
        table = scheduler.dynamic_sd_lookup
        self.available = bool(table) and self.gamma_max > 0
        self._size = len(table or ())
        self.gammas: tuple[int, ...] = tuple((table or ())[1:]) or (self.gamma_max,)

    def check(self, gammas: tuple[int, ...]) -> None:
        """Raises `Refused` for a schedule that this engine cannot draft by."""
        if not self.available:
            raise Refused("vLLM was started without num_speculative_tokens_per_batch_size, so its schedule is fixed")
        if not gammas or not all(0 <= gamma <= self.gamma_max for gamma in gammas):
            raise Refused(f"gammas must be one or more whole numbers in 0..{self.gamma_max}, one for each batch size")

    def set(self, gammas: tuple[int, ...]) -> None:
        """In force from the next scheduled step. Only between two steps."""
        self.check(gammas)
        at = [gammas[min(batch, len(gammas)) - 1] for batch in range(1, self._size)]
        self._scheduler.dynamic_sd_lookup = [at[0], *at]
        self.gammas = gammas
