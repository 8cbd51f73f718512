"""A draft as one sequence of bytes, and the cache of what was brought to a host: whole or not there, bounded, the newest kept."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.draft import bundle, checkpoint
from tided.draft.cache import Cache
from tided.model.errors import Refused, Unavailable

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_what_is_sent_in_pieces_arrives_as_the_same_version(first: Path, tmp_path: Path, piece: int) -> None:
    whole = b"".join(bundle.blocks(first))
    assert bundle.size_of(first) == len(whole)
    assert hashlib.sha256(whole).hexdigest() == checkpoint.version_of(first)
    unpacker = bundle.Unpacker(tmp_path)
    head = whole[:20_000] if piece < 1000 else whole
    for at in range(0, len(head), piece):
        unpacker.write(head[at : at + piece])
    unpacker.write(whole[len(head) :])
    assert unpacker.finish() == checkpoint.verify(tmp_path) == checkpoint.version_of(first)


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_any_part_can_be_read(first: Path, offset: int, count: int) -> None:
    whole = b"".join(bundle.blocks(first))
    assert bundle.read(first, offset, count) == whole[offset : offset + count]
    assert bundle.read(first, len(whole) - 5, count) == whole[-5:][:count]


def test_a_header_that_announces_too_much_is_refused_before_it_is_kept(tmp_path: Path) -> None:
    unpacker = bundle.Unpacker(tmp_path)
    with pytest.raises(Refused, match="at most 65536"):
        unpacker.write((1 << 40).to_bytes(8, "little") + b"x")
    unpacker.close()


def fill(cache: Cache, name: str, size: int) -> None:
    with cache.filling(name, size) as directory:
        (directory / "f").write_bytes(bytes(size))


def test_the_entries_used_longest_ago_make_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    for at, name in enumerate(("a", "b", "c")):
        fill(cache, name, 30)
        os.utime(tmp_path / name, ns=(at, at))
    assert cache.find("a") == tmp_path / "a"  # which makes it the newest
    fill(cache, "d", 40)
    assert sorted(cache.names()) == ["a", "c", "d"]
    assert cache.find("b") is None


def test_what_is_held_stays_and_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    fill(cache, "a", 60)
    with cache.holding(["a"]):
        with pytest.raises(Unavailable, match="beside what is in use"):
            fill(cache, "b", 50)
        cache.drop("a")
        assert cache.names() == ["a"]
    fill(cache, "b", 50)
    assert cache.names() == ["b"]
    with pytest.raises(Refused, match="make it larger"):
        fill(cache, "c", 101)


def test_an_entry_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)

    def fail() -> None:
        with cache.filling("a", 10) as directory:
            (directory / "f").write_bytes(b"half")
            assert cache.find("a") is None
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new-b-1-1").mkdir()  # of a process that was killed
    Cache(tmp_path, 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "", ".new-x", "a\0"])
def test_names_stay_below_the_root(tmp_path: Path, name: str) -> None:
    cache = Cache(tmp_path / "cache", 100)
    with pytest.raises(Refused):
        cache.find(name)
    with pytest.raises(Refused), cache.filling(name, 1):
        pass


def test_a_link_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a").symlink_to(tmp_path)
    assert Cache(tmp_path / "cache", 100).find("a") is None
