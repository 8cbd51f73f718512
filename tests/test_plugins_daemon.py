"""The example package of tests/plugin_example, installed, in the real daemon; and a broken package beside it."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.configs import write_config
from tests.conftest import Valkey
from tests.daemon_run import tided
from tests.engine_double import describe_double, running_double
from tests.plugins import install, install_example
from tests.support import eventually
from tests.test_daemon_process import run
from tests.tiny import make_draft, make_target
from tided.api.client import Client
from tided.model import plugins
from tided.model.status import Status
from tided.wire.control import Swap

pytestmark = pytest.mark.real


async def test_the_daemon_uses_the_example_and_survives_a_broken_one(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install_example(tmp_path / "site")
    install(site, "tided-mess", {plugins.BACKENDS: {"mess": "tided_mess:Mess"}}, {"tided_mess": "import there_is_none"})
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    target = make_target(tmp_path / "tiny")
    draft = make_draft(target, tmp_path / "0", draft_vocab=64)
    config = write_config(
        tmp_path / "config.toml",
        {
            "redis": {"url": valkey.url},
            "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.1, "start_collector": False},
            "target": {"path": str(target)},
            "speculation": {"policy": "ladder"},
            "self_test": {"enabled": False},
            "training": {"draft_vocab": 64},
        },
        None,
    )
    with (tmp_path / "config.toml").open("a") as file:
        file.write("\n[speculation.options]\nsteps = [3, 1]\n")
    inside = tmp_path / "inside"
    inside.symlink_to(config.drafts_dir.absolute())
    monkeypatch.setenv("TIDED_EXAMPLE_MOUNT", f"{config.drafts_dir.absolute()}={inside}")
    client = Client(config.daemon.socket_path)
    # Without a draft, so that tided brings it version 0 by a swap.
    boxed = replace(describe_double(target, None, "boxed"), kind="boxed")
    mess = replace(describe_double(target, draft, "mess"), kind="mess")
    async with (
        running_double(valkey, boxed) as good,
        running_double(valkey, mess) as bad,
        tided(tmp_path / "config.toml", tmp_path) as daemon,
    ):
        await daemon.ready()
        status = await eventually(lambda: steered(client, (3, 1, 0, 0)), timeout_s=60)
        swaps = [command.body for command in good.commands if isinstance(command.body, Swap)]
        assert [Path(swap.path).parent for swap in swaps] == [inside]
        assert bad.commands == []
        [problem] = [text for text in status.problems if "tided-mess" in text]
        assert problem.startswith("tided.backends 'mess' of package tided-mess cannot be loaded: ModuleNotFoundError")
        assert status.engines[0].speculation.reason == "the ladder has [3, 1]"
        assert daemon.process.returncode is None
        assert await daemon.stop() == 0


async def steered(client: Client, gammas: tuple[int, ...]) -> Status | None:
    status = await asyncio.to_thread(client.status)
    found = {engine.info.engine: engine for engine in status.engines}
    return status if "boxed" in found and found["boxed"].info.gammas == gammas else None


async def test_a_policy_that_fails_leaves_the_schedule_and_says_so(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install_example(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    target = make_target(tmp_path / "tiny")
    draft = make_draft(target, tmp_path / "0", draft_vocab=64)
    config = write_config(
        tmp_path / "config.toml",
        {
            "redis": {"url": valkey.url},
            "daemon": {"state_dir": str(tmp_path / "s"), "cycle_s": 0.1, "start_collector": False},
            "target": {"path": str(target)},
            "speculation": {"policy": "ladder"},  # without its options
            "self_test": {"enabled": False},
            "training": {"draft_vocab": 64},
        },
        None,
    )
    client = Client(config.daemon.socket_path)
    info = replace(describe_double(target, draft), gammas=(2,))

    async def told() -> Status | None:
        status = await asyncio.to_thread(client.status)
        return status if any("tided-example" in problem for problem in status.problems) else None

    async with running_double(valkey, info) as engine, tided(tmp_path / "config.toml", tmp_path) as daemon:
        await daemon.ready()
        status = await eventually(told, timeout_s=60)
        assert any("speculation.options.steps" in problem for problem in status.problems)
        # Everything else goes on.
        await eventually(lambda: engine.info.capturing, timeout_s=60)
        assert engine.info.gammas == (2,)
        assert "SetSchedule" not in engine.kinds()
        assert await daemon.stop() == 0


def test_an_unknown_policy_is_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[speculation]\npolicy = "treshold"\n')
    for arguments in (("--check", "--config", str(path)), ("--config", str(path))):
        code, output = run(*arguments)
        assert code == 2
        assert "did you mean 'threshold'?" in output
        assert "Traceback" not in output
