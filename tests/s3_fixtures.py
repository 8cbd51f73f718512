"""A real S3 server as fixtures, for modules that name this one in `pytest_plugins`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """For tests that leave it running."""
    (root := tmp_path_factory.mktemp("s3") / "buckets").mkdir()
    server = S3Server(root)
    yield server
    server.kill()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket's, with the credentials in the environment, for this process and what it starts."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.new_bucket()}/tided"


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    """For tests that harm it."""
    (root := tmp_path / "own" / "buckets").mkdir(parents=True)
    server = S3Server(root)
    yield server
    server.kill()
