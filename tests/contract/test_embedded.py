"""The embedded engine keeps the backend contract."""

from collections.abc import Iterator

import pytest

from tests.conftest import Valkey
from tests.contract.embedded import EmbeddedSubject
from tests.contract.suite import BackendContract, RestartContract
from tests.tiny import make_draft, make_target

pytest_plugins = ("tests.contract.fixtures",)
pytestmark = pytest.mark.real


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


class TestEmbeddedRestart(RestartContract):
    """After the others: it kills the engine."""
