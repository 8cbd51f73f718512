"""A serving engine as a service of `tided.local.LocalStack`: runs a command, and says READY=1 once its server answers.

`python -m bench.engines.launch URL SETTINGS COMMAND...`, where SETTINGS is a JSON object of environment variables for the command.
SIGTERM goes to the command, which then ends in its own order.
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import httpx

from tided.wire.notify import notify

POLL_S = 0.5


def main() -> int:
    """The command's exit status."""
    url, settings, *command = sys.argv[1:]
    inherited = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    process = subprocess.Popen(command, env={**inherited, **json.loads(settings)})

    def end(_: int, __: FrameType | None) -> None:
        process.terminate()

    signal.signal(signal.SIGTERM, end)
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                notify("READY=1")
                break
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
