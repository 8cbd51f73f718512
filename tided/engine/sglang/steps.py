"""Drafted tokens by batch size: set by tided, asked for by SGLang before every step; and the count of what came of them."""

import threading
from collections.abc import Sequence
from typing import Any

from tided.engine.plugin import Faults
from tided.model.engines import RequestStats, StepCounts
from tided.model.errors import Refused


class Schedule:
    """gammas[b - 1] at batch size b, the last entry beyond. Only steps whose runtime state SGLang built at start are reachable.

    Set from the agent's thread and read on the scheduler's: one tuple is replaced by another.
    """

    def __init__(self) -> None:
        self.reachable: tuple[int, ...] = ()
        self.gammas: tuple[int, ...] = ()
        self.forced: int | None = None  # while a profile is measured

    def attach(self, reachable: Sequence[int], wanted: Sequence[int], otherwise: int) -> None:
        """SGLang will build its states. It starts with `wanted` if that is reachable, else with the `otherwise` of its arguments."""
        built = tuple(sorted({*reachable, otherwise}))
        self.gammas = tuple(wanted) if set(wanted) <= set(built) else (otherwise,)
        self.reachable = built

    def set(self, gammas: Sequence[int]) -> None:
        """In force from the next step on. Raises `Refused` for steps that were not built."""
        missing = sorted(set(gammas) - set(self.reachable))
        if missing or not gammas:
            built = ", ".join(str(steps) for steps in self.reachable) or "none"
            raise Refused(f"drafted tokens {missing} were not built when SGLang started (candidate_steps: {built})")
        self.gammas = tuple(gammas)

    def steps_for(self, batch: int) -> int:
        forced, gammas = self.forced, self.gammas
        return gammas[min(max(batch, 1), len(gammas)) - 1] if forced is None else forced


def params_class(base: type[Any], schedule: Schedule, faults: Faults, wanted: Sequence[int]) -> type[Any]:
    """SGLang's AdaptiveSpeculativeParams, deciding by `schedule` in place of its own moving averages, first as `wanted`."""

    class TidedSpeculativeParams(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._tided_graph_bs: list[int] | None = None
            try:
                initial = args[0] if args else kwargs["initial_steps"]
                schedule.attach(self.candidate_steps, wanted, int(initial))
            except Exception as exc:  # noqa: BLE001 - an engine serves first: SGLang's own decision stands in
                faults.note("speculative parameters", exc)

        def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
            super().set_cuda_graph_bs(cuda_graph_bs)
            self._tided_graph_bs = cuda_graph_bs

        def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
            # SGLang would capture only the batch sizes that its own configuration pairs with a step; tided may pair any.
            return self._tided_graph_bs if schedule.reachable else super().cuda_graph_bs_for_step(step)

        def get_steps_for_batch(self, batch_size: int) -> int:
            if not schedule.reachable:
                return super().get_steps_for_batch(batch_size)
            return schedule.steps_for(batch_size)

        def on_verify_complete(self, *args: Any, **kwargs: Any) -> int | None:
            return super().on_verify_complete(*args, **kwargs) if not schedule.reachable else None

    return TidedSpeculativeParams


class StepBook:
    """Counts of steps and finished requests since they were last taken. Written by the scheduler's thread, taken by the agent's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[tuple[int, int], tuple[int, float, list[int]]] = {}
        self._requests: list[RequestStats] = []

    def step(self, batch: int, gamma: int, accepted: Sequence[int], seconds: float) -> None:
        """One step of `batch` requests; `accepted[i]` of `gamma` drafted tokens were accepted for the i-th that still ran."""
        with self._lock:
            steps, total_s, histogram = self._steps.get((batch, gamma), (0, 0.0, [0] * (gamma + 1)))
            for count in accepted:
                histogram[count] += 1
            self._steps[batch, gamma] = (steps + 1, total_s + seconds, histogram)

    def finished(self, stats: RequestStats) -> None:
        with self._lock:
            self._requests.append(stats)

    def take(self) -> tuple[tuple[StepCounts, ...], tuple[RequestStats, ...]]:
        with self._lock:
            steps, self._steps = self._steps, {}
            requests, self._requests = self._requests, []
        counts = (StepCounts(batch, gamma, n, s, tuple(h)) for (batch, gamma), (n, s, h) in sorted(steps.items()))
        return tuple(counts), tuple(requests)
