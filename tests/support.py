"""What several test modules need: polling with a deadline, and an end at a failpoint."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

import pytest

from tided.model import failpoints
from tided.model.errors import Unavailable

T = TypeVar("T")


@overload
async def eventually(check: Callable[[], Awaitable[T | None]], timeout_s: float = 60.0, poll_s: float = 0.01) -> T: ...
@overload
async def eventually(check: Callable[[], T | None], timeout_s: float = 60.0, poll_s: float = 0.01) -> T: ...
async def eventually(check: Callable[[], Any], timeout_s: float = 60.0, poll_s: float = 0.01) -> Any:
    """Call `check` until what it returns (or awaits) is truthy, and give that; an AssertionError in it counts as not yet.

    Fails with the last value or assertion after `timeout_s`. The deadline only says when to give up: it must never decide a test
    on a slow or busy machine, so leave it, or make it longer.
    """
    deadline = time.monotonic() + timeout_s
    last: object = None
    while True:
        try:
            result = check()
            value = await result if inspect.isawaitable(result) else result
            if value:
                return value
            last = value
        except AssertionError as exc:
            last = exc
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s; last: {last!r}")
        await asyncio.sleep(poll_s)


def cut_at(patch: pytest.MonkeyPatch, name: str) -> list[str]:
    """From now on a failpoint of this name ends whoever comes by, once, as far as that can be done to a part of a process.

    Gives what was hit so far.
    """
    hit: list[str] = []

    def reached(at: str) -> None:
        if at == name and not hit:
            hit.append(at)
            raise Unavailable(f"failpoint {at}")

    patch.setattr(failpoints, "hit", reached)
    return hit
