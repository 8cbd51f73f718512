"""The speculation policy by its name, from the entry points `tided.policies`: a callable (SpeculationConfig) -> SpeculationPolicy."""

from typing import Any

from tided.config import SpeculationConfig
from tided.model import plugins
from tided.model.errors import Refused
from tided.model.plugins import Plugin
from tided.policies.base import SpeculationDecision, SpeculationObservation, SpeculationPolicy


def policy_for(config: SpeculationConfig) -> SpeculationPolicy[Any]:
    """The policy that `config` names, made from it.

    Raises `Refused` for a name that nothing provides, or one whose plugin cannot be loaded or made: it names the package.
    """
    plugin = plugins.find(plugins.POLICIES, config.policy)
    policy = plugin.made("policy", config)
    return policy if plugin.own else GuardedPolicy(policy, plugin)


class GuardedPolicy:
    """A third party's policy: what goes wrong in it is a `Refused` that names it, and its decisions are checked."""

    def __init__(self, inner: SpeculationPolicy[Any], plugin: Plugin) -> None:
        self._inner, self._plugin = inner, plugin

    def start(self) -> Any:
        try:
            return self._inner.start()
        except Exception as exc:
            raise self._plugin.failed("start", exc) from exc

    def decide(self, state: Any, seen: SpeculationObservation) -> tuple[Any, SpeculationDecision]:
        try:
            after, decision = self._inner.decide(state, seen)
            _check(decision, seen)
        except Exception as exc:
            raise self._plugin.failed("decide", exc) from exc
        return after, decision


def _check(decision: object, seen: SpeculationObservation) -> None:
    if not isinstance(decision, SpeculationDecision):
        raise Refused(f"a {type(decision).__name__} is no SpeculationDecision")
    gammas: Any = decision.gammas
    if len(gammas) != seen.max_batch or not all(
        isinstance(gamma, int) and 0 <= gamma <= seen.gamma_max for gamma in gammas
    ):
        raise Refused(f"gammas {gammas!r}: expected {seen.max_batch} numbers from 0 to {seen.gamma_max}")
