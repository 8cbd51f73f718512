"""Backends, policies and launchers by entry point: tided's own and anybody's, through the same table of a package's metadata.

Names are read without importing anything; a plugin is imported when it is asked for. Whatever comes out of one that is not ours is
turned into one sentence that names it and its package. What is installed is read once: a new package needs a restart.
"""

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tided.model.errors import InvariantBroken, Refused

BACKENDS = "tided.backends"
"""Kind of engine, as in its heartbeat -> `tided.backends.base.Backend` subclass, or callable (EngineInfo, EngineStore) -> Backend."""
POLICIES = "tided.policies"
"""Name, as in speculation.policy -> callable (SpeculationConfig) -> `tided.policies.base.SpeculationPolicy`."""
LAUNCHERS = "tided.launchers"
"""Name, as in launcher.kind -> callable (LauncherConfig) -> `tided.launchers.base.Launcher`."""
OWN = "tided"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One name of a group. `packages` that provide it: more than one is an error of the installation."""

    entry: EntryPoint
    packages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.entry.group} {self.entry.name!r} of package {' and '.join(self.packages)}"

    @property
    def own(self) -> bool:
        return self.packages == (OWN,)

    def load(self) -> Any:
        """Import it and give what it names. Raises `Refused` that names it."""
        if len(self.packages) > 1:
            raise Refused(f"{self}: two packages claim one name; uninstall one of them and restart tided")
        try:
            return self.entry.load()
        except (Exception, SystemExit) as exc:
            raise Refused(f"{self} cannot be loaded: {said(exc)}; mend or uninstall it and restart tided") from exc

    def made(self, what: str, config: Any) -> Any:
        """What it makes of its configuration. Raises `Refused` that names it; what is our own raises what it raises."""
        make = self.load()
        try:
            return make(config)
        except Exception as exc:
            if self.own:
                raise
            raise self.failed(f"making the {what}", exc) from exc

    def failed(self, what: str, exc: BaseException) -> Refused:
        """The error to raise for anything that came out of a call to it."""
        return Refused(f"{self}: {what} failed: {said(exc)}")


@cache
def installed(group: str) -> dict[str, Plugin]:
    """The plugins of a group by name, none of them imported."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return {
        name: Plugin(entries[0], tuple(sorted({entry.dist.name if entry.dist else "?" for entry in entries})))
        for name, entries in sorted(found.items())
    }


def find(group: str, name: str) -> Plugin:
    """Raises `Refused` for a name that nothing installed provides, with the nearest one that is."""
    known = installed(group)
    if OWN not in {package for plugin in known.values() for package in plugin.packages}:
        raise InvariantBroken(f"{group}: not even tided's own are found: its installation is stale; install it again")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"installed are {', '.join(known)}"
        raise Refused(f"nothing that is installed provides {name!r} in {group}; {hint}")
    return known[name]


def said(exc: BaseException) -> str:
    """An exception in one line."""
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
