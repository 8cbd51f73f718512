"""Where the admin socket is, without reading a configuration unless one is named: that costs more than the whole call."""

import os
from pathlib import Path

SYSTEM_SOCKET = Path("/run/tided/tided.sock")
"""Where tided.service listens."""
LOCAL_SOCKET = Path("build/state/tided.sock")
"""Where a tided with the default configuration listens, started from this directory."""


def socket_path(socket: Path | None, config: Path | None) -> Path:
    """--socket, else what --config says, else $TIDED_SOCKET, else the local daemon's if it is there, else the system's.

    Raises `ConfigError` for a bad configuration file.
    """
    if socket is not None:
        return socket
    if config is not None:
        from tided.config import load

        return load(config).daemon.socket_path
    if named := os.environ.get("TIDED_SOCKET"):
        return Path(named)
    return SYSTEM_SOCKET if SYSTEM_SOCKET.exists() and not LOCAL_SOCKET.exists() else LOCAL_SOCKET
