"""Commands to engines, their replies, heartbeats and reports: msgpack maps in the field `m` of a stream entry or in a string key.

Every command carries the leader's epoch. An engine keeps the highest that it has seen and refuses lower ones, so a superseded
leader changes nothing. Bodies are records below; an engine refuses a body that does not decode.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from tided.model.codec import from_plain, to_plain
from tided.model.errors import Refused
from tided.wire.envelope import seal, unseal

SCHEMA = 1
MAX_MESSAGE_BYTES = 1_048_576

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SetSchedule:
    """Drafted tokens by batch size: gammas[b - 1] at batch size b, the last entry beyond."""

    gammas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetCapture:
    """Tap requests that begin from now on, or stop. `credit_bytes` bounds what may wait in the stream."""

    on: bool
    credit_bytes: int


@dataclass(frozen=True, slots=True)
class Swap:
    """Replace the draft by the checkpoint in `path`, whose content digest is `version`, between two steps."""

    version: str
    path: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """Replace the draft by the one whose content digest is `version`, of `bytes` bytes, which the engine fetches (tided.wire.fetch) first.
    Only for engines that declare `Capability.FETCH`."""

    version: str
    bytes: int


@dataclass(frozen=True, slots=True)
class MeasureProfile:
    """Measure T(n) and D(b) again, while nothing is running."""


Body = SetSchedule | SetCapture | Swap | Deliver | MeasureProfile
_KINDS: dict[str, type[Body]] = {
    "schedule": SetSchedule,
    "capture": SetCapture,
    "swap": Swap,
    "deliver": Deliver,
    "profile": MeasureProfile,
}
_NAMES = {cls: name for name, cls in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Command:
    id: str
    epoch: int
    expires_ms: int  # Redis TIME; an engine ignores a command that it reads later than this
    body: Body


@dataclass(frozen=True, slots=True)
class Reply:
    """`data` of a swap: {"version": read back, "seconds": pause of the steps}. `epoch`: the highest that the engine has seen."""

    command: str
    epoch: int
    ok: bool
    error: str
    data: dict[str, Any]


def encode(record: object) -> bytes:
    """A record (heartbeat, report, reply, event) as a msgpack map with the schema version."""
    return seal(SCHEMA, to_plain(record))


def decode(cls: type[T], data: bytes) -> T:
    """The inverse of `encode`. Raises `Refused` for another schema version or anything that does not fit `cls`."""
    return from_plain(cls, _open(data), cls.__name__)


def encode_command(command: Command) -> bytes:
    body = to_plain(command.body)
    plain = {"id": command.id, "epoch": command.epoch, "expires_ms": command.expires_ms}
    return seal(SCHEMA, {**plain, "kind": _NAMES[type(command.body)], "body": body})


def decode_command(data: bytes) -> Command:
    plain = _open(data)
    kind = plain.pop("kind", None)
    if kind not in _KINDS:
        raise Refused(f"command of unknown kind {kind!r}")
    body = from_plain(_KINDS[kind], plain.pop("body", None), f"{kind} command")
    return Command(**_command_fields(plain), body=body)


def _command_fields(plain: dict[str, Any]) -> dict[str, Any]:
    kinds = {"id": str, "epoch": int, "expires_ms": int}
    if set(plain) != set(kinds) or any(type(plain[name]) is not kind for name, kind in kinds.items()):
        raise Refused("command: expected exactly id, epoch, expires_ms, kind and body")
    return plain


def _open(data: bytes) -> dict[str, Any]:
    return unseal(data, "message", SCHEMA, MAX_MESSAGE_BYTES)
