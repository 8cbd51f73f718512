"""The entry point of `sglang.srt.plugins`: registers the hooks through which a scheduler process becomes one of tided's engines.

SGLang loads plugins in its main process, in every scheduler and in the detokenizer; what a process does not use, it never calls. An
exception out of a hook would kill SGLang's scheduler, so every hook is guarded: it counts, logs once and serving goes on.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tided.engine.plugin import NO_CAPTURE_HEADER, Faults, PluginSettings
from tided.engine.sglang.rows import OPT_OUT
from tided.engine.sglang.steps import Schedule, params_class

if TYPE_CHECKING:
    from tided.engine.sglang.runtime import Runtime

WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
PARAMETERS = "sglang.srt.speculative.adaptive_spec_params.AdaptiveSpeculativeParams"
STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

TARGETS = (
    f"{WORKER}.forward_batch_generation",
    f"{WORKER}.verify",
    PARAMETERS,
    f"{SCHEDULER}.run_event_loop",
    f"{SCHEDULER}.process_input_requests",
    f"{SCHEDULER}.process_batch_result",
    f"{SCHEDULER}.abort_request",
    f"{STATE}.get_internal_state",
    f"{TOKENIZER}.generate_request",
)
"""What is hooked; tests/engines/test_sglang_signatures.py holds their signatures."""


def register() -> None:
    """Does nothing unless TIDED_ENGINE is set. Raises `Refused` for settings that cannot be meant, which SGLang logs."""
    settings = PluginSettings.from_environment()
    if settings is None:
        return
    registry: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    module, _, name = PARAMETERS.rpartition(".")
    base: type[Any] = getattr(importlib.import_module(module), name)
    # Not before it is needed: every process of SGLang loads this module.
    from tided.engine.sglang.runtime import Runtime

    faults, schedule = Faults(), Schedule()
    hooks = Hooks(Runtime(settings, schedule, faults), faults)
    kinds = registry.HookType
    registered: list[tuple[str, Callable[..., Any], Any]] = [
        (f"{WORKER}.forward_batch_generation", hooks.forward, kinds.AROUND),
        (f"{WORKER}.verify", hooks.verify, kinds.AROUND),
        (PARAMETERS, params_class(base, schedule, faults, settings.gammas), kinds.REPLACE),
        (f"{SCHEDULER}.run_event_loop", hooks.event_loop, kinds.AROUND),
        (f"{SCHEDULER}.process_input_requests", hooks.between_steps, kinds.BEFORE),
        (f"{SCHEDULER}.process_batch_result", hooks.result, kinds.AROUND),
        (f"{SCHEDULER}.abort_request", hooks.aborted, kinds.AFTER),
        (f"{STATE}.get_internal_state", hooks.internal_state, kinds.AFTER),
        (f"{TOKENIZER}.generate_request", mark_opt_out, kinds.BEFORE),
    ]
    for target, hook, kind in registered:
        registry.HookRegistry.register(target, hook, kind)


class Hooks:
    """The hooks of a scheduler process, in SGLang's calling conventions."""

    def __init__(self, runtime: "Runtime", faults: Faults) -> None:
        self._runtime, self._faults = runtime, faults

    def event_loop(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        self._guarded("start", self._runtime.start, scheduler)
        try:
            return original(scheduler, *args, **kwargs)
        finally:
            self._guarded("end", self._runtime.close)

    def between_steps(self, *_: Any, **__: Any) -> None:
        self._guarded("step boundary", self._runtime.boundary.run)

    def forward(self, original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        step = self._guarded("forward", self._runtime.before_forward, batch)
        result = original(worker, batch, *args, **kwargs)
        if step is not None:
            self._guarded("forward", self._runtime.after_forward, step, worker, result)
        return result

    def verify(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._runtime.timer.verify(original, *args, **kwargs)

    def result(
        self, original: Callable[..., Any], scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any
    ) -> Any:
        before = self._guarded("result", self._runtime.before_result, batch)
        returned = original(scheduler, batch, result, *args, **kwargs)
        if before is not None:
            self._guarded("result", self._runtime.after_result, batch, result, before)
        return returned

    def aborted(self, _: Any, scheduler: Any, *__: Any, **___: Any) -> None:
        self._guarded("abort", self._runtime.after_abort, scheduler)

    def internal_state(self, result: Any, *_: Any, **__: Any) -> None:
        self._guarded("internal state", self._runtime.describe_in, result)

    def _guarded(self, where: str, body: Callable[..., Any], *args: Any) -> Any:
        try:
            return body(*args)
        except Exception as exc:  # noqa: BLE001 - the one guard of the hooks: the engine serves first
            self._faults.note(where, exc)
            return None


_faults = Faults()


def mark_opt_out(_: Any, obj: Any, request: Any = None, *__: Any, **___: Any) -> None:
    """In SGLang's main process: carry the header into the request's custom parameters, which reach the scheduler."""
    try:
        if request is None or request.headers.get(NO_CAPTURE_HEADER, "") != "1":
            return
        if obj.sampling_params is None:
            obj.sampling_params = {}
        given = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
        for parameters in given:
            parameters["custom_params"] = {**(parameters.get("custom_params") or {}), OPT_OUT: True}
    except Exception as exc:  # noqa: BLE001 - the engine serves first
        _faults.note("opt-out header", exc)
