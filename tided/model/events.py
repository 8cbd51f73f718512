"""What has happened, for people and programs."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, past tense, for `tidectl events` and the audit log. `data` is plain and small."""

    kind: str
    at_ms: int
    subject: str  # engine, job, version or worker
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    id: str = ""
