"""`python -m tided.training train|score|reference SPEC.json --out DIR`: one job, in one process or in those that torchrun starts.

stdout carries one JSON object a line: `Progress` records at least every 2 s, and at last {"result": JobResult}. What tided
itself can say went wrong is one line {"error": ..., "retryable": ...} and exit status 3. SIGTERM ends the process at once; with
`--with-parent` so does the end of stdin, which the worker holds open: a trainer must not outlive a worker that was killed.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

import torch

from tided.draft.target import read_json
from tided.model.codec import from_plain
from tided.model.errors import Refused, TideError, Unavailable
from tided.model.jobs import JobKind, JobResult, JobSpec
from tided.training.memory import keep_freed
from tided.training.progress import Reporter, write_line, write_result
from tided.training.ranks import Ranks, joined
from tided.training.reference import make_reference
from tided.training.trainer import score, train

EXIT_REFUSED = 3
EXIT_ORPHANED = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the job that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tided.training", description="Run one tided job.")
    parser.add_argument("kind", choices=[kind.value for kind in JobKind])
    parser.add_argument("spec", type=Path, help="JSON of a JobSpec")
    parser.add_argument("--out", type=Path, required=True, help="directory for what the job makes")
    parser.add_argument("--with-parent", action="store_true", help="exit when stdin ends")
    given = parser.parse_args(arguments)
    keep_freed()
    if given.with_parent:
        threading.Thread(target=_exit_with_stdin, name="parent-watch", daemon=True).start()
    try:
        spec = from_plain(JobSpec, {"kind": given.kind, "engine": "", "target": ""} | read_json(given.spec), "job")
        if spec.kind.value != given.kind:
            raise Refused(f"{given.spec}: a {spec.kind.value} job, not {given.kind}")
        with joined(str(spec.options.get("device", "cpu"))) as ranks, Reporter(quiet=not ranks.leads) as reporter:
            result = run(spec, given.out, reporter, ranks)
    except (torch.OutOfMemoryError, MemoryError) as exc:
        advice = "lower options.batch_tokens, options.pack_rows or options.packs"
        write_line({"error": f"out of memory ({exc}); {advice}", "retryable": False}, sys.stdout)
        return EXIT_REFUSED
    except TideError as exc:
        write_line({"error": str(exc), "retryable": isinstance(exc, Unavailable)}, sys.stdout)
        return EXIT_REFUSED
    if ranks.leads:
        write_result(result)
    return 0


def run(spec: JobSpec, out_dir: Path, reporter: Reporter, ranks: Ranks) -> JobResult:
    """Do the job; what it makes lies below `out_dir`. Several processes train; of other jobs all do the same."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise Unavailable(f"{out_dir}: cannot be made ({exc.strerror})") from exc
    if spec.kind is JobKind.TRAIN:
        return train(spec, out_dir, reporter.update, ranks)
    if spec.kind is JobKind.SCORE:
        return score(spec, reporter.update)
    return make_reference(spec, out_dir, reporter.update)


def _exit_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    sys.exit(main())
