"""How a draft reaches an engine that shares no filesystem with tided: in parts, through Redis, as fast as the engine asks for them.

The draft is one sequence of bytes (tided.draft.bundle). The engine appends requests to the list `keys.fetches`; whoever leads answers
each by appending parts, in order, to the list `keys.parts`, which the engine takes from. Requests may be repeated: a part says where
it belongs. So what Redis holds at any time is what was asked for and not taken yet, and a new leader goes on where the old one ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tided.model.errors import Refused

PART_BYTES = 1_036_800
"""Just under 1 MiB, of which Redis wastes least; with the 8 bytes in front."""
WINDOW_BYTES = 8 * PART_BYTES
"""The most that one request may ask for."""
TTL_S = 60
_OFFSET_BYTES = 8


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Send `bytes` bytes of draft `version` from `offset` on, for the `deliver` command of this id."""

    command: str
    version: str
    offset: int
    bytes: int


def part(offset: int, data: bytes) -> bytes:
    """What goes into the list: where `data` belongs, 8 bytes little-endian, and the data."""
    return offset.to_bytes(_OFFSET_BYTES, "little") + data


def parts(offset: int, data: bytes) -> Iterator[bytes]:
    """All that go into the list for `data`, in order."""
    for at in range(0, len(data), PART_BYTES):
        yield part(offset + at, data[at : at + PART_BYTES])


def split(received: bytes) -> tuple[int, memoryview]:
    """The inverse of `part`. Raises `Refused` for what is none."""
    if not _OFFSET_BYTES < len(received) <= _OFFSET_BYTES + PART_BYTES:
        raise Refused(f"a part of a draft of {len(received)} bytes")
    return int.from_bytes(received[:_OFFSET_BYTES], "little"), memoryview(received)[_OFFSET_BYTES:]


def check(request: FetchRequest) -> FetchRequest:
    """The request, if it may be answered. Raises `Refused`."""
    if request.offset < 0 or not 0 < request.bytes <= WINDOW_BYTES:
        raise Refused(f"a request for {request.bytes} bytes of a draft from {request.offset} on")
    return request
