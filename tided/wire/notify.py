"""What a service tells systemd, over the socket in NOTIFY_SOCKET; without one, nothing is sent."""

import os
import socket


def notify(state: str) -> None:
    """Send e.g. "READY=1", "WATCHDOG=1" or "STATUS=...". Never raises: a manager that is gone must not end the service."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(state.encode(), address)
    except OSError:
        return


def watchdog_interval_s() -> float | None:
    """Half of what systemd's WatchdogSec asks of this process, or None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2e6
    except (KeyError, ValueError):
        return None
