"""`python -m demo`: a real model gets faster while it serves. Writes its chart and data under build/demo/."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from bench.model import DEFAULT, ModelMissing, make
from bench.report import write_json
from demo.chart import draw
from demo.run import Demo, Plan
from demo.summary import promises, summary
from tided.model.errors import TideError

DIRECTORY = Path("build/demo")


def main() -> None:
    """Exit codes: 0 when all that the demo promises was shown, 1 when not, 2 on an error, 130 when it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    options = parser.parse_args()
    demo = Demo(Plan(make_or_exit(options.model), options.directory))
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    code = 0
    try:
        asyncio.run(demo.run())
    except TideError as exc:
        print(f"error: {exc}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped")
        code = 130
    if demo.record.turns:
        tell(demo, options.directory)
        code = code or int(not all(kept for _, kept in promises(demo.record)))
    sys.exit(code)


def make_or_exit(model: Path) -> Path:
    """The model's directory, unpacked if need be."""
    try:
        return model if model != DEFAULT else make(model)
    except ModelMissing as exc:
        sys.exit(f"error: {exc}")


def tell(demo: Demo, directory: Path) -> None:
    """The summary, the chart and its data."""
    chart = directory / "demo.png"
    draw(demo.record, chart)
    write_json(directory / "demo.json", demo.record.to_plain())
    print(f"\n{summary(demo.record)}\n\nchart: {chart}\ndata:  {directory / 'demo.json'}")


if __name__ == "__main__":
    main()
