"""What an attempt takes up of earlier ones: the newest checkpoint, of this user, and never a part of one."""

import os
from pathlib import Path

import pytest

from tided.model.jobs import CHECKPOINT_FILE
from tided.worker import leftovers


def left(work_dir: Path, attempt: int, content: str) -> Path:
    directory = leftovers.attempt_dir(work_dir, "job-1", attempt)
    directory.mkdir(parents=True)
    (directory / CHECKPOINT_FILE).write_text(content)
    return directory


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    directory = leftovers.attempt_dir(tmp_path / "w1", "job-1", 12)
    directory.mkdir(parents=True)
    return directory


def test_the_newest_is_taken_and_stays_as_it_is(mine: Path, tmp_path: Path) -> None:
    left(tmp_path / "w1", 2, "two")
    newest = left(tmp_path / "w2", 11, "eleven")
    leftovers.attempt_dir(tmp_path / "w3", "job-1", 13).mkdir(parents=True)  # has written none
    assert leftovers.take_up(mine)
    replacement = newest / "new"
    replacement.write_text("written by an attempt that still runs")
    replacement.replace(newest / CHECKPOINT_FILE)
    assert (mine / CHECKPOINT_FILE).read_text() == "eleven"
    assert leftovers.may_resume(mine)


def test_without_links_it_is_copied_whole(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    left(tmp_path / "w2", 3, "three")
    assert leftovers.take_up(mine)
    assert [path.name for path in mine.iterdir()] == [CHECKPOINT_FILE]
    assert (mine / CHECKPOINT_FILE).read_text() == "three"


def test_nothing_of_another_user_is_taken_or_removed(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = left(tmp_path / "w2", 3, "planted")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not leftovers.take_up(mine)
    leftovers.remove_others(mine)
    assert other.exists()


def test_the_end_of_a_job_leaves_its_last_attempt(mine: Path, tmp_path: Path) -> None:
    left(tmp_path / "w1", 2, "two")
    left(tmp_path / "w2", 11, "eleven")
    leftovers.remove_others(mine)
    assert list(tmp_path.glob("*/job-1/*")) == [mine]
    leftovers.remove(mine)
    assert not list(tmp_path.glob("*/job-1"))


def test_a_directory_under_a_second_name_is_no_other(mine: Path, tmp_path: Path) -> None:
    (mine / CHECKPOINT_FILE).write_text("twelve")
    (tmp_path / "current").symlink_to(tmp_path / "w1", target_is_directory=True)
    gone = left(tmp_path / "w2", 11, "eleven")
    leftovers.remove_others(mine)
    assert (mine / CHECKPOINT_FILE).read_text() == "twelve"
    assert not gone.exists()
