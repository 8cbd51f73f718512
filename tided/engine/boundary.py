"""Actions of other threads on the thread that runs an engine's steps, between two of them."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tided.model.errors import Unavailable

T = TypeVar("T")

TIMEOUT_S = 60.0
"""How long steps may keep an action waiting before it is given up."""


def perform(action: Callable[[], Any], future: "Future[Any]") -> None:
    """On the steps' thread: run `action`, unless it was given up, and let `future` have what it gives or raises."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = action()
    except Exception as exc:  # noqa: BLE001 - the action's failure is its caller's, never the engine's
        future.set_exception(exc)
    else:
        future.set_result(result)


def outcome(future: "Future[T]", timeout_s: float = TIMEOUT_S) -> T:
    """What the action gave, or its exception. `Unavailable` after `timeout_s`: dropped when it had not begun."""
    try:
        return future.result(timeout_s)
    except TimeoutError as exc:
        if future.cancel():
            raise Unavailable(f"the engine did not come to a step boundary in {timeout_s:g} s; dropped") from exc
        raise Unavailable(f"the engine has not finished the action after {timeout_s:g} s") from exc


class Boundary:
    """Actions wait here until the steps' thread comes by and calls `run`; `wake` makes an idle one come by."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._actions: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def call(self, action: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
        """Run `action` on the steps' thread and give what it returns or raises.

        Raises `Unavailable`, with the action dropped, when no boundary came in time or the engine ends.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("the engine is ending")
            self._actions.append((action, future))
        self._wake()
        return outcome(future, timeout_s)

    def run(self) -> None:
        """On the steps' thread: do what waits."""
        while True:
            with self._lock:
                if not self._actions:
                    return
                action, future = self._actions.popleft()
            perform(action, future)

    def close(self) -> None:
        """Refuse actions from now on, and those that still wait."""
        with self._lock:
            self._closed = True
            left = list(self._actions)
            self._actions.clear()
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(Unavailable("the engine is ending"))
