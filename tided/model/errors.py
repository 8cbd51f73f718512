"""The one error tree. Third-party errors are translated into it at the edge, with `raise ... from exc`.

What a caller does with each: `Unavailable` is retried later, `Refused` never, `Conflict` after reading again, `InvariantBroken`
ends the process. The message of each says what is wrong, where, and what to do; it is shown to people without a traceback.
"""


class TideError(Exception):
    """Anything that tided itself can say went wrong."""


class ConfigError(TideError):
    """The configuration is wrong; nothing was changed."""


class Unavailable(TideError):
    """A peer (Redis, an engine, a worker, a disk) cannot be reached or is full now. Retry with backoff."""


class Refused(TideError):
    """The request itself is wrong or forbidden (bad checkpoint, unknown schema, stale epoch). Never retry as it is."""


class NotFound(Refused):
    """The draft, job, engine or worker that the request names does not exist."""


class Superseded(Refused):
    """A newer leader exists: the write carried an old epoch. Stop leading; never retry."""


class Conflict(TideError):
    """Somebody else changed the state in between. Read again, then decide again."""


class InvariantBroken(TideError):
    """The program contradicts itself. The process must end and be restarted from stored state."""
