"""A proxy between a client and a unix socket that can refuse, cut, slow and black-hole connections: a Redis that fails on demand."""

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

COMMANDS, REPLIES = ("forward", "mute"), ("forward",)
"""Modes in which commands, and replies, are passed on."""


class Proxy:
    """Listens on `url`. `mode`: "forward"; "mute", where commands arrive and replies do not; "swallow", where nothing arrives;
    "refuse", for new connections. A connection that lost something stays mute. `delay_s`: how late everything arrives.
    `dropped`: bytes of replies that were lost. Without an upstream connections are refused.
    """

    def __init__(self, path: Path, upstream: str) -> None:
        self.url = f"unix://{path}"
        self.mode = "forward"
        self.delay_s = 0.0
        self.dropped = 0
        self._upstream = upstream
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection that is open now."""
        for pair in self._pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def close(self) -> None:
        self.mode = "refuse"
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._upstream)
            except OSError:
                server.close()
                client.close()
                continue
            self._pairs.append((client, server))
            for source, sink, modes in ((client, server, COMMANDS), (server, client, REPLIES)):
                threading.Thread(target=self._pump, args=(source, sink, modes), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, modes: tuple[str, ...]) -> None:
        with suppress(OSError), source, sink:
            whole = True
            while data := source.recv(1 << 16):
                whole = whole and self.mode in modes
                time.sleep(self.delay_s)
                if whole:
                    sink.sendall(data)
                elif modes == REPLIES:
                    self.dropped += len(data)


@contextmanager
def proxied(directory: Path, upstream_url: str) -> Generator[Proxy]:
    proxy = Proxy(directory / "proxy.sock", upstream_url.removeprefix("unix://"))
    try:
        yield proxy
    finally:
        proxy.close()
