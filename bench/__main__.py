"""`python -m bench NAME...`: runs benches one after another, each in a process of its own.

`all`, `loop`, `engines`, `training` and `scale-all` are groups.

Those of group `engines` need the environments of `make engines`, `peers` that of `engines/build.py speculators`. `device`
needs an accelerator.
"""

import argparse
import subprocess
import sys

LOOP = ("tap", "swap", "daemon", "trainer", "engine")
ENGINES = (
    "engines.tap",
    "engines.tap sglang",
    "engines.cost",
    "engines.speedup",
    "engines.temperature",
    "engines.swaps",
    "engines.swaps sglang",
    "engines.shift",
    "engines.shift sglang",
    "engines.recurring",
)
TRAINING = ("recompute", "storage", "peers")
SCALE = ("scale", "dataplane")
DEVICE = ("device",)
ALL = (*LOOP, *SCALE, "storage", "policy", "forgetting", "hetero", "shift")
GROUPS = {"all": ALL, "loop": LOOP, "engines": ENGINES, "training": TRAINING, "scale-all": SCALE}


def main() -> None:
    """Exit code 1 when a bench failed; the others run nevertheless."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        choices=(*GROUPS, *ALL, *ENGINES, *TRAINING, *DEVICE),
        metavar="NAME",
        help=", ".join((*GROUPS, *ALL)),
    )
    wanted = [name for given in parser.parse_args().names for name in GROUPS.get(given, (given,))]
    failed: list[str] = []
    for name in dict.fromkeys(wanted):
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", *f"bench.{name}".split()], check=False).returncode != 0:
            failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
