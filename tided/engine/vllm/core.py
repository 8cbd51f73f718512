"""The engine core's process: everything of tided is put together around its busy loop, and taken down after it.

Whatever fails while attaching is logged, and the engine serves without tided.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from tided.draft.target import describe
from tided.engine.agent import EngineAgent
from tided.engine.fetch import cache_dir
from tided.engine.plugin import Faults
from tided.engine.tap import TapSettings
from tided.engine.vllm import worker
from tided.engine.vllm.boundary import StepBoundary
from tided.engine.vllm.control import VllmControl
from tided.engine.vllm.counts import Schedule, SchedulerCounts
from tided.engine.vllm.remote import RemoteTap
from tided.engine.vllm.settings import VllmSettings
from tided.engine.vllm.worker import AttachRequest
from tided.model.engines import TargetInfo
from tided.model.errors import Refused
from tided.model.ids import new_id

log = logging.getLogger("vllm.tided")  # under vLLM's own logger, so that its handlers show it

CLOSE_S = 2.0
"""vLLM kills its core 5 s after it asked it to end."""


class Session:
    """One engine core with tided attached."""

    def __init__(self, core: Any, settings: VllmSettings) -> None:
        config = core.vllm_config
        speculation = config.speculative_config
        if speculation is None or speculation.method != "eagle3":
            raise Refused(
                "vLLM was started without an EAGLE-3 draft (--speculative-config); there is nothing for tided to do"
            )
        self._core = core
        engine = settings.plugin.engine + (f"-{core.engine_index}" if core.engine_index else "")
        incarnation = new_id("run")
        target = describe(_directory(config.model_config.model))
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        states = len(target.aux_layers) + int(settings.plugin.last_hidden)
        tap = TapSettings(
            engine=engine,
            incarnation=incarnation,
            target=target.digest,
            states=states,
            hidden=target.hidden,
            dtype=dtype,
            has_last=settings.plugin.last_hidden,
            ring_slots=settings.plugin.ring_slots,
        )
        request = AttachRequest(
            tap=tap if _layers(speculation, target) else None,
            redis_url=settings.plugin.redis_url,
            skip_draft_after=settings.skip_draft_after,
            draft_dir=str(_directory(speculation.draft_model_config.model)),
        )
        ranks = core.collective_rpc(worker.attach, args=(request,))
        self.faults = Faults()
        schedule = Schedule(core.scheduler)
        counts = SchedulerCounts(core.scheduler, self.faults, lambda: self._control.version)
        _spare_empty_drafts(core, counts)
        self._boundary = _boundary(core)
        self._tap = RemoteTap(
            lambda timeout_s, method, *args: self._boundary.call(
                lambda: core.collective_rpc(method, args=args), timeout_s
            ),
            lambda: counts.scheduled,
        )
        self._control = VllmControl(
            core,
            self._boundary,
            schedule,
            counts,
            ranks,
            self._tap,
            engine=engine,
            incarnation=incarnation,
            url=settings.url,
            target=target,
            last_hidden=settings.plugin.last_hidden,
            draft_rests=settings.skip_draft_after > 0 and all(rank.runner == "v1" for rank in ranks),
            faults=self.faults,
        )
        if schedule.available:
            schedule.set(settings.plugin.gammas)
        if settings.plugin.profile:
            self._control.measure_at_start()
        self._agent = EngineAgent(
            settings.plugin.redis_url,
            engine,
            incarnation,
            self._control,
            self._tap,
            report_interval_s=settings.plugin.report_interval_s,
            drafts_dir=cache_dir(engine),
        )
        self._agent.start()
        for rank in ranks:
            log.info(
                "tided: %s rank %d: draft %s, swaps %s", rank.runner, rank.rank, rank.version[:12], rank.swap or "yes"
            )

    def close(self) -> None:
        """Send what was captured, say that the engine is gone."""
        self._boundary.close()
        self._tap.take(self._core.collective_rpc(worker.close, args=(CLOSE_S,)))
        self._agent.close(CLOSE_S)


def attach(core: Any) -> Session | None:
    """Attach tided to an engine core. Never raises."""
    try:
        settings = VllmSettings.from_environment()
        return Session(core, settings) if settings is not None else None
    except Exception as exc:  # noqa: BLE001 - the engine serves without tided
        log.error("tided is not attached, the engine serves without it: %s: %s", type(exc).__name__, exc)
        return None


def detach(session: Session | None) -> None:
    """Never raises."""
    try:
        if session is not None:
            session.close()
    except Exception as exc:  # noqa: BLE001 - the engine ends in its own order
        log.error("tided: detaching failed: %s", type(exc).__name__)


def _spare_empty_drafts(core: Any, counts: SchedulerCounts) -> None:
    """After each step vLLM asks its workers for the tokens that they drafted, a round trip between processes. When the step was to draft
    none, the answer is known. Not with a batch queue: there the newest scheduled step is not the one that has just been executed."""
    take = core.post_step

    def post_step(model_executed: bool) -> None:
        if counts.proposed != 0 or core.batch_queue is not None:
            take(model_executed)

    core.post_step = post_step


def _boundary(core: Any) -> StepBoundary:
    return StepBoundary(core, (import_module("vllm.v1.engine").EngineCoreRequestType.WAKEUP, None))


def _layers(speculation: Any, target: TargetInfo) -> bool:
    """Whether the draft reads the states of the layers that tided's drafts are trained on."""
    given = getattr(speculation.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None)
    return not given or tuple(given) == target.aux_layers


def _directory(model: str) -> Path:
    """Where a model's files are: a directory, or a repository that is in the local cache."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))
