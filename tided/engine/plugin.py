"""What the plugins inside other engines share: their settings, which come from the environment, and the guard of their hooks.

An engine serves first: whatever fails in a hook is counted and logged once for each place, and never reaches the engine.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tided.model.errors import Refused
from tided.model.ids import check_name

log = logging.getLogger(__name__)

NO_CAPTURE_HEADER = "x-tide-no-capture"
"""A request with this header at "1" is never tapped."""
DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
_GREEDY_BELOW = 1e-5  # vLLM's and SGLang's own bounds are at or below it
_ALL_TOKENS = 1 << 30  # SGLang's top_k for no bound; vLLM's is 0 or -1
_SHAPING = (
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "structured_outputs",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
)
"""Fields of vLLM's and SGLang's sampling parameters that change the target's distribution when they are set."""


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """Environment variables. Without TIDED_ENGINE, the engine's name, a plugin does nothing.

    TIDED_REDIS_URL; TIDED_RING_SLOTS: chunks of about 1 MB that may wait in memory; TIDED_LAST_HIDDEN: 1: samples carry the
    last hidden state where the engine has it; TIDED_GAMMAS: drafted tokens at batch size 1, 2, ... until tided says otherwise;
    TIDED_PROFILE: 0: the latency profile is not measured at start; TIDED_REPORT_INTERVAL_S: how often counters are reported.
    """

    engine: str
    redis_url: str
    ring_slots: int
    last_hidden: bool
    gammas: tuple[int, ...] = (0,)
    profile: bool = True
    report_interval_s: float = 0.5

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "PluginSettings | None":
        """The settings, or None when TIDED_ENGINE is not set. Raises `Refused` for values that cannot be meant."""
        given = os.environ if environment is None else environment
        engine = given.get("TIDED_ENGINE", "")
        if not engine:
            return None
        slots = given.get("TIDED_RING_SLOTS", "16")
        if not slots.isdecimal() or not 1 <= int(slots) <= 4096:
            raise Refused(f"TIDED_RING_SLOTS must be a whole number in 1..4096, got {slots!r}")
        return cls(
            engine=check_name(engine, "TIDED_ENGINE"),
            redis_url=given.get("TIDED_REDIS_URL", DEFAULT_REDIS_URL),
            ring_slots=int(slots),
            last_hidden=switch(given, "TIDED_LAST_HIDDEN", default="0"),
            gammas=_gammas(given.get("TIDED_GAMMAS", "0")),
            profile=switch(given, "TIDED_PROFILE", default="1"),
            report_interval_s=_seconds(given, "TIDED_REPORT_INTERVAL_S", "0.5"),
        )


class Faults:
    """Counts what failed in hooks, by place, and logs the first of each: the type of the error only, for it may quote a prompt."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, where: str, exc: BaseException) -> None:
        self.counts[where] += 1
        if self.counts[where] == 1:
            log.error("tided: %s failed (%s); counted, serving goes on without it", where, type(exc).__name__)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def plain_temperature(params: Any) -> float | None:
    """What to report as a request's temperature, from vLLM's or SGLang's sampling parameters.

    0.0 for greedy; None when more than a temperature makes the distribution that is sampled from.
    """
    if any(getattr(params, name, None) for name in _SHAPING) or getattr(params, "repetition_penalty", 1.0) != 1.0:
        return None
    if params.temperature < _GREEDY_BELOW or params.top_k == 1:
        return 0.0
    narrowed = params.top_p < 1.0 or 0 < params.top_k < _ALL_TOKENS or params.min_p > 0.0
    return None if narrowed else float(params.temperature)


@cache
def build_of(name: str, *distributions: str) -> str:
    """An engine's name and version, from whichever of its distributions is installed; "" if none is."""
    for distribution in (name, *distributions):
        with suppress(PackageNotFoundError):
            return f"{name} {version(distribution)}"
    return ""


def switch(given: Mapping[str, str], name: str, *, default: str) -> bool:
    """A variable that is 0 or 1. Raises `Refused` for anything else."""
    text = given.get(name, default)
    if text not in ("0", "1"):
        raise Refused(f"{name} must be 0 or 1, got {text!r}")
    return text == "1"


def _gammas(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise Refused(f"TIDED_GAMMAS must be whole numbers separated by commas, got {text!r}")
    return tuple(int(part) for part in parts)


def _seconds(given: Mapping[str, str], name: str, default: str) -> float:
    text = given.get(name, default)
    try:
        value = float(text)
    except ValueError as exc:
        raise Refused(f"{name} must be a number of seconds, got {text!r}") from exc
    if not 0.01 <= value <= 60:
        raise Refused(f"{name} must be within 0.01..60 seconds, got {text!r}")
    return value
