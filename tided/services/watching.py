"""What the live watch is fed with: what an engine and its peers served before a swap, and what each finished since the last look.

The meters are the monitor's and only count up; who has read how far is kept here, in memory. A leader that takes over reads on from what
its own monitor has counted by then: what was finished in between is not counted for anybody.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tided.machine.watch import MIN_BASELINE_STEPS, MOST_PEERS, length_error
from tided.model.deployments import ServedSums, WatchPeer
from tided.services.monitor import EngineView, Meter


@dataclass(frozen=True, slots=True)
class Baseline:
    """Acceptance length of what served until now, and its standard error; zeros when too little was served to say."""

    length: float = 0.0
    error: float = 0.0


def baseline(view: EngineView) -> Baseline:
    """Of the version that an engine serves, by its newest requests."""
    recent = view.meter.recent
    if recent.steps < MIN_BASELINE_STEPS:
        return Baseline()
    return Baseline(recent.length, length_error(recent) if recent.requests >= 2.0 else 0.0)


def peers(view: EngineView, views: Iterable[EngineView]) -> tuple[WatchPeer, ...]:
    """Other engines of the target that can tell how its traffic moves, those with most requests first."""
    found: list[tuple[float, WatchPeer]] = []
    for other in views:
        before = baseline(other)
        if other.engine != view.engine and other.info.target.digest == view.info.target.digest and before.length:
            peer = WatchPeer(other.engine, other.meter.version, before.length, before.error)
            found.append((other.meter.recent.requests, peer))
    found.sort(key=lambda pair: (-pair[0], pair[1].engine))
    return tuple(peer for _, peer in found[:MOST_PEERS])


class Readings:
    """How far each watched engine's deployment has read the meters of which engines."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], tuple[Meter, ServedSums]] = {}

    def start(self, watched: str, view: EngineView) -> None:
        """Begin to read: what was counted until now is none of it."""
        self._read[watched, view.engine] = view.meter, view.meter.total

    def take(self, watched: str, view: EngineView, version: str) -> ServedSums:
        """What `view` finished with `version` since the last call, or since it serves that; nothing at the first."""
        known, (meter, total) = (watched, view.engine) in self._read, (view.meter, view.meter.total)
        before_meter, before = self._read.get((watched, view.engine), (meter, total))
        self._read[watched, view.engine] = meter, total
        if not known or meter.version != version:
            return ServedSums()
        return total.plus(_negative(before)) if meter is before_meter else total

    def end(self, watched: str) -> None:
        for key in [key for key in self._read if key[0] == watched]:
            del self._read[key]


def _negative(sums: ServedSums) -> ServedSums:
    steps2, accepted2, product = sums.squares
    return ServedSums(-sums.requests, -sums.steps, -sums.accepted, (-steps2, -accepted2, -product))
