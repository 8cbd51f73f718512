"""Work for the scheduler's thread, done between two of its iterations."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tided.model.errors import Unavailable

T = TypeVar("T")

APPLY_TIMEOUT_S = 60.0
"""How long an iteration may keep a command waiting before it is given up."""


class Boundary:
    """The agent's thread asks, the scheduler's thread does. SGLang comes by before each iteration, also while it idles."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def run(self, job: Callable[[], T]) -> T:
        """Have `job` done on the scheduler's thread and give what it gives or raises. `Unavailable` when its time is over."""
        future: Future[T] = Future()
        self._jobs.append((job, future))
        try:
            return future.result(APPLY_TIMEOUT_S)
        except TimeoutError as exc:
            dropped = "dropped" if future.cancel() else "it may still take effect"
            raise Unavailable(
                f"the scheduler did not come to a step boundary in {APPLY_TIMEOUT_S:g} s; {dropped}"
            ) from exc

    def work_off(self) -> None:
        """On the scheduler's thread: do what waits."""
        while self._jobs:
            job, future = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except Exception as exc:  # noqa: BLE001 - the caller gets what its job raised; the scheduler must live
                future.set_exception(exc)
