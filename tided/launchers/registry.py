"""The launcher by its name, from the entry points `tided.launchers`: a callable (LauncherConfig) -> Launcher."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from tided.config import LauncherConfig
from tided.launchers.base import Launcher
from tided.model import plugins
from tided.model.errors import InvariantBroken, TideError, Unavailable
from tided.model.launch import Launch
from tided.model.plugins import Plugin

ASK_S = 60.0


def launcher_for(config: LauncherConfig) -> Launcher:
    """Raises `Refused` for a name that nothing provides, or a plugin that cannot be loaded or made: it names the package."""
    plugin = plugins.find(plugins.LAUNCHERS, config.kind)
    launcher = plugin.made("launcher", config)
    return launcher if plugin.own else GuardedLauncher(launcher, plugin)


class GuardedLauncher:
    """A third party's launcher: errors name it, a call that hangs ends, answers are checked."""

    def __init__(self, inner: Launcher, plugin: Plugin) -> None:
        self._inner, self._plugin = inner, plugin

    async def states(self) -> dict[str, Launch]:
        answer: Any = await self._ask("states", self._inner.states)
        if not isinstance(answer, dict) or not all(isinstance(item, Launch) for item in answer.values()):
            raise self._plugin.failed("states", TypeError(f"a {type(answer).__name__} is no dict of Launch"))
        return answer

    async def submit(self, launch_id: str, command: str) -> None:
        await self._ask("submit", lambda: self._inner.submit(launch_id, command))

    async def cancel(self, launch_id: str) -> None:
        await self._ask("cancel", lambda: self._inner.cancel(launch_id))

    async def forget(self, launch_id: str) -> None:
        await self._ask("forget", lambda: self._inner.forget(launch_id))

    async def aclose(self) -> None:
        await self._ask("aclose", self._inner.aclose)

    async def _ask(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            with anyio.fail_after(ASK_S):
                return await call()
        except TimeoutError as exc:
            raise Unavailable(f"{self._plugin}: {what} did not answer within {ASK_S:g} s") from exc
        except InvariantBroken as exc:
            raise self._plugin.failed(what, exc) from exc
        except TideError:
            raise
        except Exception as exc:
            raise self._plugin.failed(what, exc) from exc
