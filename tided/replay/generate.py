"""Generated traces: kinds of traffic on two engines whose latencies and requests are drawn, not measured. The same seed, the same trace.

A domain's requests differ: each has its own alpha, normal around the domain's, and keeps its slot for a few seconds. Drafts that feed on
their own features lose accuracy from token to token, so a_k falls with depth. Steps take what the profile says, give or take a tenth.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tided.model.engines import LatencyProfile
from tided.model.errors import Refused
from tided.policies.speedup import steps_s
from tided.replay.trace import BIN_S, Header, Trace

# Memory bound at batch 1 and compute bound at 16, like a large model on a GPU at larger numbers: five tokens cost what one does
# at batch 1 and 2.5 times that at 16; a draft step is a tenth of a target step.
FAST = LatencyProfile(
    tokens=(1, 8, 16, 32, 48, 80),
    target_s=(0.020, 0.0205, 0.022, 0.030, 0.038, 0.056),
    batches=(1, 4, 16),
    draft_s=(0.0020, 0.0021, 0.0028),
)
# A small model on one core of a processor: a twentieth of the tokens, so every judgement rests on a twentieth of the evidence.
SLOW = LatencyProfile(
    tokens=(1, 2, 4, 8, 16, 24, 40),
    target_s=(0.050, 0.050, 0.052, 0.060, 0.090, 0.120, 0.190),
    batches=(1, 4, 8),
    draft_s=(0.005, 0.006, 0.010),
)
GAMMA_MAX = 4
DEPTH_LOSS = 0.96
"""a_k+1 over a_k."""
REQUEST_SPREAD = 0.08
"""Standard deviation of a request's alpha around its domain's."""
REQUEST_S = 5.0
"""Mean time that a request keeps its slot."""
STEP_SPREAD = 0.10

Wave = Callable[[NDArray[np.float64], np.random.Generator], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""(middles of the bins in seconds, random numbers) -> (alpha, batch size of at most 16) of each bin."""


def _stationary(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.full_like(t, 0.6), _wander(t, rng, 4.0, 2.0)


def _useless(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.full_like(t, 0.05), _wander(t, rng, 8.0, 4.0)


def _diurnal(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    day = np.sin(np.pi * t / t[-1]) ** 2
    return np.full_like(t, 0.6), 1 + 14 * day + _wander(t, rng, 0.0, 1.0)


def _bursty(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    batch, at = np.full_like(t, 1.5), 0.0
    while (at := at + rng.exponential(25.0)) < t[-1]:
        length = rng.uniform(4.0, 15.0)
        batch[(t >= at) & (t < at + length)] = rng.uniform(10.0, 16.0)
        at += length
    return np.full_like(t, 0.65), batch + _wander(t, rng, 0.0, 0.5)


def _drifting(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Acceptance decays as traffic moves, a new draft brings it back: three times."""
    part = (t / t[-1] * 3.0) % 1.0
    return 0.75 - 0.65 * part, _wander(t, rng, 4.0, 2.0)


def _recurring(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Domains A B A B, the draft knows A only."""
    return _jumps(t, rng, (0.70, 0.10), 40.0, 120.0), _wander(t, rng, 4.0, 2.0)


def _adversarial(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Acceptance jumps just when whoever watches it has made up their mind; at batch sizes where a wrong guess is dear."""
    return _jumps(t, rng, (0.62, 0.02), 2.0, 10.0), _wander(t, rng, 10.0, 4.0)


def _waves(t: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Many requests begin together, at first tokens that are easy; as was seen of sixteen requests for code on vLLM."""
    since = t % 10.0
    full = since < 8.0
    return np.where(since < 1.0, 0.92, 0.6), np.where(full, 16.0, _wander(t, rng, 4.0, 2.0))


def _jumps(
    t: NDArray[np.float64], rng: np.random.Generator, levels: tuple[float, float], least_s: float, most_s: float
) -> NDArray[np.float64]:
    """One level and the other in turn, each for `least_s` to `most_s` seconds."""
    alpha, at, turn = np.zeros_like(t), 0.0, 0
    while at < t[-1]:
        length = rng.uniform(least_s, most_s)
        alpha[(t >= at) & (t < at + length)] = levels[turn % 2]
        at, turn = at + length, turn + 1
    return alpha


def _wander(t: NDArray[np.float64], rng: np.random.Generator, middle: float, spread: float) -> NDArray[np.float64]:
    """Slow noise around `middle`: first order, a correlation time of 10 s."""
    keep = np.exp(-BIN_S / 10.0)
    noise, value = np.empty_like(t), rng.normal()
    for i in range(len(t)):
        value = keep * value + np.sqrt(1 - keep**2) * rng.normal()
        noise[i] = value
    return middle + spread * noise


_WAVES: dict[str, tuple[Wave, str]] = {
    "stationary": (_stationary, "one domain, alpha 0.6, batch about 4"),
    "useless": (_useless, "a draft that knows nothing of the traffic, alpha 0.05, batch about 8"),
    "diurnal": (_diurnal, "batch from 1 up to 15 and back, alpha 0.6"),
    "bursty": (_bursty, "batch 1 to 2 with bursts of 10 to 16, alpha 0.65"),
    "drifting": (_drifting, "alpha decays from 0.75 to 0.1 and a new draft brings it back, three times"),
    "recurring": (_recurring, "domains A B A B of 40 to 120 s, alpha 0.7 and 0.1"),
    "adversarial": (_adversarial, "alpha jumps between 0.62 and 0.02 every 2 to 10 s, batch about 10"),
    "waves": (_waves, "a full batch that begins together every ten seconds; alpha 0.92 in its first second, then 0.6"),
    "misprofiled": (_stationary, "as stationary, and the engine measured its profile under other load"),
}
_REGIMES = {"stationary": "stationary", "useless": "stationary", "adversarial": "adversarial"}
SLOWLY = "slow-"
KINDS = (*_WAVES, *(SLOWLY + kind for kind in _WAVES))
"""Each kind of traffic on the fast engine, and with "slow-" before its name on the slow one."""


def generate(name: str, seed: int = 0, duration_s: float = 600.0) -> Trace:
    """The trace of one of `KINDS`. Raises `Refused` for another name."""
    if name not in KINDS:
        raise Refused(f"no generated trace {name!r}; there are {', '.join(KINDS)}")
    kind, slow = name.removeprefix(SLOWLY), name.startswith(SLOWLY)
    profile, max_batch = (SLOW, 8) if slow else (FAST, 16)
    wave, about = _WAVES[kind]
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    middles = np.arange(BIN_S / 2, duration_s, BIN_S)
    alpha, batch = wave(middles, rng)
    batches = np.clip(np.rint(batch * max_batch / 16), 1, max_batch).astype(np.int32)
    quickest = np.asarray(steps_s(profile, max_batch, GAMMA_MAX)).min(axis=1)
    counts = np.ceil(BIN_S / quickest[batches - 1] * (1 + STEP_SPREAD)).astype(int)  # as many as anybody can run
    at_s = np.concatenate([i * BIN_S + BIN_S * np.arange(n) / n for i, n in enumerate(counts.tolist())])
    at_s = at_s[at_s < duration_s]
    step_batch = np.repeat(batches, counts)[: len(at_s)]
    residual = np.exp(rng.normal(0.0, STEP_SPREAD, len(at_s)) - STEP_SPREAD**2 / 2)
    header = Header(
        name=name,
        about=about,
        profile=profile,
        gamma_max=GAMMA_MAX,
        max_batch=max_batch,
        duration_s=duration_s,
        told=_under_load(profile) if kind == "misprofiled" else None,
        regime=_REGIMES.get(kind, "moving"),
    )
    prefix = _prefixes(rng, alpha[(at_s / BIN_S).astype(int)], np.diff(at_s, prepend=0.0), step_batch)
    return Trace(header, at_s, step_batch, residual.astype(np.float32), prefix)


def _under_load(profile: LatencyProfile) -> LatencyProfile:
    """What a profile looks like when something else ran while small steps were measured: verifying seems to cost next to nothing."""
    return replace(profile, target_s=tuple(max(seconds, 1.35 * profile.target_s[0]) for seconds in profile.target_s))


def _prefixes(
    rng: np.random.Generator, alpha: NDArray[np.float64], gaps_s: NDArray[np.float64], batch: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """Right tokens of each request of each step, from each step's alpha, time since the step before, and batch size."""
    slots = int(batch.max())
    changes = rng.random((len(batch), slots)) < (gaps_s / REQUEST_S)[:, None]
    request = changes.cumsum(axis=0)  # the how-manieth of its slot
    own = rng.normal(0.0, REQUEST_SPREAD, (int(request.max()) + 1, slots))[request, np.arange(slots)[None, :]]
    chance = np.clip(alpha[:, None] + own, 0.0, 0.99)[np.arange(slots)[None, :] < batch[:, None]]
    prefix, going = np.zeros(len(chance), np.uint8), np.ones(len(chance), bool)
    for depth in range(GAMMA_MAX):
        going &= rng.random(len(chance)) < chance * DEPTH_LOSS**depth
        prefix += going
    return prefix
