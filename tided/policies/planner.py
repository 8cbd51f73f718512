"""Which devices serve and which train: is the speculation that training buys worth the devices that it takes?

With inference rates r_i and training rates t_i, and a speedup s of devices that serve with an adapted draft, devices S serve and the
others train. Against all devices serving without adaptation

    gain(S) = s sum_S r_i / sum_all r_i

so for a choice of S the break-even speedup is sum_all r_i / sum_S r_i (TIDE: 8 H100 and 4 MI250, s = 1.15 and 1.30: 1.07 and 1.21).
The training that the traffic needs bounds S from the other side: sum of the trainers' t_i >= `training_needed`. The paper's rates are
multiples of its MI250's; any unit will do, and inference and training have one each.

Before the first adapted draft, for w = collect_s + work / sum of the trainers' t_i seconds, the devices that serve do so as they are.
Over a horizon of H seconds s is therefore 1 + (s - 1)(1 - w / H), and with b the break-even speedup for ever, what the trainers cost
until then is earned back after w (s - 1) / (s - b) seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tided.model.errors import Refused

OUTLOOK_S = (3600.0, 86_400.0, 604_800.0)
"""An hour, a day and a week: over these every plan says what it expects."""


@dataclass(frozen=True, slots=True)
class Device:
    """`count` devices of one kind. Rates in any unit: tokens a second, or multiples of some device's."""

    kind: str
    count: int
    inference: float
    training: float


PAPER: dict[str, Device] = {
    "H100": Device("H100", 0, 6.76, 2.44),
    "MI300X": Device("MI300X", 0, 4.42, 1.77),
    "MI250": Device("MI250", 0, 1.0, 1.0),
}
"""The paper's rates (arXiv 2602.05145), MI250 = 1."""


@dataclass(frozen=True, slots=True)
class Speedup:
    """What an adapted draft gives over what the devices would serve with otherwise: the middle, and how low and how high it may be."""

    low: float
    middle: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.middle <= self.high:
            raise Refused(
                f"speedup: expected low <= middle <= high, all above 0, got {self.low}, {self.middle}, {self.high}"
            )


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What it takes until the first adapted draft serves: `collect_s` seconds of collecting samples, then `work` of training, in the unit
    of `training` times seconds (tokens, where that is tokens a second)."""

    collect_s: float = 0.0
    work: float = 0.0

    def __post_init__(self) -> None:
        if self.collect_s < 0 or self.work < 0:
            raise Refused(f"warm-up: expected nothing below 0, got {self.collect_s:g} s and {self.work:g}")

    def seconds(self, training_rate: float) -> float:
        """In all, where the devices that train do so at this rate together."""
        return self.collect_s + self.work / training_rate


AT_ONCE = WarmUp()
"""There is an adapted draft already."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of a kind's devices, how many serve and how many train."""

    kind: str
    serving: int
    training: int


@dataclass(frozen=True, slots=True)
class Split:
    """One way to divide the devices.

    `gain`: throughput over the horizon, over all devices serving as they are, at the low, middle and high speedup. `break_even`: the
    speedup at which it is 1.0; None where the horizon ends before the first adapted draft. `serving`: the share of the serving rate that is
    left. `pays_after_s`: when all that the warm-up cost is earned back at the middle speedup; None: never.
    """

    shares: tuple[Share, ...]
    gain: tuple[float, float, float]
    break_even: float | None
    training_rate: float
    serving: float
    warm_up_s: float
    pays_after_s: float | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The gain at the middle speedup over so many seconds from the start."""

    horizon_s: float
    gain: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`best` is the division with the largest gain at the middle speedup; `worth_it` whether it beats serving with everything, even at the
    low one. `reason` says so in words. `outlook`: what `best` gives over an hour, a day and a week."""

    best: Split
    worth_it: bool
    reason: str
    outlook: tuple[Outlook, ...]


def plan(
    devices: Sequence[Device],
    speedup: Speedup,
    training_needed: float = 0.0,
    *,
    warm_up: WarmUp = AT_ONCE,
    horizon_s: float | None = None,
) -> Plan:
    """The best division over `horizon_s` seconds from the start (None: for ever).

    `training_needed`: the least rate of training that keeps up with the traffic, in the unit of `training`.

    Raises `Refused` for rates that are none, for no device, or where even all but one device could not train so fast.
    """
    for device in devices:
        if device.count < 1 or device.inference <= 0 or device.training < 0:
            raise Refused(f"{device.kind}: expected at least one device and positive rates")
    if sum(device.count for device in devices) < 2:
        raise Refused("one device cannot serve and train at once: a plan needs at least two")
    if horizon_s is not None and horizon_s <= 0:
        raise Refused(f"the horizon must be above 0 s, got {horizon_s:g}")
    total = sum(device.count * device.inference for device in devices)
    splits: list[Split] = []
    for training in product(*(range(device.count + 1) for device in devices)):
        pairs = list(zip(devices, training, strict=True))
        rate = sum(device.training * count for device, count in pairs)
        left = sum(device.inference * (device.count - count) for device, count in pairs)
        if left > 0 and rate > 0 and rate >= training_needed:
            shares = tuple(Share(device.kind, device.count - count, count) for device, count in pairs)
            splits.append(_split(shares, left / total, rate, speedup, warm_up.seconds(rate), horizon_s))
    if not splits:
        raise Refused(f"no division of these devices trains at {training_needed:g} and still serves")
    best = max(splits, key=lambda split: (split.gain[1], split.training_rate))
    outlook = tuple(
        Outlook(seconds, _over(seconds, speedup.middle, best.warm_up_s) * best.serving) for seconds in OUTLOOK_S
    )
    return Plan(best, best.gain[0] > 1.0, _reason(best, speedup), outlook)


def _split(
    shares: tuple[Share, ...],
    serving: float,
    training_rate: float,
    speedup: Speedup,
    warm_up_s: float,
    horizon_s: float | None,
) -> Split:
    low, middle, high = (_over(horizon_s, s, warm_up_s) * serving for s in (speedup.low, speedup.middle, speedup.high))
    adapted = _adapted(horizon_s, warm_up_s)
    pays = speedup.middle * serving > 1.0
    return Split(
        shares=shares,
        gain=(low, middle, high),
        break_even=1.0 + (1.0 / serving - 1.0) / adapted if adapted > 0 else None,
        training_rate=training_rate,
        serving=serving,
        warm_up_s=warm_up_s,
        pays_after_s=warm_up_s * (speedup.middle - 1.0) / (speedup.middle - 1.0 / serving) if pays else None,
    )


def _adapted(horizon_s: float | None, warm_up_s: float) -> float:
    """The share of the horizon in which an adapted draft serves."""
    return 1.0 if horizon_s is None else max(0.0, 1.0 - warm_up_s / horizon_s)


def _over(horizon_s: float | None, speedup: float, warm_up_s: float) -> float:
    """The speedup over the whole horizon: 1.0 until the first adapted draft, `speedup` from then on."""
    return 1.0 + (speedup - 1.0) * _adapted(horizon_s, warm_up_s)


def _reason(best: Split, speedup: Speedup) -> str:
    low, middle, high = best.gain
    needed = (
        "no adapted draft would serve in that time"
        if best.break_even is None
        else f"break-even speedup {best.break_even:.2f}"
    )
    taken = f"the devices that train cost {1.0 - best.serving:.0%} of the serving rate: {needed}"
    if middle <= 1.0:
        later = "" if best.pays_after_s is None else f"; it would pay after {best.pays_after_s:,.0f} s"
        return f"do not train: {taken}, and {speedup.middle:.2f} is expected{later}"
    if low <= 1.0:
        return f"do not train yet: {middle:.2f}x is expected, but {low:.2f}x to {high:.2f}x is possible; {taken}. Measure the speedup first"
    return f"train: {middle:.2f}x is expected, {low:.2f}x at least; {taken}"
