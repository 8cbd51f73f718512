"""Faults done to a stack, and undone."""

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from chaos.plan import ENGINES, EVERYBODY, NETWORK, Fault, Kind
from chaos.stack import Stack
from tided.api.client import api_path
from tided.model.errors import TideError

MODES = {Kind.DELAY: "forward", Kind.MUTE: "mute", Kind.SWALLOW: "swallow", Kind.REFUSE: "refuse"}


class Injector:
    """Does what a plan says. `done`: each fault with what came of it."""

    def __init__(self, stack: Stack, say: Callable[[str], None]) -> None:
        self.done: list[dict[str, Any]] = []
        self._stack, self._say = stack, say
        self._busy: set[str] = set()

    async def run(self, faults: list[Fault]) -> None:
        """All of them, each at its time; returns when the last is undone."""
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, started_s + fault.at_s - time.monotonic()))
                group.create_task(self._one(fault))

    async def _one(self, fault: Fault) -> None:
        outcome = "left out: another fault is under way there"
        if fault.victim not in self._busy:
            self._busy.add(fault.victim)
            try:
                outcome = await self._befall(fault)
            finally:
                self._busy.discard(fault.victim)
        self.done.append({**asdict(fault), "outcome": outcome})

    async def _befall(self, fault: Fault) -> str:
        lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        self._say(f"{fault.kind.value} {fault.detail} -> {fault.victim}{lasting}".replace("  ", " "))
        match fault.kind:
            case Kind.KILL:
                return "done" if self._stack.signal(fault.victim, signal.SIGKILL) else "nobody was there"
            case Kind.STOP:
                return await self._stop(fault)
            case Kind.FAILPOINT | Kind.DISK:
                return await self._armed(fault)
            case Kind.TRAIN | Kind.DEPLOY:
                return await asyncio.to_thread(self._by_hand, fault, await self._stack.leader())
            case _:
                return await self._network(fault)

    async def _stop(self, fault: Fault) -> str:
        if not self._stack.signal(fault.victim, signal.SIGSTOP):
            return "nobody was there"
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self._stack.signal(fault.victim, signal.SIGCONT)
        return "done"

    async def _armed(self, fault: Fault) -> str:
        """One life with a failpoint: it begins by a kill -9, and where it lasts for a time ends with another."""
        self._stack.kept[fault.victim].armed = fault.detail
        self._stack.signal(fault.victim, signal.SIGKILL)
        if fault.seconds:
            await asyncio.sleep(fault.seconds)
            self._stack.signal(fault.victim, signal.SIGKILL)
        return "done"

    async def _network(self, fault: Fault) -> str:
        names = list(self._stack.proxies) if fault.victim == EVERYBODY else [fault.victim]
        proxies = [self._stack.proxies[name] for name in names]
        if fault.kind is Kind.CUT:
            for proxy in proxies:
                proxy.cut()
            return "done"
        assert fault.kind in NETWORK
        for proxy in proxies:
            proxy.mode = MODES[fault.kind]
            proxy.delay_s = fault.delay_s if fault.kind is Kind.DELAY else 0.0
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            for proxy in proxies:
                proxy.mode, proxy.delay_s = "forward", 0.0
        return "done"

    def _by_hand(self, fault: Fault, leader: Any) -> str:
        """What an operator may do at any time; to be refused, or not to be heard, is as well."""
        if leader is None:
            return "nobody leads"
        try:
            if fault.kind is Kind.TRAIN:
                leader.post("/v1/train", {"engine": fault.victim})
            else:
                leader.post(api_path("drafts", f"tiny@{fault.detail}", "deploy"), {"engine": fault.victim})
        except TideError as exc:
            return f"{type(exc).__name__}: {exc}"
        assert fault.victim in ENGINES
        return "done"
