"""The demo's chart: speed with and without speculation, acceptance length, and what tided did when."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from demo.record import DRIFT, SWAPPED, TRAINING, Record

MARKS = {
    SWAPPED: ("new draft", "tab:green"),
    DRIFT: ("drift", "tab:red"),
    TRAINING: ("training", "tab:gray"),
}


def draw(record: Record, path: Path) -> None:
    """Writes a PNG."""
    mpl.use("agg")
    figure = Figure(figsize=(10, 6), layout="constrained")
    speed, length = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    at_s = [turn.at_s for turn in record.turns]
    speed.plot(at_s, [turn.with_tokens_per_s for turn in record.turns], ".", color="tab:blue", alpha=0.35)
    speed.plot(at_s, [turn.without_tokens_per_s for turn in record.turns], ".", color="tab:orange", alpha=0.35)
    speed.plot(at_s, _smooth([t.with_tokens_per_s for t in record.turns]), color="tab:blue", label="as tided drafts")
    speed.plot(
        at_s, _smooth([t.without_tokens_per_s for t in record.turns]), color="tab:orange", label="no speculation"
    )
    speed.set_ylabel("tokens/s of one request")
    speed.set_ylim(bottom=0)
    speed.legend(loc="lower center", ncols=2)
    drafted = [(turn.at_s, turn.accept_length) for turn in record.turns if turn.accept_length is not None]
    length.plot(
        [at for at, _ in drafted], [value for _, value in drafted], ".-", color="tab:blue", label="acceptance length"
    )
    gammas = [(item["at_s"], item["gammas"][0]) for item in record.timeline if item["gammas"]]
    length.step(
        [at for at, _ in gammas],
        [g for _, g in gammas],
        where="post",
        color="tab:purple",
        label="drafted tokens a step",
    )
    length.set_ylabel("tokens a step")
    length.set_xlabel("seconds of traffic")
    length.set_ylim(bottom=0)
    length.legend(loc="upper left")
    for number, (name, began_s) in enumerate(record.phases, 1):
        for axes in (speed, length):
            axes.axvline(began_s, color="black", linewidth=1)
        speed.text(began_s, 1.02, f" phase {number}: {name}", transform=speed.get_xaxis_transform())
    for seen in record.happenings:
        if seen.kind in MARKS:
            label, color = MARKS[seen.kind]
            for axes in (speed, length):
                axes.axvline(seen.at_s, color=color, linestyle="--", linewidth=1)
            speed.text(seen.at_s, 0.02, f" {label}", color=color, rotation=90, transform=speed.get_xaxis_transform())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _smooth(values: list[float]) -> list[float]:
    """Running medians of five."""
    return [sorted(near)[len(near) // 2] for i in range(len(values)) if (near := values[max(0, i - 2) : i + 3])]
