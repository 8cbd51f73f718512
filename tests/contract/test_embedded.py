"""The embedded engine keeps the backend contract."""

import asyncio
import contextlib
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import Valkey
from tests.contract.embedded import EmbeddedSubject
from tests.contract.suite import BackendContract, RestartContract
from tests.tiny import make_draft, make_target

pytest_plugins = ("tests.contract.fixtures",)
pytestmark = pytest.mark.real
IDLE_S = 6.0
"""Longer than uvicorn keeps a connection by default."""


@pytest.fixture(scope="module")
def subject(contract_redis: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedSubject]:
    work = tmp_path_factory.mktemp("embedded")
    target = make_target(work / "target")
    running = EmbeddedSubject(contract_redis.url, target, make_draft(target, work / "draft"), work)
    running.start()
    try:
        yield running
        running.stop()
    finally:
        running.kill()


class TestEmbedded(BackendContract):
    """One engine for all of it."""

    async def test_a_connection_without_a_request_stays_open(self, subject: EmbeddedSubject) -> None:
        """A server that closes it while a request is on its way fails that request."""
        url = httpx.URL(subject.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: engine\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                await reader.read()
        assert not reader.at_eof()
        writer.close()


class TestEmbeddedRestart(RestartContract):
    """After the others: it kills the engine."""
