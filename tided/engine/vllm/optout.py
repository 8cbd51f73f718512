"""The header `x-tide-no-capture: 1` for vLLM: `--middleware tided.engine.vllm.optout.NoCapture`.

vLLM hands headers to the engine in one place only: `X-Request-Id` becomes part of the request's id. So the middleware marks that id,
and the tap passes over requests whose id carries the mark. Clients that cannot set headers pass `"vllm_xargs": {"tide_no_capture":
1}` in the body; that needs no middleware.
"""

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tided.engine.plugin import NO_CAPTURE_HEADER

MARK = "tide-no-capture"
EXTRA_ARGUMENT = "tide_no_capture"

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]


class NoCapture:
    """Marks the id of each request that carries the header."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            if (NO_CAPTURE_HEADER.encode(), b"1") in headers:
                scope = {**scope, "headers": _marked(headers)}
        await self._app(scope, receive, send)


def opted_out(request_id: str, extra_arguments: Any) -> bool:
    """Whether a request must not be tapped, by the mark in its id or by its extra arguments."""
    return MARK in request_id or bool(isinstance(extra_arguments, dict) and extra_arguments.get(EXTRA_ARGUMENT))


def _marked(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    given = next((value for name, value in headers if name == b"x-request-id"), secrets.token_hex(8).encode())
    others = [(name, value) for name, value in headers if name != b"x-request-id"]
    return [*others, (b"x-request-id", MARK.encode() + b"-" + given)]
