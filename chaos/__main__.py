"""`python -m chaos`: ten minutes of faults over real processes under load, then an audit. Writes build/chaos/chaos.json."""

import argparse
import asyncio
import logging
import secrets
import signal
import sys
import time
from pathlib import Path

import structlog
import transformers
from rich.console import Console
from rich.table import Table

from bench.report import write_json
from chaos.audit import SHOWN
from chaos.run import Chaos, Outcome
from tided.model.errors import TideError

DIRECTORY = Path("build/chaos")


def main() -> None:
    """Exit codes: 0 when every invariant held, 1 when not, 2 when the stack did not start, 130 when it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults; start and audit take some more")
    parser.add_argument("--seed", type=int, help="which faults, and when: that of a run to be repeated; else a new one")
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # what Valkey's keeper says
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    console, started_s = Console(soft_wrap=True, highlight=False, markup=False), time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - started_s:6.1f}  {text}")

    chaos = Chaos(options.directory.absolute() / "run", seed, options.minutes * 60.0, say)
    code = 0
    try:
        asyncio.run(chaos.run())
    except* TideError as group:
        print(f"error: {group.exceptions[0]}", file=sys.stderr)
        code = 2
    except* KeyboardInterrupt:
        print("stopped")
        code = 130
    report = options.directory / "chaos.json"
    write_json(report, chaos.outcome.to_plain())
    show(chaos.outcome, console)
    print(f"\nreport: {report}; the same faults again: python -m chaos --seed {seed} --minutes {options.minutes:g}")
    sys.exit(code or int(not chaos.outcome.ok))


def show(outcome: Outcome, console: Console) -> None:
    """The findings as a table."""
    table = Table(title=f"chaos, seed {outcome.seed}: {len(outcome.faults)} faults", title_justify="left")
    for column in ("invariant", "promise", "holds", "measured"):
        table.add_column(column)
    for finding in outcome.findings:
        wrong = [
            *finding.wrong[:SHOWN],
            *([f"and {len(finding.wrong) - SHOWN} more"] if len(finding.wrong) > SHOWN else []),
        ]
        table.add_row(
            finding.invariant, finding.promises, "yes" if finding.ok else "NO", "\n".join([finding.measured, *wrong])
        )
    console.print(table)


if __name__ == "__main__":
    main()
