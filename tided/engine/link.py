"""A synchronous Redis connection for threads inside an engine's process: nothing but the base dependencies."""

from typing import Any, cast

import redis
from redis._parsers import Encoder
from redis.connection import PythonRespSerializer

CONNECT_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 10.0
_BUFFER_CUTOFF_BYTES = 6000


def connect(url: str, *, block_s: float = 0.0) -> redis.Redis:
    """A client whose payloads go to the socket uncopied, and which never repeats a command by itself.

    `command_packer`: redis-py's hiredis packer would copy each payload (2 to 3 ms a MB) where its Python packer hands the
    memoryview on. It is semi-private, hence the pin in pyproject.toml and tests/test_tap_publisher.py. `block_s`: the longest
    blocking read that the caller will make.
    """
    packer = PythonRespSerializer(_BUFFER_CUTOFF_BYTES, Encoder("utf-8", "strict", False).encode)
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=COMMAND_TIMEOUT_S + block_s,
        retry=None,
        command_packer=cast("Any", packer),
    )


class Backoff:
    """Waiting times after failures: doubling from `first_s` up to `most_s`, back to the first after a success."""

    def __init__(self, first_s: float = 0.05, most_s: float = 2.0) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._next_s = first_s

    def next_s(self) -> float:
        """How long to wait now."""
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        return wait_s

    def reset(self) -> None:
        self._next_s = self._first_s
