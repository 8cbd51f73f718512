"""The entry point of group `vllm.general_plugins`. vLLM calls it in each of its processes, before anything is built.

Patches of classes, each of which does what it did before unless an engine core runs with TIDED_ENGINE set:
the core's busy loop (attach before it, detach after it); on processors the loading of the draft, whose linears must stay replaceable
(`tided.engine.vllm.packing`), and what loses the temperature of sampled requests (`tided.engine.vllm.sampling`); and the time that the
core is given to end, which is none by default.
"""

import functools
import logging
from importlib import import_module
from typing import Any

from tided.engine.vllm.sampling import mend
from tided.engine.vllm.settings import VllmSettings
from tided.model.errors import Refused

log = logging.getLogger("vllm.tided")

_MARK = "_tided"
END_S = 8.0
"""What the core is given to end when vLLM gives it nothing."""


def register() -> None:
    """Idempotent; does nothing without TIDED_ENGINE. Never raises."""
    try:
        settings = VllmSettings.from_environment()
        if settings is None:
            return
        _patch_core()
        import_module("tided.engine.vllm.packing").patch()
        if settings.mend_sampling:
            mend(import_module("vllm.utils.cpu_triton_utils"))
        _patch_ending()
    except Refused as exc:
        log.error("tided is not attached, the engine serves without it: %s", exc)
    except Exception as exc:  # noqa: BLE001 - another release of vLLM: it serves without tided
        log.error("tided does not fit this vLLM, which serves without it: %s: %s", type(exc).__name__, exc)


def _patch_core() -> None:
    core = import_module("vllm.v1.engine.core")

    for cls in (core.EngineCoreProc, core.DPEngineCoreProc):
        if "run_busy_loop" in vars(cls) and not hasattr(cls.run_busy_loop, _MARK):
            cls.run_busy_loop = _around(cls.run_busy_loop)


def _around(run_busy_loop: Any) -> Any:
    @functools.wraps(run_busy_loop)
    def attached(self: Any, *args: Any, **kwargs: Any) -> Any:
        from tided.engine.vllm.core import attach, detach

        session = attach(self)
        try:
            return run_busy_loop(self, *args, **kwargs)
        finally:
            detach(session)

    setattr(attached, _MARK, True)
    return attached


def _patch_ending() -> None:
    """vLLM kills its core at once after asking it to end, unless --shutdown-timeout is given. What was tapped is sent first."""
    utils = import_module("vllm.v1.engine.utils")
    original = utils.get_engine_process_shutdown_timeout
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def with_grace(request_timeout: Any, process_timeout: Any) -> Any:
        timeout = original(request_timeout, process_timeout)
        return END_S if timeout == 0 and request_timeout == 0 else timeout

    setattr(with_grace, _MARK, True)
    vars(utils)["get_engine_process_shutdown_timeout"] = with_grace
