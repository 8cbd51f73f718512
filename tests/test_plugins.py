"""Backends and policies by entry point: found without import, and whatever is wrong with one names it and stays its own."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from tests.plugins import install
from tided.backends import guarded
from tided.backends.base import Backend, SwapDone
from tided.backends.guarded import GuardedBackend
from tided.backends.redis import RedisBackend
from tided.backends.registry import backend_for
from tided.backends.transformers import TransformersBackend
from tided.config import SpeculationConfig, check_plugins, parse
from tided.model import plugins
from tided.model.engines import EngineInfo, LatencyProfile, TargetInfo
from tided.model.errors import ConfigError, InvariantBroken, Refused, Superseded, Unavailable
from tided.policies.base import SpeculationDecision, SpeculationObservation
from tided.policies.registry import policy_for
from tided.policies.speedup import Acceptance
from tided.policies.threshold import ThresholdPolicy
from tided.store.engines import EngineStore

PROFILE = LatencyProfile((1, 8), (0.05, 0.06), (1,), (0.005,))
INFO = EngineInfo(
    engine="e",
    incarnation="i",
    kind="third",
    url="",
    target=TargetInfo("ab" * 32, "tiny", 8, 48, 96, (2, 4, 5)),
    version="",
    vocab_id="",
    gamma_max=4,
    max_batch=2,
    capabilities=(),
    gammas=(0,),
    capturing=False,
    epoch=0,
)
SEEN = SpeculationObservation(0.0, "v", PROFILE, Acceptance(), (), 1, max_batch=2, gamma_max=4)
STORE = cast("EngineStore", None)  # no test here reaches Redis


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; packages put into it are found, and forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    plugins.installed.cache_clear()
    yield tmp_path
    plugins.installed.cache_clear()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def third(site: Path, source: str, name: str = "third", group: str = plugins.BACKENDS) -> None:
    install(site, f"pkg-{name}", {group: {name: f"mod_{name}:made"}}, {f"mod_{name}": source})


def test_our_own_are_in_the_table() -> None:
    assert type(backend_for(replace(INFO, kind="transformers"), STORE)) is TransformersBackend
    assert type(backend_for(replace(INFO, kind="redis"), STORE)) is RedisBackend
    assert type(backend_for(replace(INFO, kind="nobody-s"), STORE)) is RedisBackend
    policy = policy_for(SpeculationConfig(margin=0.2))
    assert policy == ThresholdPolicy(margin=0.2)
    assert all(plugin.own for plugin in plugins.installed(plugins.POLICIES).values())


def test_looking_does_not_import(site: Path) -> None:
    third(site, "raise SystemExit('imported')")
    assert plugins.find(plugins.BACKENDS, "third").packages == ("pkg-third",)
    assert "mod_third" not in sys.modules


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import there_is_none", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("made", "NameError"),
        ("other = 1", "AttributeError"),
        ("def made(info, store):\n    raise KeyError('x')", "KeyError"),
        ("def made(info, store):\n    return 7", "int is no Backend"),
    ],
)
def test_a_broken_backend_names_itself(site: Path, source: str, why: str) -> None:
    third(site, source)
    with pytest.raises(Refused, match=r"tided\.backends 'third' of package pkg-third") as refusal:
        backend_for(INFO, STORE)
    assert why in str(refusal.value)
    assert type(backend_for(replace(INFO, kind="transformers"), STORE)) is TransformersBackend


def test_two_packages_of_one_name_are_refused(site: Path) -> None:
    for package in ("one", "two"):
        install(site, package, {plugins.BACKENDS: {"third": f"mod_{package}:made"}}, {f"mod_{package}": "made = 1"})
    with pytest.raises(Refused, match=r"one and two.*uninstall one"):
        backend_for(INFO, STORE)
    install(site, "greedy", {plugins.POLICIES: {"threshold": "mod_one:made"}}, {})
    plugins.installed.cache_clear()
    with pytest.raises(Refused, match="greedy and tided"):
        policy_for(SpeculationConfig())


def test_a_subclass_or_any_callable_will_do(site: Path) -> None:
    third(site, "from tided.backends.redis import RedisBackend\nclass made(RedisBackend):\n    pass")
    third(
        site,
        "from tided.backends.redis import RedisBackend\ndef made(info, store):\n    return RedisBackend(info.engine, store)",
        "other",
    )
    for kind in ("third", "other"):
        backend = backend_for(replace(INFO, kind=kind), STORE)
        assert isinstance(backend, GuardedBackend)
        assert backend.engine == "e"


class Rough(Backend):
    """Does what its test says, whatever is asked."""

    def __init__(self, does: Any) -> None:
        super().__init__("e")
        self._does = does

    async def observe(self, cursor: str) -> Any:
        return await self._act()

    async def set_schedule(self, gammas: tuple[int, ...], epoch: int) -> Any:
        return await self._act()

    async def set_capture(self, on: bool, credit_bytes: int, epoch: int) -> Any:
        return await self._act()

    async def send_swap(self, version: str, path: Path, epoch: int, ttl_s: float) -> Any:
        return await self._act()

    async def swap_outcome(self, version: str, command: str) -> Any:
        return await self._act()

    async def measure_profile(self, epoch: int, deadline_s: float) -> Any:
        return await self._act()

    async def _act(self) -> Any:
        if isinstance(self._does, Exception):
            raise self._does
        if self._does == "hang":
            await anyio.sleep_forever()
        return self._does


def calls(does: Any, site: Path) -> dict[str, Any]:
    third(site, "")
    backend = GuardedBackend(Rough(does), plugins.find(plugins.BACKENDS, "third"))
    return {
        "observe": lambda: backend.observe(""),
        "set_schedule": lambda: backend.set_schedule((1,), 1),
        "set_capture": lambda: backend.set_capture(True, 1, 1),
        "send_swap": lambda: backend.send_swap("v", Path("/d"), 1, 1.0),
        "swap_outcome": lambda: backend.swap_outcome("v", "c"),
        "measure_profile": lambda: backend.measure_profile(1, 0.0),
    }


@pytest.mark.parametrize("error", [ValueError("boom"), InvariantBroken("boom"), AssertionError("boom")])
async def test_whatever_a_backend_raises_is_a_refusal_that_names_it(site: Path, error: Exception) -> None:
    for name, call in calls(error, site).items():
        with pytest.raises(Refused, match=rf"of package pkg-third: {name} failed: {type(error).__name__}: boom"):
            await call()


async def test_the_errors_of_the_contract_pass(site: Path) -> None:
    asked = calls(Superseded("newer"), site)
    with pytest.raises(Superseded, match="newer"):
        await asked["set_schedule"]()


async def test_wrong_answers_are_refused_and_right_ones_pass(site: Path) -> None:
    asked = calls(7, site)
    for name in ("observe", "send_swap", "swap_outcome", "measure_profile"):
        with pytest.raises(Refused, match=f"{name} failed: TypeError: it answered int"):
            await asked[name]()
    rough = plugins.find(plugins.BACKENDS, "third")
    assert await GuardedBackend(Rough(([], "9")), rough).observe("") == ([], "9")
    assert await GuardedBackend(Rough(SwapDone("v", 0.1)), rough).swap_outcome("v", "c") == SwapDone("v", 0.1)
    assert await GuardedBackend(Rough(PROFILE), rough).measure_profile(1, 1.0) == PROFILE


async def test_a_backend_that_hangs_is_given_up(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("LOOK_S", "ASK_S", "GRACE_S"):
        monkeypatch.setattr(guarded, limit, 0.01)
    for name, call in calls("hang", site).items():
        # Of looking every cycle it must not mean that Redis is away, which would concern all engines.
        with pytest.raises(Refused if name == "observe" else Unavailable, match=f"{name} of engine e took longer"):
            await call()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import there_is_none", "ModuleNotFoundError"),
        ("def made(config):\n    raise ValueError('steps')", "making the policy failed: ValueError: steps"),
    ],
)
def test_a_broken_policy_names_itself(site: Path, source: str, why: str) -> None:
    third(site, source, group=plugins.POLICIES)
    with pytest.raises(Refused, match=r"tided\.policies 'third' of package pkg-third") as refusal:
        policy_for(SpeculationConfig(policy="third"))
    assert why in str(refusal.value)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("raise RuntimeError('mid')", "decide failed: RuntimeError: mid"),
        ("return state", "decide failed: TypeError"),
        ("return state, 7", "int is no SpeculationDecision"),
        ("return state, SpeculationDecision((1,), (), None, False, '')", r"expected 2 numbers"),
        ("return state, SpeculationDecision((1, 5), (), None, False, '')", "from 0 to 4"),
        ("return state, SpeculationDecision((1, None), (), None, False, '')", "from 0 to 4"),
    ],
)
def test_what_a_policy_decides_is_checked(site: Path, answer: str, why: str) -> None:
    source = f"""
from tided.policies.base import SpeculationDecision
class made:
    def __init__(self, config): pass
    def start(self): return None
    def decide(self, state, seen):
        {answer}
"""
    third(site, source, group=plugins.POLICIES)
    policy = policy_for(SpeculationConfig(policy="third"))
    with pytest.raises(Refused, match=why):
        policy.decide(policy.start(), SEEN)


def test_a_good_policy_decides(site: Path) -> None:
    source = """
from tided.policies.base import SpeculationDecision
class made:
    def __init__(self, config): self.gamma = config.options["gamma"]
    def start(self): return 0
    def decide(self, state, seen): return state + 1, SpeculationDecision((self.gamma,) * seen.max_batch, (), None, False, "")
"""
    third(site, source, group=plugins.POLICIES)
    policy = policy_for(SpeculationConfig(policy="third", options={"gamma": 3}))
    state, decision = policy.decide(policy.start(), SEEN)
    assert (state, decision) == (1, SpeculationDecision((3, 3), (), None, False, ""))


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"f: speculation.policy: .*'treshold'.*did you mean 'threshold'\?"):
        check_plugins(parse({"speculation": {"policy": "treshold"}}, "f"), "f")
    with pytest.raises(ConfigError, match=r"installed are .*threshold"):
        check_plugins(parse({"speculation": {"policy": "qqq"}}, "f"), "f")
    with pytest.raises(Refused, match=r"takes no speculation\.options, got depth"):
        policy_for(SpeculationConfig(options={"depth": 1}))


def test_a_stale_installation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda **_: ())  # pyright: ignore[reportUnknownLambdaType]
    plugins.installed.cache_clear()
    with pytest.raises(InvariantBroken, match="install it again"):
        plugins.find(plugins.POLICIES, "threshold")
    plugins.installed.cache_clear()
