"""What tided asks of a scheduler that owns the devices. Ray's is `tided.launchers.ray`; others come by the entry points `tided.launchers`.

An entry point names a callable (LauncherConfig) -> Launcher. What a launch asks the scheduler for (processors, devices) is in that
configuration, and equal for all.
"""

from typing import Protocol

from tided.model.launch import Launch


class Launcher(Protocol):
    """Asked by the leader every two seconds, away from everything else: a call may take seconds, and is ended after a minute.

    All methods raise `Unavailable` while the scheduler cannot be reached (asked again), `Refused` when it will not (asked again after a
    pause that grows). Of a call whose answer was lost nothing is known: `states` says it the next time.
    """

    async def states(self) -> dict[str, Launch]:
        """By id, every launch that the scheduler still knows of; those of others may be among them."""
        ...

    async def submit(self, launch_id: str, command: str) -> None:
        """Have the shell command run once, when the devices are there. An id that the scheduler has had is no error, and runs nothing."""
        ...

    async def cancel(self, launch_id: str) -> None:
        """It shall not begin. It may stay pending until it would. One that is over, or unknown, is no error. Asked at least once."""
        ...

    async def forget(self, launch_id: str) -> None:
        """One that has ended is of no use any more. A scheduler that forgets by itself does nothing."""
        ...

    async def aclose(self) -> None: ...
