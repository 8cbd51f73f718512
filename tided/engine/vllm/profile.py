"""The latency profile: T(n) and D(b) as Eq. 5 of TIDE reads them, measured with vLLM's own steps on requests of our own.

Runs between two steps of an idle engine: requests of `CONTEXT` tokens are scheduled like any other, with nobody to receive their
output, never tapped and never counted. A step that verifies gamma drafted tokens for b requests is a target forward over
n = b x (gamma + 1) tokens plus one proposal of gamma tokens; the proposals are timed inside it. When a real request arrives the
measurement gives up.
"""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tided.engine.vllm import worker
from tided.engine.vllm.counts import Schedule, SchedulerCounts
from tided.engine.vllm.optout import MARK
from tided.model.engines import LatencyProfile
from tided.model.errors import Unavailable
from tided.model.ids import new_id

CONTEXT = 96
PASSES = 3
REPEATS = 3
WARM_UP = 1  # the first step after a change still verifies what was drafted before it
MAX_BATCH = 32
_PREFILL_STEPS = 400


def measure(
    core: Any, schedule: Schedule, counts: SchedulerCounts, interrupted: Callable[[], bool], *, draft_rests: bool
) -> LatencyProfile:
    """Medians of a few steps of each shape. Raises `Unavailable` when the engine is busy or, as `interrupted` says, gets work.

    `draft_rests`: in service its forward is left out once nothing has been drafted for a few steps.
    """
    if core.scheduler.has_requests():
        raise Unavailable("the engine is serving; a profile is measured only while nothing runs")
    max_batch = min(int(core.scheduler.max_num_running_reqs), MAX_BATCH)
    batches = sorted({1, max_batch, *(2**k for k in range(1, 6) if 2**k < max_batch)})
    target_s: defaultdict[int, list[float]] = defaultdict(list)
    draft_s: defaultdict[int, list[float]] = defaultdict(list)
    before = schedule.gammas
    with _undisturbed(core, counts):
        try:
            for batch, gamma, seconds, drafting_s in _samples(core, schedule, batches, interrupted):
                target_s[batch * (gamma + 1)].append(seconds - drafting_s)
                if gamma:
                    draft_s[batch].append(drafting_s / gamma)
        finally:
            schedule.set(before)
    return LatencyProfile(
        tokens=tuple(sorted(target_s)),
        target_s=tuple(statistics.median(target_s[n]) for n in sorted(target_s)),
        batches=tuple(sorted(draft_s)),
        draft_s=tuple(statistics.median(draft_s[b]) for b in sorted(draft_s)),
        idle_drafts=0.0 if draft_rests else 1.0,
    )


def _samples(
    core: Any, schedule: Schedule, batches: Sequence[int], interrupted: Callable[[], bool]
) -> Iterator[tuple[int, int, float, float]]:
    """(batch size, drafted tokens, seconds of a step, of the proposal in it). Every shape in several passes: what disturbs the machine
    for a moment then spoils a few steps of each of them, and not all of one."""
    for _, batch in itertools.product(range(PASSES), batches):
        with _requests(core, batch, schedule.gamma_max):
            for gamma in range(schedule.gamma_max + 1):
                schedule.set((gamma,))
                for seconds, drafting_s in _steps(core, batch, interrupted):
                    yield batch, gamma, seconds, drafting_s


def _steps(core: Any, batch: int, interrupted: Callable[[], bool]) -> Iterator[tuple[float, float]]:
    """(seconds of the step, of the proposal in it) of steps that verified what the schedule says: the first ones are warm-up."""
    for step in range(WARM_UP + REPEATS):
        if interrupted():
            raise Unavailable("a request came; a profile is measured only while nothing runs")
        core.collective_rpc(worker.take_timings)
        began = time.perf_counter()
        _step(core)
        seconds = time.perf_counter() - began
        if step >= WARM_UP and len(core.scheduler.running) == batch:
            yield seconds, sum(core.collective_rpc(worker.take_timings)[0])


def _step(core: Any) -> None:
    _, executed = core.step_fn()
    core.post_step(executed)


@contextmanager
def _undisturbed(core: Any, counts: SchedulerCounts) -> Generator[None]:
    """The measurement's own steps are timed inside, always draft, and are counted nowhere."""
    counts.paused = True
    core.collective_rpc(worker.begin_timing)
    try:
        yield
    finally:
        core.collective_rpc(worker.end_timing)
        counts.paused = False


@contextmanager
def _requests(core: Any, batch: int, gamma_max: int) -> Generator[None]:
    """`batch` requests that are past their prompts; aborted at the end."""
    aborted = import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
    context = min(CONTEXT, int(core.vllm_config.model_config.max_model_len) // 2)
    names = [f"{MARK}-{new_id('profile')}" for _ in range(batch)]
    vocabulary = int(core.vllm_config.model_config.get_vocab_size())
    try:
        for number, name in enumerate(names):
            # Prompts that differ, so that no prefix cache serves them.
            prompt = [(7 + 31 * i + 101 * number) % vocabulary for i in range(context)]
            core.scheduler.add_request(_request(core, name, prompt, (WARM_UP + REPEATS) * (gamma_max + 1) ** 2 + 64))
        for _ in range(_PREFILL_STEPS):
            if all(request.num_output_tokens for request in core.scheduler.running) and not core.scheduler.waiting:
                break
            _step(core)
        yield
    finally:
        core.scheduler.finish_requests(names, aborted)
        for _ in range(_PREFILL_STEPS):
            if not core.scheduler.has_requests():
                break
            _step(core)


def _request(core: Any, name: str, prompt: list[int], tokens: int) -> Any:
    tokens = min(tokens, int(core.vllm_config.model_config.max_model_len) - len(prompt) - 1)
    params = import_module("vllm.sampling_params").SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    request = import_module("vllm.v1.engine").EngineCoreRequest(
        request_id=name,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return core.preprocess_add_request(request)[0]
