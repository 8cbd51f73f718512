"""Reference states of targets on disk, one file for each target's content digest."""

import shutil
from pathlib import Path

from tided.draft import reference
from tided.draft.reference import Reference
from tided.model.errors import Refused, Unavailable
from tided.model.ids import check_digest


class ReferenceStore:
    """Calls block on the disk: make them in a thread. All raise `Unavailable` when it fails."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, digest: str, vocab: int) -> Reference | None:
        """The target's reference over the sequences of this release; None if there is none yet."""
        path = self._path(digest)
        if not path.is_file():
            return None
        found = reference.read(path)
        return found if _is_of(found, digest, vocab) else None

    def has(self, digest: str) -> bool:
        """Whether there is any reference of the target."""
        return self._path(digest).is_file()

    def add(self, digest: str, vocab: int, staged: Path) -> Reference:
        """Take what a job staged into the store. Raises `Refused` if it is not this target's."""
        if not _is_of(reference.read(staged), digest, vocab):
            raise Refused(f"{staged}: not the reference of target {digest[:12]}")
        path = self._path(digest)
        temporary = path.with_suffix(".new")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(staged, temporary)
            temporary.replace(path)
        except OSError as exc:
            raise Unavailable(f"{path}: cannot be written ({exc.strerror}); free space or check permissions") from exc
        return reference.read(path)

    def _path(self, digest: str) -> Path:
        return self._root / f"{check_digest(digest, 'target')}.safetensors"


def _is_of(found: Reference, digest: str, vocab: int) -> bool:
    return found.target == digest and found.sequences == reference.sequences(vocab)
