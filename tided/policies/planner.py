"""Which devices serve and which train: is the speculation that training buys worth the devices that it takes?

With inference rates r_i and training rates t_i, and a speedup s of devices that serve with an adapted draft, devices S serve and the
others train. Against all devices serving without adaptation

    gain(S) = s sum_S r_i / sum_all r_i

so for a choice of S the break-even speedup is sum_all r_i / sum_S r_i (tide.md: 8 H100 and 4 MI250, s = 1.15 and 1.30: 1.07 and 1.21).
The training that the traffic needs bounds S from the other side: sum of the trainers' t_i >= `training_needed`. The paper's rates are
multiples of its MI250's; any unit will do, and inference and training have one each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tided.model.errors import Refused


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
class Share:
    """Of a kind's devices, how many serve and how many train."""

    kind: str
    serving: int
    training: int


@dataclass(frozen=True, slots=True)
class Split:
    """One way to divide the devices. `gain`: throughput over all devices serving as they are, at the low, middle and high speedup."""

    shares: tuple[Share, ...]
    gain: tuple[float, float, float]
    break_even: float
    training_rate: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`best` is the division with the largest gain at the middle speedup; `worth_it` whether it beats serving with everything, even at the
    low one. `reason` says so in words."""

    best: Split
    worth_it: bool
    reason: str


def plan(devices: Sequence[Device], speedup: Speedup, training_needed: float = 0.0) -> Plan:
    """The best division. `training_needed`: the least rate of training that keeps up with the traffic, in the unit of `training`.

    Raises `Refused` for rates that are none, for no device, or where even all but one device could not train so fast.
    """
    for device in devices:
        if device.count < 1 or device.inference <= 0 or device.training < 0:
            raise Refused(f"{device.kind}: expected at least one device and positive rates")
    total = sum(device.count * device.inference for device in devices)
    if sum(device.count for device in devices) < 2:
        raise Refused("one device cannot serve and train at once: a plan needs at least two")
    splits: list[Split] = []
    for training in product(*(range(device.count + 1) for device in devices)):
        pairs = list(zip(devices, training, strict=True))
        rate = sum(device.training * count for device, count in pairs)
        left = sum(device.inference * (device.count - count) for device, count in pairs)
        if left > 0 and rate > 0 and rate >= training_needed:
            shares = tuple(Share(device.kind, device.count - count, count) for device, count in pairs)
            gain = (speedup.low * left / total, speedup.middle * left / total, speedup.high * left / total)
            splits.append(Split(shares, gain, total / left, rate))
    if not splits:
        raise Refused(f"no division of these devices trains at {training_needed:g} and still serves")
    best = max(splits, key=lambda split: (split.gain[1], split.training_rate))
    return Plan(best, best.gain[0] > 1.0, _reason(best, speedup))


def _reason(best: Split, speedup: Speedup) -> str:
    low, middle, high = best.gain
    taken = f"the devices that train cost {1.0 - 1.0 / best.break_even:.0%} of the serving rate: break-even speedup {best.break_even:.2f}"
    if middle <= 1.0:
        return f"do not train: {taken}, and {speedup.middle:.2f} is expected"
    if low <= 1.0:
        return f"do not train yet: {middle:.2f}x is expected, but {low:.2f}x to {high:.2f}x is possible; {taken}. Measure the speedup first"
    return f"train: {middle:.2f}x is expected, {low:.2f}x at least; {taken}"
