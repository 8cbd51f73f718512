"""Every route x every role, and the rules in front of the routes."""

import os
import socket

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from bench.configs import free_port
from tests.api_server import running
from tests.fake_plane import JOB, FakePlane
from tided.api.access import ALLOWED, PEER, Access, Endpoint, Peer, Role, host_allowed, may, peer_of
from tided.api.lifetime import Lifetime
from tided.api.routes import ENDPOINTS, make_app

PATHS = {"{ref}": "smollm2%401", "{job}": JOB.id, "{engine}": "local"}
BODIES = {"/v1/drafts": {"target_dir": "/models/x", "name": "x"}, "/v1/policy": {"mode": "off"}}
OPEN_TO_VIEWERS = {
    "/health",
    "/metrics",
    "/v1/status",
    "/v1/engines",
    "/v1/drafts",
    "/v1/drafts/{ref}",
    "/v1/jobs",
    "/v1/jobs/{job}",
    "/v1/workers",
    "/v1/pools",
    "/v1/policy",
    "/v1/policy/decisions",
}


def call(endpoint: Endpoint, peer: Peer | None, host: str = "localhost") -> int:
    app = make_app(FakePlane(), "127.0.0.1", Lifetime())

    async def with_peer(scope: Scope, receive: Receive, send: Send) -> None:
        scope[PEER] = peer
        await app(scope, receive, send)

    path = endpoint.path
    for name, value in PATHS.items():
        path = path.replace(name, value)
    body = BODIES.get(endpoint.path) if endpoint.method == "POST" else None
    client = TestClient(with_peer, base_url=f"http://{host}")
    return client.request(endpoint.method, path, json=body).status_code


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e.method} {e.path}")
def test_every_route_for_every_role(endpoint: Endpoint) -> None:
    viewer_may = endpoint.method == "GET" and endpoint.path in OPEN_TO_VIEWERS
    viewer_status = 200 if viewer_may else 403 if endpoint.method == "GET" else 405
    assert call(endpoint, Peer(Role.OPERATOR, 1000)) == 200
    assert call(endpoint, Peer(Role.VIEWER)) == viewer_status
    assert call(endpoint, None) == 403


def test_routes_that_change_are_closed_to_viewers() -> None:
    assert all(endpoint.access is Access.OPERATE for endpoint in ENDPOINTS if endpoint.method != "GET")
    assert {e.path for e in ENDPOINTS if e.access is Access.READ} == OPEN_TO_VIEWERS


def test_denied_by_default() -> None:
    assert set(ALLOWED) == set(Access)
    assert not may(None, Access.READ)
    assert not may(Peer(Role.VIEWER), Access.OPERATE)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:9000", True),
        ("127.0.0.1:9000", True),
        ("[::1]:9000", True),
        ("metrics.internal", True),
        ("evil.example", False),
        ("evil.example:9000", False),
        ("localhost.evil.example", False),
        ("", False),
        ("[::1", False),
        ("[::1]x", False),
        ("localhost:x", False),
    ],
)
def test_host_header(header: str, allowed: bool) -> None:
    assert host_allowed(header, "metrics.internal") is allowed


def test_peer_is_named_by_the_kernel() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert peer_of(left, frozenset({os.getuid()})) == Peer(Role.OPERATOR, os.getuid())
        assert peer_of(left, None) == Peer(Role.OPERATOR, os.getuid())
        assert peer_of(left, frozenset({os.getuid() + 1})) is None
    with socket.socket(socket.AF_INET) as tcp:
        assert peer_of(tcp, frozenset()) == Peer(Role.VIEWER)


async def test_tcp_listener_is_read_only() -> None:
    port = free_port()
    async with running(http_port=port) as api, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/v1/status")).json()["leader"] is True
        answer = await client.post("/v1/policy", json={"mode": "off"})
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        assert answer.json()["error"]["kind"] == "Refused"
        assert (await client.get("/v1/status", headers={"host": "evil.example"})).status_code == 400
        assert (await client.get("/v1/events")).status_code == 403
        assert api.plane.calls == []
