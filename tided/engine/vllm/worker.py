"""In each worker's process: hooks around the runner and its draft, and what the engine core asks of it by collective RPC.

Two runners exist. V1 (processors, and CUDA where asked for) calls `drafter.propose` with keyword arguments; V2 (CUDA by default) calls
`speculator.propose` with an input batch. Both are bound by signature, so that neither order nor defaults matter.
The functions at the end are the RPCs: vLLM calls them with its worker as first argument.
"""

import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tided.engine.plugin import Faults
from tided.engine.publisher import Publisher
from tided.engine.tap import Tap, TapSettings
from tided.engine.vllm.capture import Capture, Ending, StepRows
from tided.engine.vllm.optout import opted_out
from tided.model.engines import TapTotals
from tided.model.errors import Refused, TideError, Unavailable

TAP, SWAP = "tap", "swap"


@dataclass(frozen=True, slots=True)
class Attached:
    """What a worker tells of itself. `swap` is "" when drafts can be replaced, else why not."""

    rank: int
    taps: bool
    runner: str
    version: str
    vocab_id: str
    swap: str


@dataclass(frozen=True, slots=True)
class Status:
    """A worker's counters: its tap's rows, places where hooks failed, and steps whose draft forward was left out."""

    totals: TapTotals
    broken: tuple[str, ...]
    skipped_steps: int


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """What the core tells its workers."""

    tap: TapSettings | None
    redis_url: str
    skip_draft_after: int
    draft_dir: str


class WorkerSide:
    """The hooks of one worker."""

    def __init__(self, worker: Any, request: AttachRequest) -> None:
        self.faults = Faults()
        self._runner = worker.model_runner
        self._v2 = hasattr(self._runner, "speculator")
        self._drafter: Any = self._runner.speculator if self._v2 else getattr(self._runner, "drafter", None)
        self._rank, self._ranks, self._last_stage = _place()
        self._max_len = int(self._runner.model_config.max_model_len)
        self._skip_after, self._zero_steps = request.skip_draft_after, 0
        self._last: Any = None
        self._timings: list[float] | None = None  # seconds of each draft proposal, while a profile measures
        self._skipped_steps = 0
        self.tap: Tap | None = None
        self.publisher: Publisher | None = None
        self._capture: Capture | None = None
        self.attached = Attached(self._rank, False, "v2" if self._v2 else "v1", "", "", "the engine has no draft")
        if self._drafter is None:
            return
        version, vocab_id, problem = self._find_weights(Path(request.draft_dir))
        if request.tap is not None and self._rank == 0 and self._last_stage:
            self.tap = Tap(request.tap, pinned=self._runner.device.type != "cpu")
            self._capture = Capture(self.tap)
            self.publisher = Publisher(request.redis_url, self.tap)
            self._hook_execute()
            if request.tap.has_last and not self._v2:
                self._hook_last()
        self._hook_propose()
        if not self._v2:
            self._hook_sample()
        if self.publisher is not None:
            self.publisher.start()
        self.attached = Attached(self._rank, self.tap is not None, self.attached.runner, version, vocab_id, problem)

    # --- the tap ---

    def _hook_execute(self) -> None:
        """Requests begin and end with what the scheduler tells the runner."""
        original = self._runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._follow, scheduler_output)
            return original(scheduler_output, *args, **kwargs)

        self._runner.execute_model = execute_model

    def _follow(self, scheduler_output: Any) -> None:
        assert self._capture is not None
        self._capture.settle()
        for request_id in scheduler_output.finished_req_ids:
            self._capture.end(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            params, prompt = new.sampling_params, new.prompt_token_ids
            if params is None or prompt is None:
                continue
            most = min(len(prompt) + (params.max_tokens or self._max_len), self._max_len)
            stops = {token for token in (params.eos_token_id, *(params.stop_token_ids or ())) if token is not None}
            opt_out = opted_out(new.req_id, params.extra_args)
            self._capture.begin(new.req_id, prompt, Ending(most, frozenset(stops)), opt_out)

    def _hook_last(self) -> None:
        """V1 hands the last hidden states, after the final norm, to the function that calls the draft."""
        original = self._runner.propose_draft_token_ids
        signature = inspect.signature(original)

        def propose_draft_token_ids(*args: Any, **kwargs: Any) -> Any:
            try:
                self._last = signature.bind(*args, **kwargs).arguments["hidden_states"]
            except Exception as exc:  # noqa: BLE001 - a hook must never fail a step
                self.faults.note(TAP, exc)
            try:
                return original(*args, **kwargs)
            finally:
                self._last = None

        self._runner.propose_draft_token_ids = propose_draft_token_ids

    def _hook_propose(self) -> None:
        original = self._drafter.propose
        signature = inspect.signature(original)
        rows = self._rows_v2 if self._v2 else self._rows_v1

        def propose(*args: Any, **kwargs: Any) -> Any:
            bound: dict[str, Any] = {}
            try:
                bound = signature.bind(*args, **kwargs).arguments
                if self._capture is not None and not bound.get("dummy_run"):
                    self._capture.step(rows(bound))
            except Exception as exc:  # noqa: BLE001 - a hook must never fail a step
                self.faults.note(TAP, exc)
            if self._skips(bound):
                return self._nothing(bound)
            if self._timings is None:
                return original(*args, **kwargs)
            began = time.perf_counter()
            drafted = original(*args, **kwargs)
            _synchronize(self._runner.device)
            self._timings.append(time.perf_counter() - began)
            return drafted

        self._drafter.propose = propose

    def _hook_sample(self) -> None:
        """V1 with a draft verifies in every step, also where nothing was drafted: then it samples as without a draft, which costs less."""
        original = self._runner._sample

        def sample(logits: Any, spec_decode_metadata: Any) -> Any:
            nothing = (
                getattr(spec_decode_metadata, "max_spec_len", None) == 0
            )  # where vLLM does not say so, it verifies
            return original(logits, None if nothing else spec_decode_metadata)

        self._runner._sample = sample

    def _guarded(self, body: Callable[[Any], None], argument: Any) -> None:
        try:
            body(argument)
        except Exception as exc:  # noqa: BLE001 - a hook must never fail a step
            self.faults.note(TAP, exc)

    def _rows_v1(self, bound: dict[str, Any]) -> StepRows:
        metadata, rejected = bound["common_attn_metadata"], bound.get("num_rejected_tokens_gpu")
        batch = self._runner.input_batch
        count = int(metadata.num_reqs)
        positions = bound["target_positions"]
        return StepRows(
            requests=batch.req_ids[:count],
            starts=metadata.query_start_loc_cpu[: count + 1].tolist(),
            rejected=rejected[:count] if rejected is not None else None,
            ids=bound["target_token_ids"],
            positions=positions if positions.ndim == 1 else positions[0],
            next_ids=bound["next_token_ids"][:count],
            aux=bound["target_hidden_states"],
            last=self._last,
        )

    def _rows_v2(self, bound: dict[str, Any]) -> StepRows:
        import torch

        batch = bound["input_batch"]
        count = int(batch.num_reqs)
        return StepRows(
            requests=batch.req_ids[:count],
            starts=batch.query_start_loc_np[: count + 1].tolist(),
            rejected=bound["num_rejected"][:count],
            ids=batch.input_ids,
            positions=batch.positions,
            next_ids=bound["last_sampled"][batch.idx_mapping[:count]].flatten(),
            aux=torch.cat(list(bound["aux_hidden_states"]), dim=-1),
            last=bound["last_hidden_states"],
        )

    def status(self) -> Status:
        totals = self.tap.totals() if self.tap is not None else TapTotals()
        return Status(totals, tuple(self.faults.counts), self._skipped_steps)

    def set_capture(self, on: bool, credit_bytes: int) -> None:
        if self.tap is not None:
            self.tap.set_capture(on, credit_bytes)

    # --- drafting nothing, and timing ---

    def begin_timing(self) -> None:
        """Until `end_timing`, time every proposal and leave none out."""
        self._timings = []

    def take_timings(self) -> list[float]:
        """Seconds of the proposals since the last call."""
        taken, self._timings = self._timings or [], []
        return taken

    def end_timing(self) -> None:
        self._timings = None

    def _skips(self, bound: dict[str, Any]) -> bool:
        """Whether the draft's forward is left out: nothing was to be drafted for some steps in a row. V1 only: V2's batch is on the
        device and its draft tokens have a fixed width."""
        if self._v2 or bound.get("num_speculative_tokens") != 0:
            self._zero_steps = 0
            return False
        self._zero_steps += 1
        return bool(self._skip_after) and self._timings is None and self._zero_steps > self._skip_after

    def _nothing(self, bound: dict[str, Any]) -> Any:
        """What vLLM's own propose returns for nothing to draft."""
        import torch

        self._skipped_steps += 1
        self._drafter.num_speculative_tokens = 0
        return torch.empty(
            int(bound["common_attn_metadata"].num_reqs), 0, device=self._runner.device, dtype=torch.int64
        )

    # --- the draft's weights ---

    def _find_weights(self, draft_dir: Path) -> tuple[str, str, str]:
        """(version, vocabulary, why there can be no swaps): reads the boot draft back from where it was loaded."""
        from tided.draft import checkpoint

        self._staged: Any = None
        self._previous: Any = None
        self._staging: threading.Thread | None = None
        self._stage_error: TideError | None = None
        try:
            loaded = checkpoint.load(draft_dir)
            from tided.engine.vllm.weights import DraftWeights

            self._weights = DraftWeights(
                self._runner.get_draft_model(), self._runner.get_model(), self._rank, self._ranks
            )
            differing = self._weights.differing(loaded)
            if differing:
                raise Refused(f"the loaded draft's {differing!r} does not read back as the checkpoint's")
        except TideError as exc:
            return "", "", str(exc)
        except Exception as exc:  # noqa: BLE001 - an unknown build of the draft costs swaps, not the engine
            self.faults.note(SWAP, exc)
            return "", "", f"reading the draft back failed: {type(exc).__name__}"
        self._config = loaded.config
        self._current = loaded
        return loaded.version, loaded.vocab_id, ""

    def stage(self, path: str, version: str) -> None:
        """Begin to read and check a checkpoint on a thread of its own; steps go on."""
        self._staged, self._stage_error = None, None
        self._staging = threading.Thread(
            target=self._stage, args=(Path(path), version), name="tided-stage", daemon=True
        )
        self._staging.start()

    def _stage(self, path: Path, version: str) -> None:
        from tided.draft import checkpoint

        try:
            loaded = checkpoint.load(path)
            if loaded.version != version:
                raise Refused(f"{path} holds version {loaded.version[:12]}, not {version[:12]}; nothing was changed")
            if loaded.config != self._config:
                raise Refused(
                    f"{path}: its sizes differ from those of the draft being served; restart the engine on it"
                )
            self._staged = loaded
        except TideError as exc:
            self._stage_error = exc
        except Exception as exc:  # noqa: BLE001 - told to whoever asked for the swap
            self._stage_error = Unavailable(f"{path}: reading failed: {type(exc).__name__}")

    def staged(self) -> tuple[bool, str]:
        """(done, error)."""
        if self._staging is None or self._staging.is_alive():
            return False, ""
        return True, str(self._stage_error) if self._stage_error is not None else ""

    def exchange(self) -> tuple[str, str, str]:
        """Between two steps: load what was staged. (version read back, vocabulary, error); the old draft serves on after an error."""
        staged, self._staged = self._staged, None
        if staged is None:
            return "", "", "nothing is staged"
        _synchronize(self._runner.device)
        differing = self._weights.replace(staged)
        if differing:
            return "", "", f"tensor {differing!r} differs after loading; the draft that served before still serves"
        self._previous, self._current = self._current, staged
        return staged.version, staged.vocab_id, ""

    def take_back(self) -> bool:
        """Undo the exchange, because another rank could not do it."""
        back = self._previous
        if self._current is back:
            return True
        self._current = back
        return not self._weights.replace(back)

    def close(self, deadline_s: float) -> Status:
        """Send what the tap holds."""
        if self._capture is not None:
            self._guarded(lambda capture: capture.settle(), self._capture)
        if self.publisher is not None:
            self.publisher.close(deadline_s)
        return self.status()


def _place() -> tuple[int, int, bool]:
    """(tensor-parallel rank, ranks, whether this is the last pipeline stage)."""
    state = import_module("vllm.distributed.parallel_state")
    group = state.get_tp_group()
    return group.rank_in_group, group.world_size, bool(state.get_pp_group().is_last_rank)


def _synchronize(device: Any) -> None:
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize()


# --- RPCs ---

_sides: dict[int, WorkerSide] = {}  # by id of the runner: workers of a test may share a process


def attach(worker: Any, request: AttachRequest) -> Attached:
    side = _sides[id(worker.model_runner)] = WorkerSide(worker, request)
    return side.attached


def status(worker: Any) -> Status:
    return _of(worker).status()


def set_capture(worker: Any, on: bool, credit_bytes: int) -> None:
    _of(worker).set_capture(on, credit_bytes)


def begin_timing(worker: Any) -> None:
    _of(worker).begin_timing()


def take_timings(worker: Any) -> list[float]:
    return _of(worker).take_timings()


def end_timing(worker: Any) -> None:
    _of(worker).end_timing()


def stage(worker: Any, path: str, version: str) -> None:
    _of(worker).stage(path, version)


def staged(worker: Any) -> tuple[bool, str]:
    return _of(worker).staged()


def exchange(worker: Any) -> tuple[str, str, str]:
    return _of(worker).exchange()


def take_back(worker: Any) -> bool:
    return _of(worker).take_back()


def close(worker: Any, deadline_s: float) -> Status:
    return _of(worker).close(deadline_s)


def _of(worker: Any) -> WorkerSide:
    return _sides[id(worker.model_runner)]
