"""Configuration files for stacks that a bench, the demo or a test starts: the default with a few values changed."""

import contextlib
import random
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tided.config import Config, load

DEFAULT = Path("config.toml")


def write_config(path: Path, changes: Mapping[str, Mapping[str, Any]], base: Path | None = DEFAULT) -> Config:
    """Writes `base` (None: the built-in defaults) with `changes` by section to `path`, and returns it checked.

    Raises `ConfigError` when the changes are not a valid configuration.
    """
    tables: dict[str, dict[str, Any]] = tomllib.loads(base.read_text()) if base is not None else {}
    for section, values in changes.items():
        tables[section] = {**tables.get(section, {}), **values}
    lines = list[str]()
    for section, values in tables.items():
        lines += [f"[{section}]", *(f"{key} = {_literal(value)}" for key, value in values.items()), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return load(path)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now, below those that Linux gives to outgoing connections: it stays free until it is used."""
    for port in random.sample(range(15_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no free port on {host}")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
