"""What one scheduler process of SGLang has of tided: the tap, its publisher and the agent, and what the hooks hand to them."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tided.draft.target import TargetShape, describe
from tided.engine.agent import EngineAgent
from tided.engine.boundary import Boundary
from tided.engine.fetch import cache_dir
from tided.engine.plugin import Faults, PluginSettings
from tided.engine.publisher import Publisher
from tided.engine.sglang.control import Limits, SglangControl
from tided.engine.sglang.profile import StepTimer
from tided.engine.sglang.rows import RowTap, Step
from tided.engine.sglang.steps import Schedule, StepBook
from tided.engine.sglang.weights import DraftWeights
from tided.engine.tap import Tap, TapSettings
from tided.model.errors import Refused, TideError, Unavailable
from tided.model.ids import new_id

log = logging.getLogger(__name__)

WORKER_CLASS = "EAGLEWorkerV2"
PROFILE_RETRY_S = 2.0
PROFILE_TRIES = 60
_STEP = "tided_step"


class Runtime:
    """Made when the plugin is registered; lives from `start` to `close` in a scheduler of rank 0, and is idle elsewhere."""

    def __init__(self, settings: PluginSettings, schedule: Schedule, faults: Faults) -> None:
        self.boundary, self.timer = Boundary(), StepTimer()
        self._settings, self._schedule, self._faults = settings, schedule, faults
        self._rows: RowTap | None = None
        self._last: LastHidden | None = None
        self._control: SglangControl | None = None
        self._publisher: Publisher | None = None
        self._agent: EngineAgent | None = None
        self._closing = threading.Event()
        self._unknown = ""

    def start(self, scheduler: Any) -> None:
        """Connect this scheduler. Raises `Refused` for a way of serving that tided does not understand: then nothing is tapped."""
        worker, arguments = scheduler.model_worker, scheduler.server_args
        if type(worker).__name__ != WORKER_CLASS:
            raise Refused(f"SGLang serves without EAGLE-3 speculation ({type(worker).__name__})")
        for size in ("tp_size", "pp_size", "dp_size"):
            if getattr(arguments, size) != 1:
                raise Refused(f"{size} {getattr(arguments, size)}: tided drives SGLang with one rank only")
        if worker.topk != 1:
            raise Refused(f"speculative top-k {worker.topk}: tided drives chains only (top-k 1)")
        directory = _local(arguments.model_path)
        target = describe(directory)
        runner = worker.target_worker.model_runner
        if self._settings.last_hidden:
            self._last = LastHidden(runner.model)
        settings = TapSettings(
            engine=self._settings.engine,
            incarnation=new_id("run"),
            target=target.digest,
            states=len(target.aux_layers) + int(self._last is not None),
            hidden=target.hidden,
            dtype=str(runner.dtype).removeprefix("torch."),
            has_last=self._last is not None,
            ring_slots=self._settings.ring_slots,
        )
        tap = Tap(settings, pinned=not str(runner.device).startswith("cpu"))
        weights = DraftWeights(worker.draft_worker, runner.model, TargetShape(target.hidden, target.vocab))
        try:
            weights.identify(_local(arguments.speculative_draft_model_path))
        except TideError as exc:
            self._unknown = str(exc)
            log.warning("tided: the draft that serves is none of tided's (%s); a swap makes it one", exc)
        book = StepBook()
        self._rows = RowTap(tap, book, lambda: weights.version)
        self._control = SglangControl(
            settings=settings,
            target=target,
            limits=Limits(arguments.url(), int(scheduler.max_running_requests)),
            schedule=self._schedule,
            weights=weights,
            boundary=self.boundary,
            timer=self.timer,
            book=book,
            load=lambda: (self._running(), len(scheduler.waiting_queue)),
        )
        redis = self._settings.redis_url
        self._publisher = Publisher(redis, tap)
        self._agent = EngineAgent(
            redis,
            settings.engine,
            settings.incarnation,
            self._control,
            tap,
            report_interval_s=self._settings.report_interval_s,
            drafts_dir=cache_dir(settings.engine),
        )
        self._publisher.start()
        self._agent.start()
        if self._settings.profile:
            threading.Thread(target=self._profile, name="tided-profile", daemon=True).start()
        log.info("tided: engine %s, draft %s", settings.engine, weights.version[:12] or "unknown")

    def close(self) -> None:
        """Send what the tap holds and take the heartbeat away. SGLang gives a scheduler 15 s to end."""
        self._closing.set()
        if self._publisher is not None:
            self._publisher.close()
        if self._agent is not None:
            self._agent.close()

    # --- on the scheduler's thread ---

    def before_forward(self, batch: Any) -> Step | None:
        if self._rows is None:
            return None
        step = self._rows.begin_step(batch)
        if step is not None and self.timer.on:
            step.started_s = self.timer.now()
        return step

    def after_forward(self, step: Step, worker: Any, result: Any) -> None:
        if self._rows is None:
            return
        gamma = int(worker.speculative_num_steps)
        hidden = result.logits_output.hidden_states if result.logits_output is not None else None
        states = [] if hidden is None else [hidden]
        if self._last is not None:
            last = self._last.take()
            states = [] if hidden is None or last is None or last.shape[0] != hidden.shape[0] else [hidden, last]
        self._rows.ran(step, gamma, states)
        setattr(result, _STEP, step)
        if not step.prefill:
            self.timer.step(result.accept_lens.shape[0], gamma, step.started_s)

    def before_result(self, batch: Any) -> list[int] | None:
        return None if self._rows is None else self._rows.processing(batch)

    def after_result(self, batch: Any, result: Any, before: Sequence[int]) -> None:
        step: Step | None = getattr(result, _STEP, None)
        if self._rows is None or step is None:
            return
        setattr(result, _STEP, None)
        lengths: list[int] = [] if step.prefill else result.accept_lens.tolist()
        self._rows.processed(step, batch, before, lengths)

    def after_abort(self, scheduler: Any) -> None:
        """Requests that SGLang dropped while they waited never come back as results."""
        if self._rows is None:
            return
        batches = (scheduler.running_batch, scheduler.last_batch)
        kept = {request.rid for batch in batches if batch is not None for request in batch.reqs}
        kept |= {request.rid for request in scheduler.waiting_queue}
        chunked = scheduler.chunked_req
        kept |= {chunked.rid} if chunked is not None else set()
        self._rows.abandon([request for request in self._rows.tracked_ids() if request not in kept])

    def describe_in(self, result: Any) -> None:
        """tided's block in /server_info: who looks there sees that the hooks are in force."""
        if self._control is not None:
            info = self._control.info()
            result.internal_state["tided"] = {
                "engine": info.engine,
                "version": info.version,
                "unknown": "" if info.version else self._unknown,
                "gammas": list(info.gammas),
                "faults": dict(self._faults.counts),
            }

    def _running(self) -> int:
        return self._rows.running if self._rows is not None else 0

    def _profile(self) -> None:
        """Measure the latency profile once the server answers and nothing runs; without one tided would never speculate."""
        for _ in range(PROFILE_TRIES):
            if self._closing.wait(PROFILE_RETRY_S) or self._control is None:
                return
            try:
                self._control.measure_profile()
                return
            except Unavailable as exc:
                log.debug("tided: no profile yet: %s", exc)
            except Exception as exc:  # noqa: BLE001 - the one guard of this thread
                self._faults.note("profile", exc)
                return
        self._faults.note("profile", Unavailable("never idle"))


class LastHidden:
    """The target's last hidden states, after its final norm: what its logits processor is given.

    A replayed graph runs no Python, so there is nothing to take then, and the rows of that step are left out.
    """

    def __init__(self, model: Any) -> None:
        self._seen: Any = None
        model.logits_processor.register_forward_pre_hook(self._keep)

    def take(self) -> Any:
        """Those of the newest forward, once."""
        seen, self._seen = self._seen, None
        return seen

    def _keep(self, _: Any, args: tuple[Any, ...]) -> None:
        self._seen = args[1]


def _local(path: str) -> Path:
    """The directory of a checkpoint given by path or by its name in the local cache of Hugging Face."""
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path, local_files_only=True))
    except Exception as exc:
        raise Refused(f"{path} is neither a directory nor in the local cache") from exc
