"""`tidectl doctor` on paper: every check with its outcome, what was measured, and what to do."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tided.model.verification import CheckOutcome, Finding

_MARKS = {
    CheckOutcome.OK: ("ok", "green"),
    CheckOutcome.FAILED: ("FAILED", "bold red"),
    CheckOutcome.SKIPPED: ("-", "dim"),
}


def show(findings: Sequence[Finding]) -> None:
    """One paragraph a subject, and a last line that counts."""
    console = Console(highlight=False)
    for finding in findings:
        console.print(Text(finding.subject, style="bold"))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=8)
        grid.add_column(width=17)
        grid.add_column(overflow="fold")
        for check in finding.checks:
            mark, style = _MARKS[check.outcome]
            grid.add_row(Text(f"  {mark}", style=style), check.name, Text(check.measured))
            if check.advice:
                grid.add_row("", "", Text(f"-> {check.advice}"))
        console.print(grid)
    console.print(Text(_summary(findings)))


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return not _count(findings, CheckOutcome.FAILED)


def _summary(findings: Sequence[Finding]) -> str:
    counts = {outcome: _count(findings, outcome) for outcome in CheckOutcome}
    return (
        f"{counts[CheckOutcome.OK]} ok, {counts[CheckOutcome.FAILED]} failed,"
        f" {counts[CheckOutcome.SKIPPED]} could not be made or do not apply"
    )


def _count(findings: Sequence[Finding], outcome: CheckOutcome) -> int:
    return sum(check.outcome is outcome for finding in findings for check in finding.checks)
