"""A scheduler in memory, for tests of the launching service: what it has is what the test says. Held to the real one's contract by
tests/test_launchers_contract.py."""

from dataclasses import dataclass, field

from tided.model.errors import Refused, Unavailable
from tided.model.launch import Launch, LaunchState


@dataclass
class LauncherDouble:
    """`room`: so many launches run at once, others are pending. `away`: it cannot be reached. `refuses`: why it takes none."""

    room: int = 1
    away: str = ""
    refuses: str = ""
    launches: dict[str, Launch] = field(default_factory=dict[str, Launch])
    commands: dict[str, str] = field(default_factory=dict[str, str])
    closed: bool = False

    async def states(self) -> dict[str, Launch]:
        self._reach()
        running = sum(launch.state is LaunchState.RUNNING for launch in self.launches.values())
        for launch_id, launch in self.launches.items():
            if launch.state is LaunchState.PENDING and running < self.room:
                self.launches[launch_id], running = Launch(LaunchState.RUNNING), running + 1
        return dict(self.launches)

    async def submit(self, launch_id: str, command: str) -> None:
        self._reach()
        if self.refuses:
            raise Refused(self.refuses)
        if launch_id not in self.launches:
            self.launches[launch_id] = Launch(LaunchState.PENDING, "it waits for devices")
            self.commands[launch_id] = command

    async def cancel(self, launch_id: str) -> None:
        self._reach()
        if launch_id in self.launches and self.launches[launch_id].state.live:
            self.end(launch_id, LaunchState.STOPPED)

    async def forget(self, launch_id: str) -> None:
        self._reach()
        self.launches.pop(launch_id, None)

    async def aclose(self) -> None:
        self.closed = True

    def end(self, launch_id: str, state: LaunchState, message: str = "") -> None:
        """What became of a launch."""
        self.launches[launch_id] = Launch(state, message, 1 + max(launch.ended_ms for launch in self.launches.values()))

    def _reach(self) -> None:
        if self.away:
            raise Unavailable(self.away)
