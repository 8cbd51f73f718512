"""The study's arms as processes: three engines on one core, and for one of them tided with its worker on the other core."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from bench.configs import free_port, write_config
from bench.control import Control
from bench.shift_plan import ARMS, Places, Plan
from tided.config import Config
from tided.local import LocalStack, Service, services, split_cores
from tided.model.errors import Refused
from tided.model.status import EngineStatus


@dataclass(frozen=True)
class Frozen:
    """The static arm's draft and schedule: what the tided arm served at the end of phase 1. No path: nothing was deployed."""

    version: str = ""
    path: str = ""
    gammas: tuple[int, ...] = (0,)


class Arms(Control):
    """Started arms. `urls` by arm, in the order A, B, C of the turns."""

    def __init__(self, stack: LocalStack, config: Config, urls: Mapping[str, str]) -> None:
        super().__init__(config.daemon.socket_path)
        self.stack, self.config, self.urls = stack, config, urls

    @classmethod
    async def start(cls, stack: LocalStack, plan: Plan, places: Places, frozen: Frozen) -> "Arms":
        """Starts tided, its engine and worker, and the two other arms; the static one on `frozen`.

        Returns when tided's engine serves a draft that tided knows.
        """
        ports = {arm: free_port() for arm in ARMS}
        config_file = places.work / "tided.toml"
        config = write_config(config_file, _changes(plan, places, ports["tided"]))
        engine_cores, _ = split_cores(config.engine.threads)
        for service in services(config_file, config):
            await stack.start(service)
        for arm in ("none", "static"):
            arguments = ["--model", str(places.model), "--dtype", plan.dtype, "--port", str(ports[arm])]
            arguments += ["--gamma-max", str(plan.gamma_max), "--no-profile", "--engine-id", arm]
            arguments += ["--max-context", str(plan.max_context)]
            await stack.start(Service(arm, "tided.engine.embedded.server", tuple(arguments), engine_cores))
        arms = cls(stack, config, {arm: f"http://127.0.0.1:{ports[arm]}" for arm in ARMS})
        await arms.has_draft()
        if frozen.path:
            await arms.freeze(frozen)
        return arms

    async def served(self) -> Frozen:
        """What tided's engine serves now."""
        info = (await self.engine()).info
        path = self.config.drafts_dir.absolute() / info.version
        return Frozen(info.version, str(path), info.gammas)

    async def freeze(self, frozen: Frozen) -> None:
        """Puts the static arm onto a draft and a schedule, for good."""
        async with httpx.AsyncClient(base_url=self.urls["static"], timeout=60, trust_env=False) as http:
            for route, body in (
                ("/admin/swap", {"path": frozen.path, "version": frozen.version}),
                ("/admin/gammas", {"gammas": frozen.gammas}),
            ):
                answer = await http.post(route, json=body)
                if answer.status_code != 200:
                    raise Refused(f"the static arm: {answer.json()['error']['message']}")

    async def drained(self, timeout_s: float = 60.0) -> EngineStatus:
        """Waits until no tapped row is on its way any more, then gives the totals; gives them anyway after `timeout_s`."""
        try:
            return (await self.wait_for(lambda status: status.engines[0].samples.in_flight == 0, timeout_s)).engines[0]
        except TimeoutError:
            return await self.engine()


def _changes(plan: Plan, places: Places, port: int) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {
        "daemon": {"state_dir": str(places.work / "state")},
        "target": {"path": str(places.model)},
        "engine": {
            "port": port,
            "dtype": plan.dtype,
            "gamma_max": plan.gamma_max,
            "max_batch": plan.concurrency,
            "max_context": plan.max_context,
        },
        "speculation": {"gamma_max": plan.gamma_max},
    }
    for section, values in plan.changes.items():
        changes[section] = {**changes.get(section, {}), **values}
    return changes
