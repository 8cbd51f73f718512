"""Engines of kind "boxed": they speak the Redis protocol from inside a container, where the drafts are mounted elsewhere."""

import os
from pathlib import Path

from tided.backends.redis import RedisBackend
from tided.model.errors import Refused

MOUNT = "TIDED_EXAMPLE_MOUNT"
"""Environment variable of tided: "OUTSIDE=INSIDE", the same directory as tided and as the engine see it."""


class BoxedBackend(RedisBackend):
    """As any engine that speaks the protocol; only the path of a swap is another one."""

    async def send_swap(self, version: str, path: Path, epoch: int, ttl_s: float) -> str:
        """As `Backend.send_swap`. Raises `Refused` for a draft that the engine cannot see."""
        outside, _, inside = os.environ.get(MOUNT, "").partition("=")
        if not inside or not path.is_relative_to(outside):
            raise Refused(
                f"engine {self.engine}: {path} is not below what {MOUNT} says is mounted ({outside or 'nothing'})"
            )
        return await super().send_swap(version, Path(inside) / path.relative_to(outside), epoch, ttl_s)
