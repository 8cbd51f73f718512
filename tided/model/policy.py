"""What an operator set of the speculation policy."""

from dataclasses import dataclass
from enum import StrEnum


class SpeculationMode(StrEnum):
    AUTO = "auto"
    OFF = "off"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class PolicySetting:
    """What the operator set: auto, off, or a fixed number of drafted tokens."""

    mode: SpeculationMode = SpeculationMode.AUTO
    gamma: int = 0
