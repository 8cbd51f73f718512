"""The API's listeners: the admin socket, bound here with its mode before anyone can connect, and an optional read-only TCP port.

uvicorn gets bound sockets and never a path: given a path it would make the socket writable for everybody.
"""

import contextlib
import os
import secrets
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anyio
import structlog
import uvicorn
from anyio.abc import TaskStatus
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tided.api.access import PEER, peer_of
from tided.api.lifetime import Lifetime
from tided.api.plane import Plane
from tided.api.routes import make_app
from tided.config import Config
from tided.model.errors import ConfigError, Conflict, InvariantBroken

MAX_SOCKET_PATH_BYTES = 107
BACKLOG = 64
STOP_S = 2

_log = structlog.get_logger()


async def serve(plane: Plane, config: Config, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
    """Serve until cancelled. Calls `task_status.started()` when both listeners answer.

    On cancellation open long polls end, and everything is closed within `STOP_S` seconds. Raises `ConfigError` if the socket's path or
    the TCP port cannot be used, `Conflict` if another tided serves on the socket, `InvariantBroken` if a handler did.
    """
    daemon = config.daemon
    path = daemon.socket_path.absolute()
    lifetime = Lifetime()
    uids = frozenset({0, os.geteuid()}) if daemon.socket_mode == "0600" else None
    with bound_socket(path, int(daemon.socket_mode, 8)) as admin, _tcp(daemon.http_host, daemon.http_port) as tcp:
        server = _Server(_settings(make_app(plane, daemon.http_host, lifetime), uids))
        sockets = [admin, *tcp]
        async with anyio.create_task_group() as group:
            group.start_soon(_shielded, server, sockets)
            try:
                await server.ready.wait()
                _log.info("api-started", socket=str(path), http_port=daemon.http_port or None)
                task_status.started()
                await lifetime.closed.wait()
            finally:
                lifetime.close()
                server.should_exit = True
    if lifetime.failure is not None:
        raise InvariantBroken(str(lifetime.failure)) from lifetime.failure


@contextlib.contextmanager
def bound_socket(path: Path, mode: int) -> Generator[socket.socket]:
    """A listening unix socket at `path` that never had a wider mode; the file goes when the context ends.

    A socket that a dead process left is replaced; one that answers is not (`Conflict`).
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES - 9:  # room for the temporary name's suffix
        raise ConfigError(f"daemon.socket: {path} is too long for a unix socket; choose a path under 98 bytes")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_living(path)
        # Bound under a name that nobody knows, given its mode, then moved into place: there is no moment in between.
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(temporary))
            temporary.chmod(mode)
            inode = temporary.stat().st_ino
            listener.listen(BACKLOG)
            listener.setblocking(False)
            temporary.rename(path)
        except OSError:
            listener.close()
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise ConfigError(
            f"daemon.socket: cannot listen on {path}: {exc.strerror}; set daemon.socket to a path that can be made"
        ) from exc
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.unlink()


def _refuse_living(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"daemon.socket: {path} exists and is not a socket; move it away or set another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
    raise Conflict(f"another tided serves on {path}; stop it first, or give this one another daemon.state_dir")


@contextlib.contextmanager
def _tcp(host: str, port: int) -> Generator[list[socket.socket]]:
    if port == 0:
        yield []
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as exc:
        message = (
            f"daemon.http_port: cannot listen on {host}:{port}: {exc.strerror}; choose another port, or 0 for none"
        )
        raise ConfigError(message) from exc
    listener.setblocking(False)
    with listener:
        yield [listener]


async def _shielded(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
    # uvicorn ends by its flag, so that it closes its connections; a cancellation would leave them behind.
    with anyio.CancelScope(shield=True):
        await server.serve(sockets=sockets)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers (signals belong to the daemon), that says when it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _settings(app: ASGIApp, uids: frozenset[int] | None) -> uvicorn.Config:
    class PeerProtocol(H11Protocol):
        """Puts who is at the other end of the connection into every request's scope."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            peer = peer_of(transport.get_extra_info("socket"), uids)

            async def with_peer(scope: Scope, receive: Receive, send: Send) -> None:
                scope[PEER] = peer
                await app(scope, receive, send)

            self.app = with_peer  # pyright: ignore[reportIncompatibleVariableOverride]

    return uvicorn.Config(
        app,
        http=PeerProtocol,
        ws="none",
        lifespan="off",
        loop="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=STOP_S,
        h11_max_incomplete_event_size=16_384,
    )
