"""A tiny target and its version 0 as fixtures, for modules that name this one in `pytest_plugins`: read, never changed."""

from pathlib import Path

import pytest

from tests.tiny import make_draft, make_target


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    return make_draft(target, tmp_path_factory.mktemp("drafts") / "0", draft_vocab=64)
