"""The embedded Valkey with real processes: started, adopted, stopped; errors that a person can act on."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import eventually
from tided.model.errors import ConfigError, Unavailable
from tided.store.client import closing, connect
from tided.store.valkey import EmbeddedValkey

MEMORY_BYTES = 64 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tided-") as path:
        yield Path(path) / "valkey"


async def test_it_listens_on_a_closed_unix_socket_only_and_never_evicts(directory: Path) -> None:
    server = EmbeddedValkey(directory, MEMORY_BYTES)
    await server.start()
    try:
        assert directory.stat().st_mode & 0o777 == 0o700
        assert server.socket.stat().st_mode & 0o777 == 0o600
        async with closing(connect(server.url)) as client:
            settings = await client.config_get("*")
            wanted = {"port": "0", "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
            assert {name: settings[name] for name in wanted} == wanted
            assert settings["maxmemory"] == str(MEMORY_BYTES)
    finally:
        await server.stop()
    assert server.pid == 0
    assert not directory.joinpath("valkey.sock").exists()


async def test_what_was_written_survives_kill_9(directory: Path) -> None:
    server = EmbeddedValkey(directory, MEMORY_BYTES)
    await server.start()
    async with closing(connect(server.url)) as client:
        await client.set("key", "value")

        async def written() -> bool:
            return (await client.info("persistence"))["aof_pending_bio_fsync"] == 0 and any(
                path.stat().st_size for path in directory.glob("appendonlydir/*.incr.aof")
            )

        await eventually(written)
    os.kill(server.pid, signal.SIGKILL)
    again = EmbeddedValkey(directory, MEMORY_BYTES)
    await again.start()
    try:
        assert not again.adopted
        async with closing(connect(again.url)) as client:
            assert await client.get("key") == b"value"
    finally:
        await again.stop()
        await server.stop()


async def test_a_live_server_that_a_killed_tided_left_is_adopted_and_stopped(directory: Path) -> None:
    first = EmbeddedValkey(directory, MEMORY_BYTES)
    await first.start()
    second = EmbeddedValkey(directory, MEMORY_BYTES * 2)
    await second.start()
    assert second.adopted
    assert second.pid == first.pid
    async with closing(connect(second.url)) as client:
        assert (await client.config_get("maxmemory"))["maxmemory"] == str(MEMORY_BYTES * 2)
    await first.stop()
    await second.stop()


async def test_a_mute_server_gets_no_twin(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = EmbeddedValkey(directory, MEMORY_BYTES)
    await first.start()
    monkeypatch.setattr("tided.store.client.COMMAND_TIMEOUT_S", 0.2)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match=f"process {first.pid}.*does not answer"):
            await EmbeddedValkey(directory, MEMORY_BYTES).start()
    finally:
        os.kill(first.pid, signal.SIGCONT)
        await first.stop()


async def test_a_server_that_cannot_start_says_why(directory: Path) -> None:
    directory.mkdir()
    (directory / "appendonlydir").write_text("in the way")
    server = EmbeddedValkey(directory, MEMORY_BYTES)
    with pytest.raises(Unavailable, match=r"log ends: .*appendonly"):
        await server.start(deadline_s=60.0)


async def test_a_missing_binary_and_a_long_path_are_configuration_errors(directory: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        await EmbeddedValkey(directory, MEMORY_BYTES, binary=Path("/nonexistent/valkey")).start()
    with pytest.raises(ConfigError, match="107 bytes"):
        await EmbeddedValkey(directory / ("d" * 100), MEMORY_BYTES).start()


async def test_a_directory_that_cannot_be_made_is_a_configuration_error(directory: Path) -> None:
    directory.write_text("a file in the way")
    with pytest.raises(ConfigError, match="not writable"):
        await EmbeddedValkey(directory, MEMORY_BYTES).start()
