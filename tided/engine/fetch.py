"""Fetching a draft over Redis into a cache on the engine's host: redis and msgpack only (tided.wire.fetch has the protocol)."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import redis
from redis.exceptions import RedisError

from tided.draft.bundle import Unpacker
from tided.draft.cache import Cache
from tided.draft.identity import version_of
from tided.engine.link import Backoff
from tided.model.errors import Refused, TideError, Unavailable
from tided.model.ids import check_digest
from tided.wire import fetch, keys
from tided.wire.control import Command, Deliver, encode

ASK_AGAIN_S = 3.0
"""Without a part for so long, what is missing is asked for again: perhaps of another leader."""
_POLL_S = 0.5
CACHE_BYTES = 8 << 30


def cache_dir(engine: str, environment: Mapping[str, str] | None = None) -> Path:
    """Where an engine keeps drafts that were sent to it: TIDED_CACHE_DIR, or below the user's cache directory.

    An engine of several hosts needs one that all of them see under this path.
    """
    given = os.environ if environment is None else environment
    if root := given.get("TIDED_CACHE_DIR", ""):
        return Path(root)
    home = given.get("HOME", "") or tempfile.gettempdir()
    return Path(given.get("XDG_CACHE_HOME", "") or Path(home, ".cache")) / "tided" / "drafts" / engine


class Fetcher:
    """`fetch` runs on a thread of its own. What the cache gives was hashed again: a disk may have changed it."""

    def __init__(self, client: redis.Redis, engine: str, directory: Path, max_bytes: int = CACHE_BYTES) -> None:
        self._client, self._engine = client, engine
        self._cache = Cache(directory, max_bytes)

    def fetch(self, command: Command, body: Deliver, left_s: float, wanted: Callable[[], bool]) -> Path:
        """The directory of the draft, whole and checked by its digest. `left_s`: until the command expires.

        Raises `Refused` when what came is not that draft, or when it is `wanted` no more; `Unavailable` when it did not come in time.
        """
        version = check_digest(body.version, "version")
        found = self._cached(version)
        if found is not None:
            return found
        with self._cache.filling(version, body.bytes) as directory:
            self._receive(command.id, body, directory, time.monotonic() + left_s, wanted)
        found = self._cached(version)
        if found is None:
            raise Unavailable(f"draft {version[:12]} was fetched and is not in the cache: its disk fails")
        return found

    def _cached(self, version: str) -> Path | None:
        directory = self._cache.find(version)
        if directory is None:
            return None
        try:
            if version_of(directory) == version:
                return directory
        except TideError:
            pass  # fetched anew
        self._cache.drop(version)
        return None

    def _receive(
        self, command: str, body: Deliver, directory: Path, until_s: float, wanted: Callable[[], bool]
    ) -> None:
        unpacker, parts = Unpacker(directory), keys.parts(self._engine, command)
        try:
            taken = asked = 0
            heard_s, backoff = time.monotonic(), Backoff()
            while taken < body.bytes:
                now_s = time.monotonic()
                if not wanted():
                    raise Refused(f"draft {body.version[:12]}: another swap was asked for, or the engine ends")
                if now_s >= until_s:
                    raise Unavailable(f"draft {body.version[:12]}: {taken} of {body.bytes} bytes came in time")
                if now_s - heard_s >= ASK_AGAIN_S:
                    self._forget(keys.fetches(self._engine))  # what nobody has answered
                    asked, heard_s = taken, now_s
                try:
                    asked = self._ask(command, body, taken, asked)
                    received = cast("Any", self._client.blpop([parts], timeout=cast("Any", _POLL_S)))
                except (RedisError, OSError):
                    time.sleep(backoff.next_s())
                    continue
                if received is None:
                    continue
                backoff.reset()
                offset, data = fetch.split(received[1])
                if offset == taken:  # or it was asked for twice, or one before it is missing
                    unpacker.write(data)
                    taken, heard_s = taken + len(data), time.monotonic()
            actual = unpacker.finish()
        finally:
            unpacker.close()
            self._forget(parts)
        if actual != body.version:
            raise Refused(
                f"draft {body.version[:12]}: what came is {actual[:12]}; it was changed on the way or in tided's store"
            )

    def _ask(self, command: str, body: Deliver, taken: int, asked: int) -> int:
        """Have up to two windows asked for and not taken, so that the next one is under way while one is written."""
        while asked < body.bytes and asked - taken <= fetch.WINDOW_BYTES:
            count = min(fetch.WINDOW_BYTES, body.bytes - asked)
            pipeline = self._client.pipeline(transaction=True)
            pipeline.rpush(keys.fetches(self._engine), encode(fetch.FetchRequest(command, body.version, asked, count)))
            pipeline.expire(keys.fetches(self._engine), fetch.TTL_S)
            pipeline.execute()
            asked += count
        return asked

    def _forget(self, key: str) -> None:
        with suppress(RedisError, OSError):  # its TTL does it too
            self._client.delete(key)
