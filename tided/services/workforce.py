"""What happens to workers, told to people: `tided.machine.worker` for each, fed from the registry.

The lease of a job, not this, decides who owns it. The first look of a new leader tells nothing: what is there was there before.
"""

from tided.machine.worker import HeartbeatSeen, TimePassed, WorkerEvent, WorkerLife, step
from tided.services.context import Context

_MESSAGES = {
    "worker-joined": "it takes jobs",
    "worker-restarted": "another process has its name now",
    "worker-draining": "what it runs ends, or is given back",
    "worker-lost": "its heartbeat has ended: it died, hangs, or is cut off",
}


class Workforce:
    """Keeps in mind what it saw last."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lives: dict[str, WorkerLife] | None = None

    def forget(self) -> None:
        """This tided leads no more."""
        self._lives = None

    async def look(self, now_ms: int) -> None:
        """Announce what has changed since the last look. Raises `Unavailable`."""
        context = self._context
        fresh, silent = await context.workers.registry()
        events: dict[str, WorkerEvent] = {name: TimePassed(now_ms) for name in silent}
        for info in fresh:
            events[info.worker] = HeartbeatSeen(now_ms, info.incarnation, info.job, info.draining)
        before = self._lives
        lives: dict[str, WorkerLife] = {}
        for name, event in events.items():
            lives[name], announcements = step((before or {}).get(name, WorkerLife()), event)
            if before is not None:
                for announcement in announcements:
                    await context.announce(announcement.kind, name, _MESSAGES[announcement.kind])
        for name in set(before or {}) - set(lives):
            await context.announce("worker-left", name, "it signed off, or was silent for a day")
        self._lives = lives
