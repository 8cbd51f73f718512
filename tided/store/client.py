"""Connections to Redis or Valkey, and the one place where their errors become ours.

Retries are off everywhere (`retry=None`): redis-py's default of ten repeats a command whose reply was lost, which duplicates
an XADD. Whoever calls retries by itself, knowing what is idempotent. Replies are bytes.
"""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import redis.asyncio
from redis import exceptions

from tided.model.errors import ConfigError, Refused, TideError, Unavailable

CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 10.0
CONNECTIONS = 32
"""Of one client at most. What is asked while all are busy waits for one (redis-py's own pool raises at its 101st)."""
MIN_SERVER = (7, 0)
_UNIX_PATH_BYTES = 107


def connect(url: str) -> redis.asyncio.Redis:
    """A client for ordinary commands; connects on first use. `unix://PATH`, `redis://HOST` or `rediss://HOST`.

    Raises `ConfigError` for a URL that cannot be right; never shows its password.
    """
    return _client(url, COMMAND_TIMEOUT_S, CONNECTIONS)


def connect_blocking(url: str, block_s: float) -> redis.asyncio.Redis:
    """A client for blocking reads of up to `block_s`: one connection of its own, large socket reads.

    Close it when a read was cancelled: the reply of the cancelled command may still arrive on its connection.
    """
    return _client(url, block_s + COMMAND_TIMEOUT_S, 1, socket_read_size=1 << 20)


@asynccontextmanager
async def closing(client: redis.asyncio.Redis) -> AsyncGenerator[redis.asyncio.Redis]:
    """Use a client and close it, also when the task is cancelled: shielded, for at most a second."""
    try:
        yield client
    finally:
        with anyio.move_on_after(1.0, shield=True):
            await client.aclose()


def _client(url: str, timeout_s: float, connections: int, **options: Any) -> redis.asyncio.Redis:
    parts = urlsplit(url)
    if parts.scheme not in ("unix", "redis", "rediss"):
        raise ConfigError(f"Redis URL {shown(url)}: expected unix://, redis:// or rediss://")
    if parts.scheme == "unix" and len(parts.path.encode()) > _UNIX_PATH_BYTES:
        raise ConfigError(f"Redis URL {shown(url)}: a unix socket path has at most {_UNIX_PATH_BYTES} bytes")
    try:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=None,
            **options,
        )
        return redis.asyncio.Redis.from_pool(pool)
    except ValueError as exc:
        raise ConfigError(f"Redis URL {shown(url)} is not valid: {type(exc).__name__}") from None


def shown(url: str) -> str:
    """`url` as it may be printed: without user, password and query."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(malformed)"
    return f"{parts.scheme}://{host}{port}{parts.path}"


@contextmanager
def translated(what: str = "") -> Generator[None]:
    """Turn redis-py's errors into `Unavailable` (retry) or `Refused` (never as it is). Messages carry no payload bytes.

    Also a decorator of functions that return at once; inside coroutines use it as `with translated("..."):`.
    """
    try:
        yield
    except exceptions.RedisError as exc:
        raise error_of(exc, what) from exc
    except OSError as exc:
        raise Unavailable(f"{_at(what)}Redis cannot be reached ({type(exc).__name__}); is the server running?") from exc


def error_of(exc: exceptions.RedisError, what: str) -> TideError:
    """The TideError that means the same as `exc`. Of a server's message only its error code is taken: pipelines quote
    the commands they fail on, payload included."""
    at = _at(what)
    if isinstance(exc, exceptions.AuthenticationError | exceptions.NoPermissionError):
        return Refused(f"{at}Redis refuses this user ({type(exc).__name__}); check redis.url and the server's ACL")
    if isinstance(exc, exceptions.OutOfMemoryError):
        return Unavailable(f"{at}Redis is at its memory limit; it refuses writes until samples are consumed")
    if isinstance(exc, exceptions.ConnectionError | exceptions.TimeoutError):
        return Unavailable(f"{at}Redis cannot be reached ({type(exc).__name__}); is the server running?")
    if isinstance(exc, exceptions.ResponseError):
        code = _code(exc)
        if code in (
            "LOADING",
            "MASTERDOWN",
            "READONLY",
            "BUSY",
            "MISCONF",
            "OOM",
            "EXECABORT",
            "CLUSTERDOWN",
            "TRYAGAIN",
            "NOGROUP",  # the server lost its data; whoever reads makes the group again
        ):
            return Unavailable(f"{at}Redis cannot serve this now ({code})")
        return Refused(f"{at}Redis refuses the command ({code or type(exc).__name__})")
    return Unavailable(f"{at}Redis failed ({type(exc).__name__})")


def _at(what: str) -> str:
    return f"{what}: " if what else ""


def _code(exc: exceptions.RedisError) -> str:
    head = str(exc).rpartition(" caused error: ")[2].split(" ", 1)[0]
    return head if head.isupper() and head.isalpha() and len(head) <= 20 else ""


async def redis_time_ms(client: redis.asyncio.Redis) -> int:
    """The server's clock in milliseconds since the epoch: the only wall clock that tided judges expiry by."""
    with translated("TIME"):
        seconds, micros = await client.time()
    return seconds * 1000 + micros // 1000


async def check_server(client: redis.asyncio.Redis) -> str:
    """The server's name and version, for people. Raises `Refused` below Redis 7 / Valkey 7, `Unavailable` when unreachable."""
    with translated("server check"):
        info = await client.info("server")
    name = str(info.get("server_name", "redis"))
    version = str(info.get(f"{name}_version", info.get("redis_version", "0")))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MIN_SERVER:
        raise Refused(
            f"{name} {version} is too old: tided needs Redis or Valkey {MIN_SERVER[0]}.{MIN_SERVER[1]} or newer"
        )
    return f"{name} {version}"
