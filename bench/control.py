"""Reading a running tided from asyncio: its status, events and jobs, over the admin socket."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tided.api.client import Client
from tided.model.events import Event
from tided.model.status import EngineStatus, Status

POLL_S = 0.5


class Control:
    """Each call is one call of the synchronous client in a thread. All raise `TideError` as the client does."""

    def __init__(self, socket: Path) -> None:
        self.client = Client(socket)

    async def status(self) -> Status:
        """tided's snapshot."""
        return await asyncio.to_thread(self.client.status)

    async def engine(self) -> EngineStatus:
        """tided's view of its only engine."""
        return (await self.status()).engines[0]

    async def get(self, path: str) -> Any:
        """JSON of an admin route."""
        return await asyncio.to_thread(self.client.get, path)

    async def events(self, after: str) -> list[Event]:
        """Events since the one with id `after`, oldest first."""
        return await asyncio.to_thread(self.client.events, after, 500)

    async def wait_for(self, check: Callable[[Status], bool], timeout_s: float) -> Status:
        """Polls the status until `check` holds. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while True:
                status = await self.status()
                if check(status):
                    return status
                await asyncio.sleep(POLL_S)

    async def has_draft(self, timeout_s: float = 90.0) -> None:
        """Waits until the engine serves a draft that tided knows. Raises `TimeoutError`."""
        await self.wait_for(lambda status: bool(status.engines and status.engines[0].draft), timeout_s)


def moment(engine: EngineStatus) -> dict[str, Any]:
    """What a timeline keeps of a status."""
    return {
        "draft": engine.draft,
        "gammas": list(engine.speculation.gammas),
        "predicted": [round(value, 3) for value in engine.speculation.predicted],
        "alpha": engine.speculation.alpha,
        "running": engine.running,
        "tokens_per_s": engine.tokens_per_s,
        "accept_length": engine.accept_length,
        "training": engine.training.state,
        "short": engine.training.short,
        "long": engine.training.long,
        "rows": engine.training.rows,
        "drifts": engine.training.drifts,
        "swaps": engine.swaps,
    }
