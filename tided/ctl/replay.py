"""`tidectl replay`: any policy over a trace, in virtual time, computed here and not by tided (docs/adr/0013)."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tided.config import SpeculationConfig
from tided.replay.compare import POLICIES, Comparison, compare
from tided.replay.generate import KINDS, generate
from tided.replay.trace import load

BESIDE = ("always-off", "always-on", "fixed", "static", "ema-steps", "clairvoyant")
"""What the policies are shown beside."""
_BARS = "▁▂▃▄▅▆▇█"
_CHART_WIDTH = 60


def replay(trace: str, policies: Sequence[str], config: SpeculationConfig, seed: int, duration_s: float) -> Comparison:
    """Run `policies` over a generated trace of that name, or over the file. Raises `Refused` for what is neither."""
    found = generate(trace, seed, duration_s) if trace in KINDS else load(Path(trace))
    return compare(found, [*BESIDE[:-1], *(policies or POLICIES), BESIDE[-1]], config, _CHART_WIDTH)


def show(found: Comparison) -> None:
    """A table, and over time how much faster each driver was than no speculation."""
    console = Console(highlight=False)
    console.print(Text(f"{found.trace}: {found.about}", style="bold"))
    console.print(Text(f"{found.duration_s:.0f} s, {found.served_s:.0f} s of them with requests"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("DRIVER")
    for header in ("TOK/S", "OVER NONE", "REGRET", "WORST 30 S", "SWITCHES", "DRAFTED"):
        table.add_column(header, justify="right")
    for result in found.results:
        table.add_row(
            result.driver,
            f"{result.tokens_per_s:.1f}",
            f"{result.over_none:.3f}x",
            f"{result.regret:.1%}",
            f"{result.worst_window:.3f}x",
            f"{result.switches:,}",
            f"{result.drafted_share:.0%}",
        )
    console.print(table)
    none = found.of("always-off").timeline
    ratios = {
        result.driver: [ours / theirs if theirs else 0.0 for ours, theirs in zip(result.timeline, none, strict=True)]
        for result in found.results
    }
    highest = max(max(ratio) for ratio in ratios.values())
    console.print(Text(f"\nover no speculation, over time; the highest bar is {highest:.2f}x", style="bold"))
    for driver, ratio in ratios.items():
        console.print(Text(f"{driver:<13} {bars(ratio, highest)}"))


def bars(values: Sequence[float], highest: float) -> str:
    """One character for each value; blank for nothing."""
    if highest <= 0:
        return " " * len(values)
    return "".join(
        " " if value <= 0 else _BARS[min(int(value / highest * len(_BARS)), len(_BARS) - 1)] for value in values
    )
