"""The self-test of an engine: what was checked, and what was found."""

from dataclasses import dataclass
from enum import StrEnum


class CheckOutcome(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"  # it could not be made; `measured` says why


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, in words and figures, and what to do about it."""

    name: str
    outcome: CheckOutcome
    measured: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The checks about one part of an installation: `subject` is "redis", "tided", "workers" or "engine NAME"."""

    subject: str
    checks: tuple[Check, ...]


class VerificationState(StrEnum):
    PENDING = "pending"
    VERIFIED = "verified"  # what it taps is what the reference says
    UNVERIFIED = "unverified"  # nothing was found wrong, and not everything could be tested
    MISMATCH = "mismatch"  # it taps something else: no capture, no swap


class VerificationPhase(StrEnum):
    REFERENCE = "reference"  # waits for the target's reference states
    PROBING = "probing"  # probe requests are under way
    LISTENING = "listening"  # cannot be probed: its first real samples will be looked at
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Verification:
    """The self-test of one incarnation of an engine on one target. `attempt` counts rounds of probes."""

    engine: str
    incarnation: str
    target: str
    state: VerificationState
    phase: VerificationPhase
    reason: str
    started_ms: int
    updated_ms: int
    deadline_ms: int = 0  # of the phase; when DONE and not verified: when to try again, 0 for never
    attempt: int = 0
    referenced: bool = False  # whether reference states were at hand
    draft: str = ""  # the version that served when it was probed
    accepted: bool = False  # whether enough was accepted to tell that this version serves
    doubted: bool = False  # what it taps is in question again, though it has passed
    checks: tuple[Check, ...] = ()
