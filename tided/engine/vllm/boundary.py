"""Actions of other threads between two steps of vLLM's engine core, also when nothing runs.

The core's loop takes messages from its input queue between steps, and waits on that queue while it is idle. Each action sends it a
WAKEUP message, which the core itself ignores, and runs once the core has handled that or any other message. So an action never meets
a step of this process, and an RPC that it sends to workers queues behind the steps that they were given.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tided.model.errors import Unavailable

T = TypeVar("T")

TIMEOUT_S = 60.0
"""How long steps may keep an action waiting before it is given up."""


class StepBoundary:
    """`core` is an EngineCoreProc: its `input_queue` and `_handle_client_request` are used."""

    def __init__(self, core: Any, wakeup: Any) -> None:
        """`wakeup` is the message that the core ignores."""
        self._queue, self._wakeup = core.input_queue, wakeup
        self._actions: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        handle = core._handle_client_request

        def handle_then_act(*args: Any, **kwargs: Any) -> Any:
            try:
                return handle(*args, **kwargs)
            finally:
                self._run()

        core._handle_client_request = handle_then_act

    def call(self, action: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
        """Run `action` on the core's thread between two steps and give what it returns or raises.

        Raises `Unavailable`, with the action dropped, when no boundary came in time or the engine ends.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("the engine is ending")
            self._actions.append((action, future))
        self._queue.put_nowait(self._wakeup)
        try:
            return future.result(timeout_s)
        except TimeoutError as exc:
            if future.cancel():
                raise Unavailable(f"the engine did not come to a step boundary in {timeout_s:g} s; dropped") from exc
            raise Unavailable(f"the engine has not finished the action after {timeout_s:g} s") from exc

    def work_waits(self) -> bool:
        """Whether the core was sent anything but wake-ups that it has not handled."""
        return any(message is not self._wakeup for message in tuple(self._queue.queue))

    def close(self) -> None:
        """Refuse actions from now on, and those that still wait."""
        with self._lock:
            self._closed = True
            left = list(self._actions)
            self._actions.clear()
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(Unavailable("the engine is ending"))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._actions:
                    return
                action, future = self._actions.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = action()
            except Exception as exc:  # noqa: BLE001 - the action's failure is its caller's, never the engine's
                future.set_exception(exc)
            else:
                future.set_result(result)
