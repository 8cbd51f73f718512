"""`python -m bench.spin`: keeps a core busy until SIGTERM, without touching memory.

Three of these beside a process on one core leave it a quarter of that core, with no privilege: the scheduler gives equal shares to equal
weights. Each must be a session of its own, as `LocalStack` starts it, because Linux may weigh sessions instead of processes (autogroups).
"""

import argparse
import os

from tided.wire.notify import notify


def main() -> None:
    """Spin. `--nice`: the niceness of what it shares the core with, so that their weights are equal."""
    parser = argparse.ArgumentParser(prog="python -m bench.spin", description=__doc__)
    parser.add_argument("--nice", type=int, default=0)
    os.setpriority(os.PRIO_PROCESS, 0, parser.parse_args().nice)
    notify("READY=1")
    while True:
        pass


if __name__ == "__main__":
    main()
