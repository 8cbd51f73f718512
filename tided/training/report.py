"""What a training gave, for people and programs: report.json and report.svg beside the draft."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from tided.model.codec import to_plain
from tided.model.drafts import Evaluation
from tided.model.errors import Unavailable
from tided.model.jobs import JobResult

JSON_FILE = "report.json"
PICTURE_FILE = "report.svg"

_WIDTH, _HEIGHT = 300, 180  # of a panel
_LEFT, _TOP, _GAP = 50, 50, 80
_POINTS = 150  # of the loss curve at most; each is the mean of equally many steps
_OLD, _NEW = "#9aa5b1", "#1769aa"


def write_report(directory: Path, result: JobResult, losses: Sequence[float]) -> None:
    """Write both files; `losses` has one a step. Raises `Unavailable` when the disk does not take them."""
    report = {"result": to_plain(result), "losses": [round(loss, 6) for loss in losses]}
    _write(directory / JSON_FILE, json.dumps(report) + "\n")
    _write(directory / PICTURE_FILE, picture(result, losses))


def picture(result: JobResult, losses: Sequence[float]) -> str:
    """The loss by step, and acceptance of each drafted token of the old and of the new draft, as an SVG."""
    second = _LEFT + _WIDTH + _GAP
    parts = [*_curve(losses, _LEFT), *_bars(result, second)]
    size = f'width="{second + _WIDTH + 30}" height="{_TOP + _HEIGHT + 50}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *parts, "</svg>", ""])


def _curve(losses: Sequence[float], left: float) -> list[str]:
    stride = max(1, math.ceil(len(losses) / _POINTS))
    means = [sum(part) / len(part) for i in range(0, len(losses), stride) if (part := losses[i : i + stride])]
    top = max(means, default=0.0) or 1.0
    points = " ".join(
        f"{left + _WIDTH * (i + 0.5) / len(means):.1f},{_TOP + _HEIGHT * (1 - mean / top):.1f}"
        for i, mean in enumerate(means)
    )
    return [
        _text(left, _TOP - 20, f"loss a token, {len(losses)} steps"),
        *_axes(left, f"{top:.2f}"),
        f'<polyline points="{points}" fill="none" stroke="{_NEW}" stroke-width="1.5"/>',
    ]


def _bars(result: JobResult, left: float) -> list[str]:
    drafts = [("old", result.incumbent, _OLD), ("new", result.candidate, _NEW)]
    known = [(name, found, colour) for name, found, colour in drafts if isinstance(found, Evaluation) and found.groups]
    parts = [_text(left, _TOP - 34, "acceptance of drafted token 1, 2, ... (held out)"), *_axes(left, "1")]
    for n, (name, evaluation, colour) in enumerate(known):
        step = _WIDTH / max(1, len(evaluation.conditional))
        wide = step * 0.8 / len(known)
        for k, share in enumerate(evaluation.conditional):
            at, high = left + step * k + step * 0.1 + wide * n, _HEIGHT * share
            box = f'x="{at:.1f}" y="{_TOP + _HEIGHT - high:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            parts.append(f'<rect {box} fill="{colour}"/>')
        parts.append(_text(left + 150 * n, _TOP - 14, f"{name}: length {evaluation.length:.2f}", colour))
    return parts


def _axes(left: float, top: str) -> list[str]:
    bottom = _TOP + _HEIGHT
    return [
        f'<path d="M{left},{_TOP} V{bottom} H{left + _WIDTH}" fill="none" stroke="#222"/>',
        _text(left - 8, _TOP + 4, top, anchor="end"),
        _text(left - 8, bottom + 4, "0", anchor="end"),
    ]


def _text(x: float, y: float, text: str, colour: str = "#222", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as exc:
        raise Unavailable(f"{path}: cannot be written ({exc.strerror}); free space or check the permissions") from exc
