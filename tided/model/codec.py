"""Records to plain data and back: the one way in which frozen dataclasses become JSON or msgpack.

Decoding is strict: an unknown field, a missing one or a value of another type is `Refused`, with the path of the field named.
The base installation carries no validation library, so this stays small on purpose: dataclasses, enums, `str`, `int`, `float`,
`bool`, `bytes`, `None`, `tuple[T, ...]`, `dict[str, T]`, unions of these, and `Any` for a plain value.
"""

import dataclasses
import enum
import types
import typing
from functools import cache
from typing import Any, TypeVar

from tided.model.errors import Refused

T = TypeVar("T")

_PLAIN = frozenset({str, int, float, bool, bytes, types.NoneType})


def to_plain(value: Any) -> Any:
    """Dataclasses become dicts, tuples lists, enums their values; everything else stays as it is."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    names = _field_names(kind)
    if names is not None:
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """Of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def from_plain(cls: type[T], data: Any, path: str = "") -> T:
    """Build a `cls` (a dataclass) from what `to_plain` gave. Raises `Refused` naming the first field that does not fit."""
    return typing.cast("T", _decode(cls, data, path or cls.__name__))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(kind: Any, data: Any, path: str) -> Any:
    if kind is Any:
        return data
    origin = typing.get_origin(kind)
    if origin is typing.Union or origin is types.UnionType:
        return _decode_union(typing.get_args(kind), data, path)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise _wrong(path, "a list", data)
        args = typing.get_args(kind)
        items = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(items) != len(data):
            raise Refused(f"{path}: expected {len(items)} values, got {len(data)}")
        return tuple(
            _decode(item, value, f"{path}[{i}]") for i, (item, value) in enumerate(zip(items, data, strict=True))
        )
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(path, "a table", data)
        value_kind = typing.get_args(kind)[1]
        return {str(key): _decode(value_kind, value, f"{path}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_record(typing.cast("type", kind), data, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(data)
        except ValueError:
            raise Refused(f"{path}: {data!r} is none of {', '.join(str(item.value) for item in kind)}") from None
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is type(None) and data is None:
        return None
    if not isinstance(kind, type) or not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise _wrong(path, getattr(kind, "__name__", str(kind)), data)
    return data


def _decode_record(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(path, "a table", data)
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in data if key not in fields)
    if unknown:
        raise Refused(f"{path}: unknown field {unknown[0]!r}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Refused(f"{path}: field {name!r} is missing")
    return cls(**values)


def _decode_union(kinds: tuple[Any, ...], data: Any, path: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    error: Refused | None = None
    for kind in rest:
        try:
            return _decode(kind, data, path)
        except Refused as exc:
            error = error or exc
    raise error or _wrong(path, "nothing", data)


def _wrong(path: str, expected: str, data: Any) -> Refused:
    return Refused(f"{path}: expected {expected}, got {type(data).__name__}")
