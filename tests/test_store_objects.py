"""The shared storage: put once however often it is put, whole or not there, and nothing that does not verify reaches a host's cache."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tided.draft import checkpoint
from tided.draft.cache import Cache
from tided.model.errors import ConfigError, NotFound, Refused, Unavailable
from tided.model.ids import new_id
from tided.model.records import StoredObject
from tided.store import objects
from tided.store.objects import Kind, ObjectStore, Stager

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/storage"
    else:
        yield (url := f"memory://{new_id('test')}")
        filesystem, root = fsspec.url_to_fs(url)
        if filesystem.exists(root):
            filesystem.rm(root, recursive=True)


@pytest.fixture
def stager(url: str, tmp_path: Path) -> Stager:
    """That of another host, which has opened the same storage for itself."""
    return Stager(ObjectStore(url), Cache(tmp_path / "host" / "cache", 1 << 30))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(bytes(range(256)) * 20_000)
    return path


def raw(url: str, key: str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, root = fsspec.url_to_fs(url)
    return filesystem, f"{root}/{key}"


def test_a_shard_and_a_draft_reach_another_host(url: str, stager: Stager, shard: Path, first: Path) -> None:
    store, version = ObjectStore(url), checkpoint.version_of(first)
    samples, draft = objects.describe_file(shard, Kind.SAMPLES), objects.describe_draft(first, version)
    assert [store.put(samples, shard), store.put(draft, first)] == [True, True]
    assert [store.put(samples, shard), store.put(draft, first)] == [False, False]
    assert store.sizes() == {samples.key: samples.bytes, draft.key: draft.bytes}
    assert store.sizes(Kind.SAMPLES) == {samples.key: samples.bytes}
    assert stager.stage(samples).read_bytes() == shard.read_bytes()
    assert checkpoint.verify(stager.stage(draft)) == version
    store.delete(samples.key)
    store.delete(samples.key)
    assert list(store.sizes()) == [draft.key]
    assert stager.stage(samples).read_bytes() == shard.read_bytes()  # it has it already


@pytest.mark.parametrize("harm", ["truncated", "flipped", "longer"])
@pytest.mark.parametrize("kind", [Kind.SAMPLES, Kind.DRAFTS])
def test_what_does_not_verify_is_refused_removed_and_can_be_put_again(
    url: str, stager: Stager, shard: Path, first: Path, harm: str, kind: Kind
) -> None:
    store, source = ObjectStore(url), shard if kind is Kind.SAMPLES else first
    stored = (
        objects.describe_file(shard, kind)
        if kind is Kind.SAMPLES
        else objects.describe_draft(first, checkpoint.version_of(first))
    )
    store.put(stored, source)
    filesystem, path = raw(url, stored.key)
    content = bytearray(b"".join(store.blocks(stored)))
    match harm:
        case "truncated":
            content = content[:-7]
        case "longer":
            content += b"more"
        case _:
            content[len(content) // 2] ^= 1
    filesystem.pipe_file(path, bytes(content))
    with pytest.raises(Unavailable, match=f"{stored.key} is not what it should be"):
        stager.stage(stored)
    assert stager.cache.names() == []
    with pytest.raises(NotFound):
        stager.stage(stored)
    assert store.put(stored, source)
    assert stager.stage(stored).exists()


def test_what_the_hosts_own_disk_has_changed_is_staged_anew(url: str, stager: Stager, shard: Path) -> None:
    stored = objects.describe_file(shard, Kind.SAMPLES)
    ObjectStore(url).put(stored, shard)
    stager.stage(stored).write_bytes(b"rot")
    assert stager.stage(stored).read_bytes() == shard.read_bytes()


def test_a_put_that_is_stopped_shows_nothing(url: str, stager: Stager, shard: Path) -> None:
    store, stored = ObjectStore(url), objects.describe_file(shard, Kind.SAMPLES)

    def stop() -> None:
        raise Unavailable("stopped")

    with pytest.raises(Unavailable, match="stopped"):
        store.put(stored, shard, stop)
    assert store.sizes() == {}
    store.put(stored, shard)
    with pytest.raises(Unavailable, match="stopped"):
        stager.stage(stored, stop)
    assert stager.cache.names() == []


@pytest.mark.parametrize(
    "key", ["samples/../x", "../samples/x", "/etc/passwd", "other/" + "a" * 64, "samples/" + "b" * 64, "samples"]
)
def test_a_key_that_is_none_of_ours_is_refused(stager: Stager, key: str) -> None:
    with pytest.raises(Refused):
        stager.stage(StoredObject("x", key, "a" * 64, 10))


def test_what_never_fits_is_refused_before_it_is_read(url: str, tmp_path: Path, shard: Path) -> None:
    stored = objects.describe_file(shard, Kind.SAMPLES)
    small = Stager(ObjectStore(url), Cache(tmp_path / "small", 1000))
    with pytest.raises(Refused, match="cache of 1000"):
        small.stage(stored)
    with pytest.raises(Refused):
        small.stage(replace(stored, bytes=0))


@pytest.mark.parametrize("url", ["gopher-of-old://x/y", "file-of-none://x"])
def test_a_url_that_nothing_here_opens_is_a_configuration_error_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.url"):
        ObjectStore(url)
    with pytest.raises(ConfigError) as refused:
        ObjectStore("gopher-of-old://me:canary@host/path")
    assert "canary" not in str(refused.value)


def test_a_storage_that_is_away_is_unavailable(tmp_path: Path, shard: Path) -> None:
    (tmp_path / "file").touch()
    store, stored = ObjectStore(f"file://{tmp_path}/file/storage"), objects.describe_file(shard, Kind.SAMPLES)
    with pytest.raises(Unavailable):
        store.put(stored, shard)
