"""Latency profiles on a real Valkey: an engine that comes back is predicted by what it measured when it last was the same."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings
from tests.engine_double import PROFILE, describe_double
from tided.model.engines import EngineInfo
from tided.model.errors import Superseded, Unavailable
from tided.services.profiles import Profiles

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real


@pytest.fixture
async def control(valkey: Valkey, tmp_path: Path, target: Path) -> AsyncIterator[Control]:
    async with leading(valkey, settings(tmp_path, target)) as control:
        yield control


@pytest.fixture
def engine(target: Path) -> EngineInfo:
    return describe_double(target, None)


def back(engine: EngineInfo, incarnation: str = "another-life") -> EngineInfo:
    """The engine after a restart that measured nothing."""
    return replace(engine, incarnation=incarnation, profile=None)


async def test_an_engine_that_comes_back_needs_no_measurement(control: Control, engine: EngineInfo) -> None:
    assert await Profiles(control.context).of(back(engine)) is None
    assert await Profiles(control.context).of(engine) == PROFILE
    restarted = Profiles(control.context)  # tided, too
    assert await restarted.of(back(engine)) == PROFILE
    anew = replace(PROFILE, target_s=tuple(2 * seconds for seconds in PROFILE.target_s))
    assert await restarted.of(replace(engine, profile=anew)) == anew
    assert await restarted.of(back(engine, "a-third")) == anew


@pytest.mark.parametrize("change", [{"kind": "vllm"}, {"gamma_max": 2}, {"max_batch": 64}])
async def test_another_engine_of_the_same_name_has_its_own(
    control: Control, engine: EngineInfo, change: dict[str, object]
) -> None:
    profiles = Profiles(control.context)
    await profiles.of(engine)
    assert await profiles.of(replace(back(engine), **change)) is None
    assert await profiles.of(back(engine)) == PROFILE
    other = replace(engine, target=replace(engine.target, digest="f" * 64), profile=None)
    assert await profiles.of(other) is None


async def test_only_the_leader_keeps_one(control: Control, engine: EngineInfo) -> None:
    await control.context.leadership.step_down(Superseded("for the test"))
    with pytest.raises(Unavailable):
        await Profiles(control.context).of(engine)
