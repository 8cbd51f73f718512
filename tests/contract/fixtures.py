"""Fixtures of the contract, for modules that name this one in `pytest_plugins` and give a module-scoped `subject` themselves."""

from collections.abc import Iterator

import pytest

from tests.conftest import Valkey, unbounded_keys
from tests.contract.peer import Peer
from tests.contract.reference import Reference
from tests.contract.subject import Subject


@pytest.fixture(scope="module")
def contract_redis(valkey_server: Valkey) -> Iterator[Valkey]:
    """The session's server, empty at first, for one module: an engine lives longer than a test."""
    valkey_server.client.flushall()
    yield valkey_server
    leaked = unbounded_keys(valkey_server.client)
    valkey_server.client.flushall()
    assert not leaked, f"keys without a TTL that tided.wire.keys.PERMANENT does not name: {leaked}"


@pytest.fixture(scope="module")
def peer(contract_redis: Valkey, subject: Subject) -> Peer:
    """tided's side."""
    return Peer(contract_redis.client, subject.engine)


@pytest.fixture(scope="module")
def reference(subject: Subject) -> Reference:
    """The subject's target in transformers."""
    return Reference(subject.target_dir)
