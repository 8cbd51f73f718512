"""What attempts at one job leave for the next: checkpoints in WORK_DIR/JOB/attempt-N, here or in the directory of another worker.

Workers whose directories lie side by side on a filesystem that their hosts share (STATE_DIR/work/NAME) go on from each other's. Files of
other users are not looked at.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tided.model.jobs import CHECKPOINT_FILE


def attempt_dir(work_dir: Path, job: str, attempt: int) -> Path:
    """Where an attempt works."""
    return (work_dir / job / f"attempt-{attempt}").absolute()


def take_up(directory: Path) -> bool:
    """Give the attempt at `directory` the newest checkpoint of the job's other attempts, if there is any.

    It is linked or copied: an earlier attempt that still runs replaces its own file, and never changes this one.
    """
    for other in sorted(_others(directory), key=_number, reverse=True):
        with suppress(OSError):
            _link(other / CHECKPOINT_FILE, directory / CHECKPOINT_FILE)
            return True
    return False


def may_resume(directory: Path) -> bool:
    """Whether another attempt could go on from this one."""
    return (directory / CHECKPOINT_FILE).exists()


def remove(directory: Path) -> None:
    """Remove what one attempt made."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):  # other attempts of the job may be there
        directory.parent.rmdir()


def remove_others(directory: Path) -> None:
    """The job is over: remove what its other attempts left."""
    for other in list(_others(directory)):
        remove(other)


def _others(directory: Path) -> Iterator[Path]:
    work_dirs, job = directory.parents[2], directory.parent.name
    for path in work_dirs.glob(f"*/{job}/attempt-*"):
        with suppress(OSError):  # a worker's directory may be there under a second name
            if not path.samefile(directory) and path.stat().st_uid == os.geteuid():
                yield path


def _number(directory: Path) -> int:
    number = directory.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _link(source: Path, path: Path) -> None:
    try:
        path.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # a filesystem without links
        partial = path.with_name(path.name + ".tmp")
        shutil.copyfile(source, partial)
        partial.replace(path)
