"""The tap as the agent sees it: the real one is in a worker's process, and is asked between two steps."""

import contextlib
from collections.abc import Callable
from typing import Any

from tided.engine.boundary import TIMEOUT_S
from tided.engine.vllm import worker
from tided.engine.vllm.worker import Status
from tided.model.engines import TapTotals
from tided.model.errors import TideError

_SOON_S = 0.5


class RemoteTap:
    """`ask(timeout_s, function, *args)` runs a worker function on every rank and gives their answers; `steps` counts the engine's.

    A worker that nothing new can be learnt from is not asked: vLLM's workers spin for a second after each message, so that an idle
    engine that is asked twice a second would keep a core busy.
    """

    def __init__(self, ask: Callable[..., list[Any]], steps: Callable[[], int]) -> None:
        self._ask, self._steps = ask, steps
        self._asked_at = 0
        self._capturing = False
        self._totals = TapTotals()
        self.broken: frozenset[str] = frozenset()
        self.skipped_steps = 0

    @property
    def capturing(self) -> bool:
        """Whether requests that begin now are tapped."""
        return self._capturing

    def set_capture(self, on: bool, credit_bytes: int) -> None:
        """As `Tap.set_capture`. Raises `Unavailable` when no worker was reached."""
        self._ask(TIMEOUT_S, worker.set_capture, on, credit_bytes)
        self._capturing = on

    def totals(self) -> TapTotals:
        """Running totals; those known last when no worker can be asked soon: a heartbeat waits for this."""
        steps = self._steps()
        if steps != self._asked_at or self._totals.ring:
            with contextlib.suppress(TideError):
                self.take(self._ask(_SOON_S, worker.status))
                self._asked_at = steps
        return self._totals

    def take(self, ranks: list[Status]) -> None:
        """Keep what the workers said: one of them taps."""
        self._totals = max((rank.totals for rank in ranks), key=lambda totals: totals.tapped + totals.skipped)
        self.broken = frozenset(place for rank in ranks for place in rank.broken)
        self.skipped_steps = max(rank.skipped_steps for rank in ranks)
