"""The shared storage, in a directory and in a bucket of a real S3 server: put once however often it is put, whole or not there, and
nothing that does not verify reaches a host's cache."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tided.draft import checkpoint
from tided.draft.cache import Cache
from tided.model.errors import ConfigError, NotFound, Refused, Unavailable
from tided.model.jobs import StoredObject
from tided.store import objects
from tided.store.objects import Kind, ObjectStore, Stager

pytest_plugins = ("tests.tiny_fixtures", "tests.s3_fixtures")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.real)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_url") if request.param == "s3" else f"file://{tmp_path}/storage"


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
    """Another host's view: it shares nothing with the store."""
    filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True)
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


def test_what_other_hosts_put_and_remove_is_seen_at_once(url: str, shard: Path) -> None:
    store, stored = ObjectStore(url), objects.describe_file(shard, Kind.SAMPLES)
    other = replace(stored, sha256="a" * 64, key=f"samples/{'a' * 64}")
    store.put(stored, shard)
    filesystem, path = raw(url, other.key)
    for _ in range(2):
        assert list(store.sizes()) == [stored.key]  # which is where a listing would be kept
        with pytest.raises(NotFound):
            list(store.blocks(other))
        filesystem.pipe_file(path, b"theirs")
        assert b"".join(store.blocks(other)) == b"theirs"
        assert store.sizes(Kind.SAMPLES)[other.key] == 6
        filesystem.rm_file(path)


def test_an_object_of_several_parts_is_there_whole_or_not_at_all(url: str, stager: Stager, tmp_path: Path) -> None:
    (path := tmp_path / "large").write_bytes(bytes(range(256)) * (20 << 12))
    store, stored = ObjectStore(url), objects.describe_file(path, Kind.SAMPLES)
    seen: list[str] = []

    def look() -> None:
        seen.extend(stager.objects.sizes(Kind.SAMPLES))
        with pytest.raises(NotFound):
            list(stager.objects.blocks(stored))

    assert store.put(stored, path, look)
    assert seen == []
    assert stager.stage(stored).read_bytes() == path.read_bytes()


def test_what_a_storage_must_be_able_to_do_is_proved_and_leaves_nothing(url: str) -> None:
    store = ObjectStore(url)
    store.prove()
    assert store.sizes() == {}


def test_threads_share_a_store(url: str, stager: Stager, tmp_path: Path) -> None:
    paths = [tmp_path / f"shard-{number}" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100_000)
    found = [objects.describe_file(path, Kind.SAMPLES) for path in (*paths, *paths)]
    store = ObjectStore(url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.put, found, (*paths, *paths)))
        staged = list(pool.map(stager.stage, found[:8]))
    assert [path.read_bytes() for path in staged] == [path.read_bytes() for path in paths]
    assert store.sizes() == {stored.key: stored.bytes for stored in found[:8]}


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
