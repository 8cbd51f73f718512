"""Launchers by entry point, and what is asked of Ray over HTTP. The real Ray: tests/engines/test_ray.py."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.plugins import install
from tided.config import LauncherConfig, check_plugins, parse
from tided.launchers import registry
from tided.launchers.ray import RayLauncher
from tided.launchers.registry import launcher_for
from tided.model import plugins
from tided.model.errors import ConfigError, Refused, Unavailable
from tided.model.launch import Launch, LaunchState

MAKE = "def made(config):\n    return Made()\n"
KIND = r"tided\.launchers 'third' of package pkg-third"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; a package put into it is found, and forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    plugins.installed.cache_clear()
    yield tmp_path
    plugins.installed.cache_clear()
    sys.modules.pop("mod_third", None)


def third(site: Path, source: str) -> Any:
    install(site, "pkg-third", {plugins.LAUNCHERS: {"third": "mod_third:made"}}, {"mod_third": source})
    return launcher_for(LauncherConfig(kind="third"))


def test_rays_is_in_the_table_and_an_unknown_one_is_a_configuration_error() -> None:
    assert isinstance(launcher_for(LauncherConfig(kind="ray")), RayLauncher)
    check_plugins(parse({"launcher": {"kind": "ray"}}, "x"), "x")
    with pytest.raises(ConfigError, match=r"x: launcher\.kind: .*did you mean 'ray'"):
        check_plugins(parse({"launcher": {"kind": "rey"}}, "x"), "x")


@pytest.mark.parametrize("source", ["import there_is_none", "made = 1", "def made(config):\n    raise KeyError('x')"])
def test_a_package_that_breaks_is_named(site: Path, source: str) -> None:
    with pytest.raises(Refused, match=KIND):
        third(site, source)


async def test_what_comes_out_of_a_third_partys_names_it(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import anyio
from tided.model.errors import Refused
class Made:
    async def states(self): return {"a": "running"}
    async def submit(self, launch_id, command): raise ValueError("no partition")
    async def cancel(self, launch_id): await anyio.sleep_forever()
    async def forget(self, launch_id): raise Refused("as it is")
    async def aclose(self): pass
"""
    launcher = third(site, source + MAKE)
    monkeypatch.setattr(registry, "ASK_S", 0.05)
    with pytest.raises(Refused, match=f"{KIND}: states failed"):
        await launcher.states()
    with pytest.raises(Refused, match=f"{KIND}: submit failed: ValueError: no partition"):
        await launcher.submit("a", "true")
    with pytest.raises(Unavailable, match=f"{KIND}: cancel did not answer"):
        await launcher.cancel("a")
    with pytest.raises(Refused, match=r"^as it is$"):
        await launcher.forget("a")
    await launcher.aclose()


# --- what Ray is asked ---


def ray(answer: Callable[[httpx.Request], httpx.Response], **values: Any) -> RayLauncher:
    config = LauncherConfig.model_validate({"kind": "ray", "url": "http://head:8265", **values})
    return RayLauncher(config, httpx.MockTransport(answer))


async def test_a_submission_asks_for_what_is_configured_under_the_token() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"submission_id": "l-1.1"})

    options = {"entrypoint_resources": {"L4": 1}, "entrypoint": "overridden"}
    launcher = ray(answer, cpus=4, device="cuda", devices=2, token="secret", options=options)
    await launcher.submit("l-1.1", "tide-worker")
    assert (asked[0].method, str(asked[0].url)) == ("POST", "http://head:8265/api/jobs/")
    assert asked[0].headers["authorization"] == "Bearer secret"
    assert json.loads(asked[0].content) == {
        "entrypoint": "tide-worker",
        "submission_id": "l-1.1",
        "entrypoint_num_cpus": 4.0,
        "entrypoint_num_gpus": 2,
        "entrypoint_resources": {"L4": 1},
    }


@pytest.mark.parametrize(
    ("status", "body", "error", "why"),
    [
        (401, "", Refused, r"set launcher\.token"),
        (503, "", Unavailable, "answers 503"),
        (200, "<html>", Refused, "is it the address of Ray's dashboard"),
        (200, '[{"submission_id": "x", "status": "DREAMING"}]', Refused, "another shape"),
        (200, '{"jobs": 1}', Refused, "another shape"),
    ],
)
async def test_other_answers_are_errors_that_say_so(status: int, body: str, error: type[Exception], why: str) -> None:
    launcher = ray(lambda _: httpx.Response(status, text=body))
    with pytest.raises(error, match=why):
        await launcher.states()


async def test_a_head_that_is_away_is_unavailable() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(Unavailable, match="Ray at http://head:8265 cannot be reached: refused"):
        await ray(answer).states()
    with pytest.raises(Refused, match=r"launcher\.url"):
        ray(answer, url="http://head:port")


async def test_jobs_of_others_have_no_submission_id() -> None:
    body = [{"submission_id": None, "status": "RUNNING"}, {"submission_id": "x", "status": "RUNNING", "end_time": None}]
    assert await ray(lambda _: httpx.Response(200, json=body)).states() == {"x": Launch(LaunchState.RUNNING)}
