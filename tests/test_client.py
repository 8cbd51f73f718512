"""Redis errors become ours, with neither password nor payload in them; the server's version is checked."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from redis import exceptions

from tests.conftest import Valkey
from tided.model.errors import ConfigError, Refused, TideError, Unavailable
from tided.store.client import (
    CONNECTIONS,
    check_server,
    closing,
    connect,
    connect_blocking,
    redis_time_ms,
    shown,
    translated,
)

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (exceptions.ConnectionError("Error 111"), Unavailable),
        (exceptions.TimeoutError("Timeout"), Unavailable),
        (exceptions.BusyLoadingError("LOADING"), Unavailable),
        (exceptions.OutOfMemoryError("command not allowed"), Unavailable),
        (exceptions.ResponseError("NOGROUP No such key"), Unavailable),
        (exceptions.ResponseError(f"WRONGTYPE {SECRET}"), Refused),
        (exceptions.ResponseError(f"Command # 1 (XADD s * p {SECRET}) of pipeline caused error: x"), Refused),
        (
            exceptions.ResponseError(f"Command # 1 (SET k {SECRET}) of pipeline caused error: MISCONF no disk"),
            Unavailable,
        ),
        (exceptions.AuthenticationError(f"WRONGPASS {SECRET}"), Refused),
        (exceptions.NoPermissionError(f"no permissions {SECRET}"), Refused),
        (ConnectionRefusedError("no"), Unavailable),
    ],
)
def test_each_error_becomes_ours_without_its_payload(error: Exception, kind: type[TideError]) -> None:
    with pytest.raises(kind) as caught, translated("samples"):
        raise error
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    assert str(caught.value).startswith("samples: ")


@pytest.mark.parametrize("url", [f"http://user:{SECRET}@host", f"redis://:{SECRET}@host:notaport", f"{SECRET}"])
def test_a_url_that_cannot_be_right_is_a_configuration_error_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url)
    if "@" in url:
        assert SECRET not in str(caught.value)


def test_a_url_is_shown_without_what_is_secret() -> None:
    assert shown(f"rediss://user:{SECRET}@host:6380/0?password={SECRET}") == "rediss://host:6380/0"
    assert shown("unix:///run/valkey.sock") == "unix:///run/valkey.sock"


async def test_the_servers_clock_and_version(valkey: Valkey) -> None:
    async with closing(connect(valkey.url)) as client:
        assert (await check_server(client)).startswith("valkey ")
        assert await redis_time_ms(client) > 1_600_000_000_000


class OldServer:
    async def info(self, section: str) -> dict[str, Any]:
        return {"redis_version": "6.2.14", "section": section}


async def test_an_old_server_is_refused() -> None:
    with pytest.raises(Refused, match=r"redis 6\.2\.14 is too old"):
        await check_server(OldServer())  # pyright: ignore[reportArgumentType]


async def test_an_unreachable_server_is_unavailable(tmp_path: Path) -> None:
    async with closing(connect(f"unix://{tmp_path / 'none.sock'}")) as client:
        with pytest.raises(Unavailable, match="is the server running"):
            await check_server(client)


@pytest.mark.parametrize("make", [connect, lambda url: connect_blocking(url, 1.0)])
async def test_no_client_repeats_a_command_by_itself(valkey: Valkey, make: Any) -> None:
    async with closing(make(valkey.url)) as client:
        connection = await client.connection_pool.get_connection()
        assert connection.retry.get_retries() == 0
        await client.connection_pool.release(connection)


@pytest.mark.real
async def test_more_may_be_asked_at_once_than_there_are_connections(valkey: Valkey) -> None:
    async with connect(valkey.url) as redis:
        asked = [str(number) for number in range(10 * CONNECTIONS)]
        answers = await asyncio.gather(*[redis.echo(number) for number in asked])
        clients = await redis.client_list()
        connected = [client for client in clients if client["cmd"] in ("echo", "client|list")]
    assert [bytes(cast("bytes", answer)).decode() for answer in answers] == asked
    assert len(connected) == CONNECTIONS
