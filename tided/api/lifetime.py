"""How the API server ends: told to close, or because a handler found the program contradicting itself."""

import anyio

from tided.model.errors import InvariantBroken


class Lifetime:
    """Shared by the server and its handlers. Long polls end with `closed`; `failure` is what the server raises at its end."""

    def __init__(self) -> None:
        self.closed = anyio.Event()
        self.failure: InvariantBroken | None = None

    def close(self) -> None:
        self.closed.set()

    def fail(self, failure: InvariantBroken) -> None:
        self.failure = self.failure or failure
        self.close()
