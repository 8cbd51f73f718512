"""What the demo showed, in plain words, and whether it showed what it promises."""

from demo.record import DRIFT, Record, accept_length, rates, ratio

FIRST_SWAP_S = 300.0


def promises(record: Record) -> list[tuple[str, bool]]:
    """Each thing that the demo must show, and whether it did."""
    first = record.adapted(1)
    gained = ratio(record.recent(1))
    return [
        ("a first trained draft, through its gate, within 5 minutes", first is not None and first.at_s <= FIRST_SWAP_S),
        ("faster than without speculation at the end of phase 1", gained is not None and gained > 1.0),
        ("drift was seen in phase 2", record.first(DRIFT, 2) is not None),
        ("a draft for the new traffic was swapped in phase 2", record.adapted(2) is not None),
        ("no request failed", record.errors == 0),
    ]


def summary(record: Record) -> str:
    """A few sentences and the promises."""
    lines: list[str] = []
    for index, (name, began_s) in enumerate(record.phases, 1):
        recent = record.recent(index)
        speeds, length = rates(recent), accept_length(recent)
        swap, drift = record.adapted(index), record.first(DRIFT, index)
        lines.append(f"Phase {index}, {name}:")
        if drift is not None and index > 1:
            lines.append(f"  drift was seen {drift.at_s - began_s:.0f} s after the traffic changed.")
        if swap is not None:
            lines.append(
                f"  a draft trained on this traffic was swapped in {swap.at_s - began_s:.0f} s after it began."
            )
        else:
            lines.append("  no new draft passed its gate in this time.")
        if speeds is not None:
            gain = speeds[0] / speeds[1]
            word = f"{gain:.2f} times as fast as" if gain >= 1 else f"at {gain:.0%} of the speed of"
            lines.append(
                f"  at its end one request got {speeds[0]:.1f} tokens/s: {word} the same engine without"
                f" speculation ({speeds[1]:.1f})."
            )
        if length is not None:
            lines.append(f"  a target step gave {length:.2f} tokens on average.")
    lines.append("")
    lines += [f"  [{'yes' if kept else 'NO '}] {promise}" for promise, kept in promises(record)]
    return "\n".join(lines)
