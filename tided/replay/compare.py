"""A trace under several drivers, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tided.config import SpeculationConfig
from tided.policies.registry import policy_for
from tided.replay.baselines import BASELINES
from tided.replay.drivers import Driver, Tided
from tided.replay.simulate import Run, run, worst_window
from tided.replay.trace import BIN_S, Trace

POLICIES = ("threshold", "bandit")


@dataclass(frozen=True, slots=True)
class Result:
    """One driver's row. `regret`: the share of the clairvoyant's tokens that it did not make; `worst_window`: its least ratio to no
    speculation over 30 s; `timeline`: tokens a second, in slices of equal length."""

    driver: str
    tokens_per_s: float
    over_none: float
    regret: float
    worst_window: float
    switches: int
    drafted_share: float
    timeline: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`served_s`: virtual seconds in which requests ran, without speculation."""

    trace: str
    about: str
    regime: str
    duration_s: float
    served_s: float
    results: tuple[Result, ...]

    def of(self, driver: str) -> Result:
        return next(result for result in self.results if result.driver == driver)


def driver_named(name: str, trace: Trace, config: SpeculationConfig) -> Driver:
    """A baseline, or tided with the policy of that name, configured by `config`. Raises `Refused` for a name that is neither."""
    if name in BASELINES:
        return BASELINES[name](trace)
    policy = policy_for(config.model_copy(update={"policy": name}))
    return Tided(name, (0,) * trace.header.max_batch, policy=policy, trace=trace)


def compare(trace: Trace, names: Sequence[str], config: SpeculationConfig, slices: int = 60) -> Comparison:
    """Run `trace` under each of `names`. No speculation and the clairvoyant, which every figure refers to, are always run."""
    runs = {name: run(trace, driver_named(name, trace, config)) for name in dict.fromkeys(names)}
    none = runs.get("always-off") or run(trace, driver_named("always-off", trace, config))
    best = runs.get("clairvoyant") or run(trace, driver_named("clairvoyant", trace, config))
    header = trace.header
    return Comparison(
        trace=header.name,
        about=header.about,
        regime=header.regime,
        duration_s=header.duration_s,
        served_s=none.served_s,
        results=tuple(
            Result(
                driver=name,
                tokens_per_s=made.tokens_per_s,
                over_none=made.tokens_per_s / none.tokens_per_s,
                regret=1.0 - made.tokens_per_s / best.tokens_per_s,
                worst_window=worst_window(made, none),
                switches=made.switches,
                drafted_share=made.drafted_share,
                timeline=_timeline(made, slices),
            )
            for name, made in runs.items()
        ),
    )


def _timeline(made: Run, slices: int) -> tuple[float, ...]:
    count = min(slices, len(made.per_bin))
    cuts = [round(i * len(made.per_bin) / count) for i in range(count + 1)]
    return tuple(float(made.per_bin[a:b].mean()) / BIN_S for a, b in pairwise(cuts))
