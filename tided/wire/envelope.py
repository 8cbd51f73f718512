"""The envelope of everything on the wire: a msgpack map whose first key `v` is the schema version."""

from typing import Any, cast

import msgpack

from tided.model.errors import Refused


def seal(schema: int, plain: dict[str, Any]) -> bytes:
    """`plain` as a msgpack map with its schema version first."""
    return cast("bytes", msgpack.packb({"v": schema, **plain}))


def unseal(data: bytes, what: str, schema: int, max_bytes: int) -> dict[str, Any]:
    """The map without its version. Raises `Refused` if it is too long, not a msgpack map or of another schema version."""
    if len(data) > max_bytes:
        raise Refused(f"{what} of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        plain: Any = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as exc:
        raise Refused(f"{what} is not msgpack: {type(exc).__name__}") from exc
    if not isinstance(plain, dict) or plain.pop("v", None) != schema:
        raise Refused(f"{what} has an unknown schema version; this tided speaks version {schema}")
    return plain
