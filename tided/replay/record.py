"""A trace from an engine's own reports, taken while it drafted gamma_max tokens in every step (`tidectl policy set gamma=N`).

A report sums the steps of half a second by batch size, so their order within it is lost and drawn here, and each step takes their
mean time. To a policy that makes no difference: it sees no more itself. Steps with fewer drafted tokens are left out: they do not
say what the others would have accepted.
"""

from collections.abc import Sequence

import numpy as np

from tided.model.engines import EngineInfo, Observation
from tided.model.errors import Refused
from tided.policies.speedup import smoothed, step_s
from tided.replay.trace import Header, Trace


def recorded(name: str, about: str, info: EngineInfo, reports: Sequence[Observation]) -> Trace:
    """The trace of `reports`, oldest first. Raises `Refused` when the engine has no profile, or none of them drafted gamma_max tokens."""
    if info.profile is None:
        raise Refused(f"engine {info.engine} has no latency profile")
    rng, profile, gamma = np.random.default_rng(0), smoothed(info.profile), info.gamma_max
    at_s, batches, residuals, prefixes = list[float](), list[int](), list[float](), list[int]()
    began_ms, ended_s = None, 0.0
    for report in reports:
        steps = [
            (counts.batch, counts.seconds / counts.steps, part)
            for counts in report.steps
            if counts.gamma == gamma and counts.steps and counts.batch <= info.max_batch and sum(counts.accepted)
            for part in _parts(rng, counts.accepted, counts.steps, counts.batch)
        ]
        took_s = sum(seconds for _, seconds, _ in steps)
        began_ms = report.at_ms - 1000 * took_s if began_ms is None else began_ms
        now_s = max((report.at_ms - began_ms) / 1000 - took_s, ended_s)
        for number in rng.permutation(len(steps)).tolist():
            batch, seconds, right = steps[number]
            at_s.append(now_s)
            batches.append(batch)
            residuals.append(seconds / step_s(profile, batch, gamma))
            prefixes += right
            now_s += seconds
        ended_s = now_s
    if not at_s:
        raise Refused(f"no step drafted {gamma} tokens: `tidectl policy set gamma={gamma}` while recording")
    header = Header(name, about, profile, gamma, info.max_batch, duration_s=ended_s)
    arrays = (np.asarray(at_s), np.asarray(batches, np.int32), np.asarray(residuals, np.float32))
    return Trace(header, *arrays, np.asarray(prefixes, np.uint8))


def _parts(rng: np.random.Generator, accepted: Sequence[int], steps: int, batch: int) -> list[list[int]]:
    """The right tokens of each step's requests, drawn from their histogram; others stand in for those that ended uncounted."""
    right = np.repeat(np.arange(len(accepted)), accepted)
    rng.shuffle(right)
    whole = np.resize(right, steps * batch)
    return whole.reshape(steps, batch).tolist()
