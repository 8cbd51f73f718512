"""Names and identifiers. A name goes into Redis keys and file paths, so its alphabet is closed."""

import hashlib
import os
import re
import time

from tided.model.errors import Refused

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_name(value: str, what: str = "name") -> str:
    """Return `value` if it is a name; raise `Refused` otherwise. `..` cannot occur as a whole path component."""
    if _NAME.fullmatch(value) is None:
        raise Refused(
            f"{what} {value!r} is not a name: 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit"
        )
    return value


def check_digest(value: str, what: str = "digest") -> str:
    """Return `value` if it is a lower-case hexadecimal SHA-256; raise `Refused` otherwise."""
    if _DIGEST.fullmatch(value) is None:
        raise Refused(f"{what} {value!r} is not a SHA-256 digest (64 lower-case hexadecimal digits)")
    return value


def new_id(prefix: str) -> str:
    """A fresh name `prefix-TTTTTTTTTT-RRRRRRRR` that sorts by creation time (milliseconds, 10 base-36 digits).

    Not a secret; 40 random bits tell ids of one millisecond apart.
    """
    return f"{prefix}-{_base36(time.time_ns() // 1_000_000, 10)}-{os.urandom(5).hex()}"


def prompt_group(token_ids: bytes) -> bytes:
    """16 bytes that stand for a prompt: the head of SHA-256 over its token ids as little-endian int32.

    Requests with the same prompt share a group. The held-out split is by group, for ever.
    """
    return hashlib.sha256(token_ids).digest()[:16]


def is_held_out(group: bytes, fraction: float) -> bool:
    """Whether a prompt group belongs to the held-out split: a property of the prompt alone, so that it never changes sides."""
    return int.from_bytes(hashlib.sha256(b"held-out" + group).digest()[:8], "big") < fraction * 2**64


def _base36(value: int, width: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    out = ""
    for _ in range(width):
        value, rest = divmod(value, 36)
        out = digits[rest] + out
    return out


def name_from(text: str, otherwise: str) -> str:
    """The name nearest to any text, such as a directory's: other characters become '-'. `otherwise` if nothing is left."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64] or otherwise
