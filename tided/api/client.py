"""The admin API's client: synchronous, one connection a call, standard library only, so that tidectl starts fast.

Errors come back as the `TideError` that the daemon raised; a daemon that cannot be reached is `Unavailable`.
"""

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from tided.model.codec import from_plain
from tided.model.errors import ConfigError, Conflict, InvariantBroken, NotFound, Refused, TideError, Unavailable
from tided.model.events import Event
from tided.model.status import Status

TIMEOUT_S = 10.0
SLOW_TIMEOUT_S = 300.0
"""For calls that do work before they answer: writing a first draft, purging."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024

_KINDS: dict[str, type[TideError]] = {
    kind.__name__: kind for kind in (ConfigError, Conflict, InvariantBroken, NotFound, Refused, Unavailable)
}


class Client:
    """Talks to the tided that serves on `socket_path`. Nothing is opened until a call is made."""

    def __init__(self, socket_path: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.socket_path = socket_path
        self._timeout_s = timeout_s

    def get(self, path: str, query: Mapping[str, str | int | float] | None = None) -> Any:
        """The answer's JSON. `path` as `api_path` builds it."""
        return self._call("GET", f"{path}?{urlencode(query)}" if query else path, None, self._timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """Ask for a change; `body` becomes a JSON object."""
        data = json.dumps(dict(body or {})).encode()
        return self._call("POST", path, data, timeout_s or self._timeout_s)

    def status(self) -> Status:
        return from_plain(Status, self.get("/v1/status"))

    def events(self, after: str = "", limit: int = 100, wait_s: float = 0.0) -> list[Event]:
        """Events after the id `after` ("": the newest), oldest first; waits up to `wait_s` (at most 30) for the first one."""
        path = f"/v1/events?{urlencode({'after': after, 'limit': limit, 'wait_s': wait_s})}"
        plain = self._call("GET", path, None, self._timeout_s + wait_s)
        return [from_plain(Event, item) for item in plain]

    def _call(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Any:
        connection = _UnixConnection(self.socket_path, timeout_s)
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES + 1)
        except PermissionError as exc:
            raise Refused(f"no permission to use {self.socket_path}: run as tided's user, or join its group") from exc
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise Unavailable(
                f"tided is not running, or its socket is elsewhere: {self.socket_path}; "
                "pass --socket PATH or --config FILE"
            ) from exc
        except TimeoutError as exc:
            raise Unavailable(f"tided did not answer within {timeout_s:g} s on {self.socket_path}") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(f"tided went away while it answered ({type(exc).__name__}); try again") from exc
        finally:
            connection.close()
        return _answer(response.status, data)


def api_path(*parts: str) -> str:
    """`/v1/a/b` with each part quoted, so that a name can never become another path."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _answer(status: int, data: bytes) -> Any:
    try:
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError
        plain = json.loads(data)
        if status == 200:
            return plain
        error = plain["error"]
        kind, message = _KINDS.get(error["kind"], TideError), str(error["message"])
    except (ValueError, KeyError, TypeError) as exc:
        raise Unavailable(
            f"the answer (HTTP {status}) is not tided's; does something else serve on this socket?"
        ) from exc
    raise kind(message)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
