"""`tidectl plan`: which devices serve and which train, computed here and not by tided (docs/adr/0013)."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tided.model.errors import Refused
from tided.policies.planner import PAPER, Device, Plan, Speedup, WarmUp, plan

FORM = "KIND=COUNT, or KIND=COUNT:INFERENCE:TRAINING with rates of your own"


def parsed(text: str) -> Device:
    """A device as people write it. Raises `Refused`."""
    kind, equals, rest = text.partition("=")
    count, *rates = rest.split(":")
    known = next((device for name, device in PAPER.items() if name.lower() == kind.lower()), None)
    if not equals or not kind or not count.isdecimal() or len(rates) not in (0, 2):
        raise Refused(f"{text!r}: expected {FORM}")
    if rates:
        try:
            return Device(kind, int(count), float(rates[0]), float(rates[1]))
        except ValueError as exc:
            raise Refused(f"{text!r}: expected {FORM}") from exc
    if known is None:
        raise Refused(
            f"{kind}: no published rates (there are {', '.join(PAPER)}); give them: {kind}={count}:INFERENCE:TRAINING"
        )
    return replace(known, count=int(count))


def made(
    devices: Sequence[str],
    speedup: float,
    spread: float,
    training_needed: float,
    collect_s: float,
    work: float,
    horizon_s: float | None,
) -> Plan:
    """The plan for `devices`; the speedup may be `spread` lower or higher."""
    return plan(
        [parsed(text) for text in devices],
        Speedup(speedup - spread, speedup, speedup + spread),
        training_needed,
        warm_up=WarmUp(collect_s, work),
        horizon_s=horizon_s,
    )


def show(found: Plan) -> None:
    """The division, the gain and what to do."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("KIND")
    for header in ("SERVE", "TRAIN"):
        table.add_column(header, justify="right")
    for share in found.best.shares:
        table.add_row(share.kind, str(share.serving), str(share.training))
    console.print(table)
    low, middle, high = found.best.gain
    console.print(Text(f"throughput over all devices serving: {middle:.2f}x ({low:.2f}x to {high:.2f}x)"))
    if found.best.warm_up_s:
        hour, day, week = (outlook.gain for outlook in found.outlook)
        pays = found.best.pays_after_s
        earned = "its cost is never earned back" if pays is None else f"what it cost is earned back after {pays:,.0f} s"
        console.print(Text(f"first adapted draft after {found.best.warm_up_s:,.0f} s; {earned}"))
        console.print(Text(f"expected over an hour {hour:.2f}x, a day {day:.2f}x, a week {week:.2f}x"))
    console.print(Text(found.reason, style="bold"))
