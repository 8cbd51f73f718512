"""Virtual time: a trace run under a driver.

Traffic is a function of time: at second t the engine serves what the trace recorded at t, however fast the driver lets it be. Steps of
one bin are taken in their order, from the start again when a fast driver has used them up. So every driver meets the same traffic for
the same time, and its figure is the tokens that it made of it. Batch sizes are those of the trace: that a faster engine would have
fewer requests waiting is left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tided.policies.speedup import steps_s
from tided.replay.drivers import Driver
from tided.replay.trace import BIN_S, Trace


@dataclass(frozen=True)
class Run:
    """What a driver made of a trace. `per_bin`: tokens emitted in each bin of `BIN_S` seconds. `served_s`: time with requests."""

    driver: str
    tokens: int
    served_s: float
    switches: int
    per_bin: NDArray[np.float64]
    drafted_share: float  # of the steps

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.served_s


def run(trace: Trace, driver: Driver) -> Run:
    """Run `trace` under `driver`, from its first second to its last."""
    header = trace.header
    table = steps_s(header.profile, header.max_batch, header.gamma_max)
    batches, residuals, emitted = trace.batch.tolist(), trace.residual.tolist(), trace.emitted.tolist()
    per_bin = np.zeros(len(trace.bins))
    now_s = served_s = 0.0
    tokens = steps = drafted = paid = 0
    for number, bin_steps in enumerate(trace.bins):
        start_s, end_s = number * BIN_S, min((number + 1) * BIN_S, header.duration_s)
        now_s = max(now_s, start_s)
        taken = 0
        while now_s < end_s:
            while driver.due_s <= now_s:
                driver.tick(now_s)
            if not bin_steps:
                now_s = min(driver.due_s, end_s)
                continue
            step = bin_steps[taken % len(bin_steps)]
            taken += 1
            batch = batches[step]
            gamma = driver.gammas[batch - 1]
            seconds = table[batch - 1][gamma] * residuals[step]
            driver.stepped(step, batch, gamma, seconds)
            if driver.changes != paid:
                seconds += (driver.changes - paid) * header.switch_s
                paid = driver.changes
            now_s += seconds
            served_s += seconds
            per_bin[number] += emitted[step][gamma]
            tokens += emitted[step][gamma]
            steps += 1
            drafted += gamma > 0
    return Run(driver.name, tokens, served_s, driver.changes, per_bin, drafted / max(steps, 1))


def worst_window(ours: Run, none: Run, window_s: float = 30.0) -> float:
    """The least ratio of tokens over those of `none` in any window of `window_s` seconds in which `none` served something."""
    size = min(round(window_s / BIN_S), len(none.per_bin))
    sums = [np.convolve(run.per_bin, np.ones(size), "valid") for run in (ours, none)]
    busy = sums[1] > 0
    return float((sums[0][busy] / sums[1][busy]).min())
