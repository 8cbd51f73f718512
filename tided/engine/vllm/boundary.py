"""Actions of other threads between two steps of vLLM's engine core, also when nothing runs.

The core's loop takes messages from its input queue between steps, and waits on that queue while it is idle. Each action sends it a
WAKEUP message, which the core itself ignores, and runs once the core has handled that or any other message. So an action never meets
a step of this process, and an RPC that it sends to workers queues behind the steps that they were given.
"""

from typing import Any

from tided.engine.boundary import Boundary


class StepBoundary(Boundary):
    """`core` is an EngineCoreProc: its `input_queue` and `_handle_client_request` are used."""

    def __init__(self, core: Any, wakeup: Any) -> None:
        """`wakeup` is the message that the core ignores."""
        self._queue, self._wakeup = core.input_queue, wakeup
        super().__init__(lambda: self._queue.put_nowait(wakeup))
        handle = core._handle_client_request

        def handle_then_act(*args: Any, **kwargs: Any) -> Any:
            try:
                return handle(*args, **kwargs)
            finally:
                self.run()

        core._handle_client_request = handle_then_act

    def work_waits(self) -> bool:
        """Whether the core was sent anything but wake-ups that it has not handled."""
        return any(message is not self._wakeup for message in tuple(self._queue.queue))
