"""A running API server for tests, on a short socket path and a free port."""

import contextlib
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import anyio

from tests.fake_plane import FakePlane
from tided.api.client import Client
from tided.api.server import serve
from tided.config import Config, DaemonConfig


@dataclass(frozen=True)
class Running:
    plane: FakePlane
    config: Config
    stop: anyio.CancelScope

    @property
    def socket(self) -> Path:
        return self.config.daemon.socket_path

    @property
    def client(self) -> Client:
        return Client(self.socket)


@contextlib.asynccontextmanager
async def running(http_port: int = 0, socket_mode: str = "0600") -> AsyncGenerator[Running]:
    """The server with a `FakePlane`; stopped, and its failure raised, at the end."""
    with tempfile.TemporaryDirectory(prefix="tided-api-") as directory:
        daemon = DaemonConfig.model_validate(
            {"state_dir": directory, "http_port": http_port, "socket_mode": socket_mode}
        )
        config = Config(daemon=daemon)
        plane = FakePlane()
        async with anyio.create_task_group() as group:
            await group.start(serve, plane, config)
            try:
                yield Running(plane, config, group.cancel_scope)
            finally:
                group.cancel_scope.cancel()
