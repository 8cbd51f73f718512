"""The server over its real socket: mode, peers, errors, long polls, shutdown, metrics; and the client's errors."""

import json
import os
import socket
import stat
import time
from pathlib import Path

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api_server import Running, running
from tests.fake_plane import FAULTS, FakePlane
from tests.support import eventually
from tided.api.client import Client, api_path
from tided.api.server import bound_socket, serve
from tided.config import Config, DaemonConfig
from tided.model.errors import ConfigError, Conflict, InvariantBroken, NotFound, Refused, TideError, Unavailable
from tided.model.policy import SpeculationMode

in_thread = anyio.to_thread.run_sync


def over_socket(api: Running) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(api.socket))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize(("mode", "bits"), [("0600", 0o600), ("0660", 0o660)])
async def test_socket_has_the_configured_mode_and_goes_away(mode: str, bits: int) -> None:
    before = os.umask(0)
    try:
        async with running(socket_mode=mode) as api:
            assert stat.S_IMODE(api.socket.stat().st_mode) == bits
            assert [path.name for path in api.socket.parent.iterdir()] == ["tided.sock"]
            path = api.socket
        assert not path.exists()
    finally:
        os.umask(before)


async def test_status_round_trip_and_actor() -> None:
    async with running() as api:
        status = await in_thread(api.client.status)
        assert status.engines[0].draft == "smollm2@1"
        answer = await in_thread(api.client.post, "/v1/policy", {"mode": "fixed", "gamma": 2})
        assert answer == {"mode": "fixed", "gamma": 2}
        assert api.plane.calls == [("set_policy", SpeculationMode.FIXED, 2, f"uid:{os.getuid()}")]


async def test_names_are_quoted_into_paths() -> None:
    async with running() as api:
        assert (await in_thread(api.client.get, api_path("drafts", "smollm2@0")))["number"] == 0
        with pytest.raises(NotFound):
            await in_thread(api.client.get, api_path("jobs", "../policy"))


@pytest.mark.parametrize(
    "kind", [kind for kind in FAULTS if kind is not InvariantBroken], ids=lambda kind: kind.__name__
)
async def test_errors_keep_their_kind(kind: type[TideError]) -> None:
    status, name, _ = FAULTS[kind]
    async with running() as api, over_socket(api) as client:
        api.plane.fault = kind("what is wrong and what to do")
        answer = await client.get("/v1/workers")
        assert answer.status_code == status
        assert answer.json() == {"error": {"kind": name, "message": "what is wrong and what to do"}}
        with pytest.raises(kind, match="what is wrong and what to do"):
            await in_thread(api.client.get, "/v1/workers")


async def test_a_broken_invariant_is_answered_and_ends_the_server() -> None:
    answers: list[int] = []
    with pytest.RaisesGroup(pytest.RaisesExc(InvariantBroken, match="two leaders")):
        async with running() as api, over_socket(api) as client:
            api.plane.fault = InvariantBroken("two leaders")
            answers.append((await client.get("/v1/workers")).status_code)
            await anyio.sleep_forever()
    assert answers == [500]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "expected a table"),
        (b'{"mode": "off", "mode": "auto"}', "a key twice"),
        (b'{"mode": "off", "gamma": NaN}', "NaN"),
        (b'{"mode": "off", "gama": 1}', "unknown field 'gama'"),
        (b'{"mode": "fast"}', "none of auto, off, fixed"),
        (b'{"mode": "off", "gamma": "1"}', "body.gamma: expected int"),
        (b'{"mode": "' + b"x" * 70_000 + b'"}', "over the limit"),
        (b"[" * 50_000, "not JSON"),
    ],
)
async def test_bad_bodies_are_refused(body: bytes, part: str) -> None:
    async with running() as api, over_socket(api) as client:
        answer = await client.post("/v1/policy", content=body)
        assert answer.status_code == 400
        assert part in answer.json()["error"]["message"]
        assert api.plane.calls == []


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/jobs?limit=0", "expected 1 to 1000"),
        ("/v1/jobs?limit=1.5", "whole number"),
        ("/v1/jobs?limit=x", "expected a number"),
        ("/v1/jobs?limt=3", "unknown query parameter 'limt'"),
        ("/v1/jobs?limit=1&limit=2", "given twice"),
        ("/v1/events?wait_s=31", "expected 0 to 30"),
        ("/v1/events?wait_s=nan", "expected 0 to 30"),
    ],
)
async def test_bad_queries_are_refused(path: str, part: str) -> None:
    async with running() as api:
        with pytest.raises(Refused, match=part):
            await in_thread(api.client.get, path)


async def test_relative_target_directory_is_refused() -> None:
    async with running() as api:
        with pytest.raises(Refused, match="absolute"):
            await in_thread(api.client.post, "/v1/drafts", {"target_dir": "models/x", "name": "x"})


async def test_unknown_path_and_method_are_json() -> None:
    async with running() as api:
        with pytest.raises(NotFound):
            await in_thread(api.client.get, "/v1/nothing")
        with pytest.raises(Refused):
            await in_thread(api.client.post, "/v1/status")


async def test_long_poll_returns_when_something_happens() -> None:
    async with running() as api:
        api.plane.happened("started", "first")
        results: list[str] = []
        began = time.monotonic()
        async with anyio.create_task_group() as group:

            async def poll() -> None:
                events = await in_thread(api.client.events, "1-0", 10, 30.0)
                results.extend(event.message for event in events)

            group.start_soon(poll)
            await eventually(lambda: api.plane.looked)
            api.plane.happened("swapped", "second")
        assert results == ["second"]
        assert time.monotonic() - began < 25


async def test_stops_promptly_with_a_long_poll_open() -> None:
    async with anyio.create_task_group() as group:
        async with running() as api:

            async def poll() -> None:
                assert await in_thread(api.client.events, "9-0", 10, 30.0) == []

            group.start_soon(poll)
            await eventually(lambda: api.plane.looked)
            began = time.monotonic()
        assert time.monotonic() - began < 15  # not the 30 s of the poll


async def test_metrics_parse_and_name_the_engine() -> None:
    async with running() as api, over_socket(api) as client:
        text = (await client.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        gammas = {sample.labels["batch"]: sample.value for sample in families["tided_engine_gamma"].samples}
        assert (gammas["1"], gammas["2"], gammas["3"]) == (3, 3, 0)
        fates = {sample.labels["fate"]: sample.value for sample in families["tided_engine_sample_rows"].samples}
        assert (fates["tapped"], fates["stored"], fates["shed"]) == (1000, 900, 50)
        assert families["tided_redis_connected"].samples[0].value == 1
        assert families["tided_jobs"].samples[0].labels == {"kind": "train", "state": "running"}
        api.plane.fault = Unavailable("Redis is away")
        answer = await client.get("/metrics")
        assert answer.status_code == 200
        assert "tided_redis_connected 0.0" in answer.text


def test_socket_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with bound_socket(path, 0o600) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        with pytest.raises(Conflict, match="another tided"), bound_socket(path, 0o600):
            pass
        assert path.is_socket()
    assert not path.exists()


def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"), bound_socket(path, 0o600):
        pass
    assert path.read_text() == "precious"
    with pytest.raises(ConfigError, match="too long"), bound_socket(tmp_path / ("x" * 120), 0o600):
        pass
    with pytest.raises(ConfigError, match="cannot listen"), bound_socket(path / "below", 0o600):
        pass


async def test_a_taken_port_is_a_configuration_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(daemon=DaemonConfig(socket=tmp_path / "t.sock", http_port=port))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*in use"):
            await serve(FakePlane(), config)
    assert not (tmp_path / "t.sock").exists()


def test_client_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="not running, or its socket is elsewhere"):
        Client(tmp_path / "none.sock").get("/v1/status")
    path = tmp_path / "t.sock"
    with bound_socket(path, 0o600), pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
        Client(path, timeout_s=0.05).get("/v1/status")


async def test_client_refuses_what_is_not_tided(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with bound_socket(path, 0o600) as listener:

        def answer(body: bytes) -> None:
            listener.setblocking(True)
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

        for body in (b"<html>", json.dumps({"error": 3}).encode()[:-1]):
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.to_thread.run_sync, answer, body)
                with pytest.raises(Unavailable, match="not tided's"):
                    await in_thread(Client(path).get, "/v1/status")
