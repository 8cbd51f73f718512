"""Fixtures on a real Valkey: one server for the session, emptied between tests, and a check that no key can grow for ever."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, settings

from tided.store.valkey import find_binary
from tided.wire.keys import PERMANENT

# Wall-clock deadlines would fail on a busy machine, and fresh random draws would make a failure look like somebody else's.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@dataclass(frozen=True)
class Valkey:
    """A running server. `url` is what tided is given; `client` is synchronous, for looking at it from tests."""

    url: str
    client: redis.Redis


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Valkey]:
    # A short path: pytest's own temporary directories can exceed the 107 bytes of a unix socket.
    with tempfile.TemporaryDirectory(prefix="tided-valkey-") as directory:
        socket = Path(directory) / "valkey.sock"
        settings = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600", "--dir", directory]
        settings += ["--appendonly", "no", "--save", "", "--maxmemory", "512mb", "--maxmemory-policy", "noeviction"]
        settings += ["--logfile", str(Path(directory) / "valkey.log")]
        server = subprocess.Popen([str(find_binary()), *settings])
        client = redis.Redis(unix_socket_path=str(socket), retry=cast("Any", None), socket_timeout=60)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            yield Valkey(f"unix://{socket}", client)
        finally:
            client.close()
            server.kill()
            server.wait()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path is short enough for unix sockets in it, which pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="tided-") as directory:
        yield Path(directory)


@pytest.fixture
def valkey(valkey_server: Valkey) -> Iterator[Valkey]:
    """An empty server. Fails a test that leaves a key without a TTL that is not declared permanent."""
    valkey_server.client.flushall()
    yield valkey_server
    leaked = unbounded_keys(valkey_server.client)
    valkey_server.client.flushall()
    assert not leaked, f"keys without a TTL that tided.wire.keys.PERMANENT does not name: {leaked}"


def unbounded_keys(client: redis.Redis) -> list[str]:
    """Names of the keys that would live for ever and are not declared permanent."""
    keys = [cast("bytes", key).decode() for key in client.scan_iter()]
    patterns = [pattern.replace("[", "[[]") for pattern in PERMANENT]
    forever = [key for key in keys if client.ttl(key) == -1]
    return [key for key in forever if not any(fnmatchcase(key, pattern) for pattern in patterns)]
