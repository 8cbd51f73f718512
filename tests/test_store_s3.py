"""A storage in a bucket, where S3 is not like a directory: credentials, a server that is away or says nothing, uploads in parts.

What a storage promises on any filesystem is in test_store_objects.py, which runs over the same server.
"""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs

from tests.s3_server import SECRET, S3Server
from tided.config import parse
from tided.model.errors import ConfigError, Unavailable
from tided.model.jobs import StoredObject
from tided.store import objects, s3
from tided.store.objects import Kind, ObjectStore
from tided.worker.agent import parse_settings

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
PARTS = 3


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Of several parts."""
    path = tmp_path / "shard.safetensors"
    path.write_bytes(bytes(range(256)) * (PARTS * s3.PART_BYTES // 256))
    return path


@pytest.fixture
def stored(shard: Path) -> StoredObject:
    return objects.describe_file(shard, Kind.SAMPLES)


def failures(store: ObjectStore, stored: StoredObject, shard: Path) -> list[str]:
    """What each call says."""
    calls: tuple[Callable[[], Any], ...] = (
        lambda: store.put(stored, shard),
        lambda: list(store.blocks(stored)),
        store.sizes,
        lambda: store.delete(stored.key),
        store.prove,
    )
    said = list[str]()
    for call in calls:
        with pytest.raises(Unavailable) as failed:
            call()
        said.append(str(failed.value))
    return said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"secret": "another"}, ("signature we calculated does not match", "Forbidden")),
        ({"key": "nobody"}, ("does not exist in our records", "Forbidden")),
        ({"key": None, "secret": None}, ("NoCredentialsError",)),
    ],
)
def test_wrong_credentials_are_said_and_not_shown(
    s3_server: S3Server,
    stored: StoredObject,
    shard: Path,
    changed: dict[str, Any],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    url = f"s3://{s3_server.new_bucket()}/tided"
    for said in failures(ObjectStore(url, s3_server.options | changed), stored, shard):
        assert any(word in said for word in words), said
        assert url in said
        assert SECRET not in said


def test_a_bucket_that_is_missing_is_said_and_never_made(
    s3_server: S3Server, stored: StoredObject, shard: Path
) -> None:
    store = ObjectStore("s3://no-such-bucket/tided", s3_server.options)
    for call in (lambda: store.put(stored, shard), store.sizes, store.prove):
        with pytest.raises(Unavailable, match="The specified bucket does not exist"):
            call()
    assert "no-such-bucket" not in s3_server.client.ls("")


def test_a_server_that_is_away_is_unavailable_and_used_again_when_it_is_back(
    own_s3: S3Server, stored: StoredObject, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "TRIES", 1)
    store = ObjectStore(f"s3://{own_s3.new_bucket()}/tided", own_s3.options)
    store.put(stored, shard)
    own_s3.kill()
    for said in failures(store, stored, shard):
        assert "EndpointConnectionError" in said
        assert own_s3.endpoint not in said
    own_s3.start()
    assert store.sizes() == {stored.key: stored.bytes}
    assert b"".join(store.blocks(stored)) == shard.read_bytes()


def at_block(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """A `check` that acts once, when so many blocks were written."""
    seen: list[None] = []

    def check() -> None:
        seen.append(None)
        if len(seen) == number:
            act()

    return check


def test_a_server_that_says_nothing_holds_nobody(
    own_s3: S3Server, stored: StoredObject, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who waits for an answer nor who writes."""
    monkeypatch.setattr(s3, "TRIES", 1)
    url = f"s3://{own_s3.new_bucket()}/tided"
    store = ObjectStore(url, own_s3.options | {"config_kwargs": {"read_timeout": 1.0}})

    def stop() -> None:
        own_s3.process.send_signal(signal.SIGSTOP)
        patch.setattr(s3, "REQUEST_S", 1.0)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(Unavailable, match=r"cannot write .*ReadTimeoutError"):
                pool.submit(store.put, stored, shard, at_block(12, stop)).result(60)
            with pytest.raises(Unavailable, match=r"cannot list .*ReadTimeoutError"):
                pool.submit(store.sizes).result(60)
        finally:
            own_s3.process.send_signal(signal.SIGCONT)  # which ends what hangs
    assert store.put(stored, shard)
    assert store.sizes() == {stored.key: stored.bytes}


def test_a_server_that_dies_during_an_upload_has_nothing_of_it(
    own_s3: S3Server, stored: StoredObject, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "TRIES", 1)
    store = ObjectStore(f"s3://{own_s3.new_bucket()}/tided", own_s3.options)
    with pytest.raises(Unavailable):
        store.put(stored, shard, at_block(12, own_s3.kill))
    own_s3.start()
    assert store.sizes() == {}
    assert store.put(stored, shard)


def test_a_put_that_is_stopped_ends_its_upload(s3_server: S3Server, stored: StoredObject, shard: Path) -> None:
    bucket = s3_server.new_bucket()
    uploads: list[Any] = []

    def stop() -> None:
        uploads.extend(s3_server.client.list_multipart_uploads(bucket))
        raise Unavailable("stopped")

    with pytest.raises(Unavailable, match="stopped"):
        ObjectStore(f"s3://{bucket}/tided", s3_server.options).put(stored, shard, at_block(12, stop))
    assert len(uploads) == 1
    assert s3_server.client.list_multipart_uploads(bucket) == []


def test_a_writer_that_dies_leaves_an_upload_that_is_in_no_listing(
    s3_url: str, s3_server: S3Server, stored: StoredObject, shard: Path
) -> None:
    """A lifecycle rule ends it (docs/operations.md)."""
    program = (
        "import os, sys; from pathlib import Path; from tided.store import objects; blocks = []\n"
        "def check():\n    blocks.append(0)\n    len(blocks) == 12 and os._exit(9)\n"
        "path = Path(sys.argv[2]); stored = objects.describe_file(path, objects.Kind.SAMPLES)\n"
        "objects.ObjectStore(sys.argv[1]).put(stored, path, check)"
    )
    done = subprocess.run([sys.executable, "-c", program, s3_url, str(shard)], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 9
    store = ObjectStore(s3_url)
    assert store.sizes() == {}
    (left,) = s3_server.client.list_multipart_uploads(s3_url.split("/")[2])
    assert left["Key"] == f"tided/{stored.key}"
    assert store.put(stored, shard)


def test_what_may_not_be_removed_is_no_success(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3's answer to a bulk removal is a success that lists what failed, which s3fs does not read: samples would stay after a purge."""
    real: Any = s3fs.S3FileSystem._call_s3  # pyright: ignore[reportPrivateUsage]

    async def policy(filesystem: Any, method: str, *arguments: Any, **parameters: Any) -> Any:
        if method == "delete_object":
            raise PermissionError("Access Denied")
        if method == "delete_objects":
            return {
                "Errors": [{"Key": entry["Key"], "Code": "AccessDenied"} for entry in parameters["Delete"]["Objects"]]
            }
        return await real(filesystem, method, *arguments, **parameters)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", policy)
    store = ObjectStore(s3_url)
    with pytest.raises(Unavailable, match=r"cannot remove samples/x \(Access Denied\)"):
        store.delete("samples/x")
    with pytest.raises(Unavailable, match="cannot remove tmp/"):
        store.prove()


def test_a_folder_that_a_console_has_made_is_no_object(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an empty object whose key ends with a slash: this server takes none."""
    key = f"samples/{'a' * 64}"

    async def pages(*_: Any, **__: Any) -> AsyncGenerator[dict[str, Any]]:
        yield {"Contents": [{"Key": f"tided/{name}", "Size": len(name)} for name in ("", "samples/", key)]}

    monkeypatch.setattr(s3fs.S3FileSystem, "_list_pages", pages)
    assert ObjectStore(s3_url).sizes() == {key: len(key)}


def test_without_s3fs_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[storage]\nurl = "s3://bucket/tided"\n')
    program = "import sys; sys.modules['aiobotocore'] = None; from tided.daemon import main; main(sys.argv[1:])"
    arguments = ["-c", program, "--check", "--config", str(tmp_path / "config.toml")]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("storage.url s3://bucket/tided: it needs s3fs: pip install 'tided[s3]'\n")


@pytest.mark.parametrize("options", [{"no_such": SECRET}, {"config_kwargs": {"no_such": SECRET}}])
def test_options_that_nothing_knows_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"storage\.url s3://bucket/tided: .*'no_such'") as refused:
        ObjectStore("s3://bucket/tided", options)
    assert SECRET not in str(refused.value)


def test_a_configuration_that_is_shown_has_no_secret_in_it(tmp_path: Path) -> None:
    options = {"key": "k", "secret": SECRET, "client_kwargs": {"aws_session_token": SECRET}}
    environment = {"runtime_env": {"env_vars": {"TOKEN": SECRET}}}
    table = {
        "storage": {"url": f"s3://me:{SECRET}@bucket/tided", "options": options},
        "launcher": {"options": environment},
    }
    config = parse(table, "f")
    assert config.storage.options == options
    assert config.launcher.options == environment
    assert SECRET not in repr(config) + str(config.storage) + config.model_dump_json()
    assert list(config.model_dump()["storage"]["options"]) == list(options)
    with pytest.raises(ConfigError) as refused:
        parse({"storage": {"url": "s3://bucket/tided", "options": [SECRET]}}, "f")
    assert SECRET not in str(refused.value)
    settings = parse_settings(["--redis", "redis://h", "--storage", f"s3://me:{SECRET}@bucket/tided"])
    assert SECRET not in repr(replace(settings, storage_options=options))
