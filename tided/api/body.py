"""What comes in: strict JSON bodies under a size cap, and query parameters with declared names and ranges."""

import json
from typing import Any, TypeVar

from starlette.requests import Request

from tided.model.codec import from_plain
from tided.model.errors import Refused

MAX_BODY_BYTES = 65_536

T = TypeVar("T")


async def read_body(request: Request, cls: type[T]) -> T:
    """The request's JSON object as a `cls`; an empty body is an empty object. Raises `Refused`; never reads more than the cap."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise Refused(f"the request body is over the limit of {MAX_BODY_BYTES} bytes")
    return from_plain(cls, parse(bytes(data) or b"{}"), "body")


def parse(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no key twice. Raises `Refused` without repeating the data."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise Refused(f"the request body is not JSON: {type(exc).__name__}") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("the request body has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise Refused(f"the request body holds {name}, which is not JSON")


class Query:
    """Query parameters by declared name. `done()` refuses what was not asked for, so a misspelt parameter is never ignored."""

    def __init__(self, request: Request) -> None:
        items = request.query_params.multi_items()
        self._left = dict(items)
        if len(self._left) != len(items):
            raise Refused("a query parameter is given twice")

    def text(self, name: str, default: str) -> str:
        return self._left.pop(name, default)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        raw = self._left.pop(name, None)
        try:
            value = default if raw is None else float(raw)
        except ValueError:
            raise Refused(f"query parameter {name}: expected a number, got {raw!r}") from None
        if not low <= value <= high:
            raise Refused(f"query parameter {name}: expected {low:g} to {high:g}, got {raw}")
        return value

    def count(self, name: str, default: int, high: int) -> int:
        value = self.number(name, default, 1, high)
        if value != int(value):
            raise Refused(f"query parameter {name}: expected a whole number")
        return int(value)

    def done(self) -> None:
        if self._left:
            raise Refused(f"unknown query parameter {sorted(self._left)[0]!r}")
