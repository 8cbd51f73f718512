"""Files written past the page cache: every byte in its place, whatever the sizes, and on filesystems that cannot."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from tided.draft import output
from tided.draft.output import BUFFER_BYTES, write_through
from tided.draft.tensors import Stacked, read_header, read_tensor_entry, write_file


@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (4096,), (4095, 2), (BUFFER_BYTES,), (BUFFER_BYTES - 1, 0, 2), (7, 2 * BUFFER_BYTES, 5)]
)
def test_parts_follow_each_other(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    parts = [os.urandom(size) for size in sizes]
    path = tmp_path / "file"
    path.write_bytes(b"what was there before")
    write_through(path, map(memoryview, parts))
    assert path.read_bytes() == b"".join(parts)


@pytest.mark.parametrize("refused_at", ["open", "write"])
def test_a_filesystem_without_direct_writes_is_written_to_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    really = {"open": os.open, "write": os.write}
    refused: list[str] = []

    def refuse(*arguments: object) -> int:
        if not refused:
            refused.append(refused_at)
            raise OSError(errno.EINVAL, "not here")
        return really[refused_at](*arguments)  # type: ignore[operator]

    monkeypatch.setattr(output.os, refused_at, refuse)
    write_through(tmp_path / "file", [memoryview(b"x" * 5000)])
    assert refused == [refused_at]
    assert (tmp_path / "file").read_bytes() == b"x" * 5000


def test_a_tensor_in_parts_is_the_same_file(tmp_path: Path) -> None:
    whole = np.arange(7 * 2 * 3, dtype=np.uint16).reshape(7, 2, 3)
    other = np.arange(4, dtype="<i4")
    write_file(tmp_path / "whole", {"states": whole, "ids": other}, {"a": "b"})
    parts = Stacked([whole[:1], whole[1:1], whole[1:5], whole[5:]])
    write_file(tmp_path / "parts", {"states": parts, "ids": other}, {"a": "b"})
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    read = read_tensor_entry(tmp_path / "parts", read_header(tmp_path / "parts").entries["states"])
    assert np.array_equal(np.asarray(read), whole)
