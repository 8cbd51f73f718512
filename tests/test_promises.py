"""docs/promises.md holds what it says: every promise names tests, which exist; every failpoint of the source is used."""

import re
from enum import StrEnum
from pathlib import Path

import pytest

from chaos.plan import FAILPOINTS
from tided.machine.collection import Phase
from tided.model.deployments import CanaryState, DeploymentState
from tided.model.verification import VerificationPhase

PAGE = Path("docs/promises.md").read_text(encoding="utf-8")
PROMISES = {
    int(number): re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
    for number, tests in re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)
}
STATES: dict[str, type[StrEnum]] = {
    "after.phase in dispatcher.py": Phase,
    "after.phase in selftest.py": VerificationPhase,
    "after.state in canaries.py": CanaryState,
    "after.state in deployer.py": DeploymentState,
}
NEVER = {"deployer.pending"}
"""What a state machine begins with is not entered by a step of it."""


def failpoints() -> set[str]:
    """All names in the source; of those that end in a state, one for each."""
    found: set[str] = set()
    for path in Path("tided").rglob("*.py"):
        for head, state in re.findall(r'failpoints\.hit\(f?"([\w.-]+\.)?(?:\{([\w.]+)\})?', path.read_text()):
            if state:
                found |= {f"{head}{member}" for member in STATES[f"{state} in {path.name}"]}
        found |= set(re.findall(r'failpoints\.hit\("([\w.-]+)"\)', path.read_text()))
    return found - NEVER


def used() -> set[str]:
    """All that stands in quotes in a test, where an action may follow, and all that chaos draws from."""
    texts = [path.read_text() for path in Path("tests").rglob("test_*.py") if path.name != Path(__file__).name]
    quoted = {name for text in texts for name in re.findall(r'"(\w+\.\w+)(?::\w+)?"', text)}
    return quoted | {name for names in FAILPOINTS.values() for name in names}


def test_every_promise_is_there() -> None:
    assert sorted(PROMISES) == list(range(1, 16))


@pytest.mark.parametrize("number", sorted(PROMISES))
def test_its_tests_exist(number: int) -> None:
    assert PROMISES[number]
    for file, test in PROMISES[number]:
        text = (Path("tests") / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(async )?def {test}\(", text, re.MULTILINE), f"{file} has no {test}"


@pytest.mark.parametrize("name", sorted(failpoints()))
def test_every_failpoint_is_used(name: str) -> None:
    assert name in used()


def test_chaos_draws_from_failpoints_that_exist() -> None:
    assert {name for names in FAILPOINTS.values() for name in names} <= failpoints()
