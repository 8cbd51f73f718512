"""Whether a version that was just swapped in accepts less than the one before it would: the figures of the live watch.

Two comparisons at once. On the same engine: requests since the swap against the incumbent's of before. At the same time: what engines
that served one version all the while accepted before and since shows how traffic has moved; where theirs fell, the incumbent's would have
fallen here, too. Where theirs rose it proves nothing: it may be their traffic alone.

An acceptance length is a ratio of sums over requests. Requests differ, so it is known up to a standard error (of a ratio estimator:
the spread of a_i - r s_i over requests, with a_i tokens accepted in s_i steps), and so is what it is compared with. Bounds are one-sided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import hypot, inf, sqrt

from tided.model.deployments import ServedSums, WatchPeer

SURE = 1.645
"""Standard errors: one-sided 95%, as the gate's. That a draft is looked at often is what `rollback_margin` leaves room for."""
MIN_BASELINE_STEPS = 50
"""Fewer drafting request-steps than this are no baseline."""
MIN_PEER_REQUESTS = 10
"""Fewer than this, of all other engines together, do not say how traffic has moved."""
MOST_PEERS = 8


class Verdict(StrEnum):
    FINE = "fine"  # surely not worse than the margin allows, or nothing to be worse than
    WORSE = "worse"  # surely
    UNSURE = "unsure"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`length` of the watched version against `expected`, that of the incumbent on the traffic of now; `floor`: `expected` less the margin.
    `error`: standard error of their difference. `moved`: acceptance of the other engines since, as a share of what it was before."""

    verdict: Verdict
    length: float
    expected: float = 0.0
    floor: float = 0.0
    error: float = 0.0
    moved: float = 1.0

    @property
    def below(self) -> bool:
        """Whether it is worse as far as anybody can say."""
        return 0.0 < self.length < self.floor


def length_error(sums: ServedSums) -> float:
    """Standard error of an acceptance length, from how requests differ; infinite below two of them."""
    if sums.requests < 2.0 or sums.steps <= 0.0:
        return inf
    ratio, (steps2, accepted2, product) = sums.accepted / sums.steps, sums.squares
    spread = max(accepted2 - 2.0 * ratio * product + ratio * ratio * steps2, 0.0)
    return sqrt(spread * sums.requests / (sums.requests - 1.0)) / sums.steps


def traffic_moved(peers: Sequence[WatchPeer]) -> tuple[float, float]:
    """By which factor the acceptance length of engines whose version stayed has changed since a watch began, and its standard error.

    Each counts by its steps since, on both sides, so that a change of their shares is none of their acceptance. (1.0, 0.0) if too little
    was served to say.
    """
    heard = [peer for peer in peers if peer.served.requests >= 2.0 and peer.served.steps > 0.0 and peer.length > 0.0]
    steps = sum(peer.served.steps for peer in heard)
    if sum(peer.served.requests for peer in heard) < MIN_PEER_REQUESTS:
        return 1.0, 0.0
    shares = [peer.served.steps / steps for peer in heard]
    now = sum(share * peer.served.length for share, peer in zip(shares, heard, strict=True))
    before = sum(share * peer.length for share, peer in zip(shares, heard, strict=True))
    now_error = hypot(*(share * length_error(peer.served) for share, peer in zip(shares, heard, strict=True)))
    before_error = hypot(*(share * peer.error for share, peer in zip(shares, heard, strict=True)))
    factor = now / before
    return factor, factor * hypot(now_error / now, before_error / before)


def judge(
    watched: ServedSums,
    baseline_length: float,
    baseline_error: float,
    peers: Sequence[WatchPeer],
    margin: float,
) -> Judgement:
    """Hold what a version has served against what the incumbent would. `baseline_length` 0.0: there is nothing to compare with."""
    factor, factor_error = traffic_moved(peers)
    if baseline_length <= 0.0:
        return Judgement(Verdict.FINE, watched.length, moved=factor)
    fell = factor < 1.0
    # No step emits less than its bonus token.
    expected = max(baseline_length * factor, 1.0) if fell else baseline_length
    expected_error = hypot(baseline_error * factor, baseline_length * factor_error) if fell else baseline_error
    floor, kept = expected * (1.0 - margin), 1.0 - margin
    error = hypot(length_error(watched), kept * expected_error)
    verdict = Verdict.UNSURE
    if watched.length - floor >= SURE * error:
        verdict = Verdict.FINE
    elif floor - watched.length > SURE * error:
        verdict = Verdict.WORSE
    return Judgement(verdict, watched.length, expected, floor, error, factor)
