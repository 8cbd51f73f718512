"""Named failpoints: places where tests make a process die, stop or fail, to prove that it recovers.

`TIDED_FAILPOINT=NAME[:kill|error|pause]` arms one (default `kill`). Without it a failpoint costs one comparison.
"""

import os
import signal

from tided.model.errors import ConfigError, Unavailable

_NAME, _, _action = os.environ.get("TIDED_FAILPOINT", "").partition(":")
_ACTION = _action or "kill"
if _ACTION not in ("kill", "error", "pause"):
    raise ConfigError(f"TIDED_FAILPOINT: action {_ACTION!r} is none of kill, error, pause")


def hit(name: str) -> None:
    """Do what is armed for `name`: kill -9 or SIGSTOP this process, or raise `Unavailable`."""
    if name != _NAME:
        return
    if _ACTION == "error":
        raise Unavailable(f"failpoint {name}")
    os.kill(os.getpid(), signal.SIGKILL if _ACTION == "kill" else signal.SIGSTOP)
