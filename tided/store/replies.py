"""Redis replies as what they are. redis-py types them as bytes or str; our clients never decode, so they are bytes."""

from typing import Any


def raw(value: Any) -> bytes | None:
    """The value of a string key or a hash field; None when it is not there."""
    assert value is None or isinstance(value, bytes)
    return value


def fields(value: Any) -> dict[bytes, bytes]:
    """The reply of HGETALL."""
    return dict(value)


def entries(value: Any) -> list[tuple[str, bytes]]:
    """The reply of XRANGE or XREVRANGE over a stream of messages: entry id, and what the field `m` holds (empty if absent)."""
    return [(entry_id.decode(), content.get(b"m", b"")) for entry_id, content in value or ()]
