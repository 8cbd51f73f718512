"""The plugin's settings: tided.engine.plugin's, and what only vLLM needs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tided.engine.plugin import PluginSettings, switch
from tided.model.errors import Refused

SKIP_DRAFT_AFTER = 8


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Environment variables beside those of `PluginSettings`.

    TIDED_SKIP_DRAFT_AFTER: steps with nothing to draft after which the draft's forward is left out too; 0: never.
    TIDED_MEND_SAMPLING: 0: leave vLLM's sampling on processors as it is, faulty, to see it found.
    TIDED_ENGINE_URL: where clients reach this engine; shown to operators.
    """

    plugin: PluginSettings
    skip_draft_after: int
    url: str
    mend_sampling: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "VllmSettings | None":
        """The settings, or None when TIDED_ENGINE is not set. Raises `Refused` for values that cannot be meant."""
        given = os.environ if environment is None else environment
        plugin = PluginSettings.from_environment(given)
        if plugin is None:
            return None
        skip = given.get("TIDED_SKIP_DRAFT_AFTER", str(SKIP_DRAFT_AFTER))
        if not skip.isdecimal():
            raise Refused(f"TIDED_SKIP_DRAFT_AFTER must be a whole number, got {skip!r}")
        return cls(
            plugin, int(skip), given.get("TIDED_ENGINE_URL", ""), switch(given, "TIDED_MEND_SAMPLING", default="1")
        )
