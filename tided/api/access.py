"""Who may call what. Every endpoint declares its access class; what is not declared cannot be called.

Two kinds of peers exist. Over the admin socket the kernel has already checked the file's mode; SO_PEERCRED then names the user, for the
audit log and, with mode 0600, for a second check. Over TCP everybody on the network is a viewer: reading, nothing else.
"""

import ipaddress
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

PEER = "tided.peer"
"""The key of the connection's `Peer` in an ASGI scope."""


class Role(StrEnum):
    OPERATOR = "operator"  # on the admin socket
    VIEWER = "viewer"  # on the TCP listener


class Access(StrEnum):
    READ = "read"  # looks, tells nothing about who did what
    OPERATE = "operate"  # changes something, or reads the audit log


ALLOWED: dict[Access, frozenset[Role]] = {
    Access.READ: frozenset({Role.OPERATOR, Role.VIEWER}),
    Access.OPERATE: frozenset({Role.OPERATOR}),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of one connection. `uid` is None over TCP."""

    role: Role
    uid: int | None = None

    @property
    def actor(self) -> str:
        return "viewer" if self.uid is None else f"uid:{self.uid}"


Handler = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    access: Access
    handler: Handler


def may(peer: Peer | None, access: Access) -> bool:
    return peer is not None and peer.role in ALLOWED[access]


def peer_of(connection: socket.socket, uids: frozenset[int] | None) -> Peer | None:
    """Who is at the other end; None if it may not be served. `uids` None: every user that the socket's file lets in."""
    if connection.family != socket.AF_UNIX:
        return Peer(Role.VIEWER)
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Peer(Role.OPERATOR, uid) if uids is None or uid in uids else None


def host_allowed(header: str, configured: str) -> bool:
    """Whether a Host header names this listener. A foreign name means a web page that had its name resolved to this address."""
    try:
        host = socket_host(header)
    except ValueError:
        return False
    if host in ("localhost", configured.lower()):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def socket_host(header: str) -> str:
    """The host of `host`, `host:port`, `[v6]` or `[v6]:port`, in lower case. Raises `ValueError` for anything else."""
    host, port = header.strip().lower(), ""
    if host.startswith("["):
        host, bracket, rest = host[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(header)
        port = rest[1:]
    elif ":" in host:
        host, _, port = host.partition(":")
    if not host or (port and not port.isdecimal()):
        raise ValueError(header)
    return host


def problem(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """The one shape of an error: {"error": {"kind", "message"}}."""
    body = json.dumps({"error": {"kind": kind, "message": message}})
    return Response(body, status, headers, media_type="application/json")


class Gate:
    """ASGI middleware in front of every route: unknown peers, writing viewers and foreign Host headers stop here."""

    def __init__(self, app: ASGIApp, http_host: str) -> None:
        self._app = app
        self._http_host = http_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        peer: Peer | None = scope.get(PEER)
        if peer is None:
            return problem(403, "Refused", "this user may not use tided's admin socket")
        if peer.role is Role.OPERATOR:
            return None
        if scope["method"] != "GET":
            message = "this listener is read-only; changes go through the admin socket (tidectl)"
            return problem(405, "Refused", message, {"allow": "GET"})
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not host_allowed(hosts[0], self._http_host):
            return problem(
                400, "Refused", "the Host header names another server; use this listener's address or localhost"
            )
        return None
