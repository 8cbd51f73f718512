"""The draft store on a real disk: versions are whole, immutable, numbered, and stay below their root."""

import json
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tided.model.drafts import Draft, DraftOrigin, Evaluation
from tided.model.engines import TargetInfo
from tided.model.errors import NotFound, Refused, TideError, Unavailable
from tided.store.drafts import DraftStore

TARGET = TargetInfo("0" * 64, "tiny", 8, 48, VOCAB, (2, 4, 5))
Stage = Callable[[int], Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four checkpoints of one target that differ in one weight."""
    root = tmp_path_factory.mktemp("staged")
    first = make_draft(make_target(root / "target"), root / "0")
    loaded = checkpoint.load(first)
    made = [first]
    for n in range(1, 4):
        tensors: dict[str, Any] = {name: value.copy() for name, value in loaded.tensors.items()}
        tensors["norm.weight"][0] += n
        checkpoint.write(root / str(n), loaded.config, tensors)
        made.append(root / str(n))
    return made


@pytest.fixture
def store(tmp_path: Path) -> DraftStore:
    return DraftStore(tmp_path / "drafts")


def add(store: DraftStore, staged: Path, lineage: str = "main", **changes: Any) -> Draft:
    given: dict[str, Any] = {"parent": "", "origin": DraftOrigin.INIT, "target": TARGET, "now_ms": 5} | changes
    return store.add(staged, lineage=lineage, **given)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_version_is_added_whole_and_found_again(store: DraftStore, checkpoints: list[Path]) -> None:
    version = checkpoint.version_of(checkpoints[0])
    evaluation = Evaluation(version, 3, ("ab",), (2.5,), (100,), (0.8,))
    draft = add(store, checkpoints[0], job="job-1", evaluation=evaluation)
    assert draft.version == version
    assert (draft.lineage, draft.number, draft.target, draft.job, draft.created_ms) == ("main", 0, "0" * 64, "job-1", 5)
    assert draft.vocab_id == checkpoint.vocab_id_of(checkpoints[0])
    assert draft.bytes == sum((checkpoints[0] / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
    assert sorted(os.listdir(store.path(version))) == [CONFIG_FILE, "draft.json", WEIGHTS_FILE]
    assert checkpoint.version_of(store.path(version)) == version
    assert store.path(version).is_absolute()
    for ref in (version, version[:6], "main@0"):
        assert store.get(ref) == draft
    store.verify(version)


def test_the_same_content_is_the_same_version(store: DraftStore, checkpoints: list[Path]) -> None:
    first = add(store, checkpoints[0])
    assert add(store, checkpoints[0], lineage="other", now_ms=99) == first
    assert store.list() == [first]


def test_numbers_count_up_in_a_lineage(store: DraftStore, checkpoints: list[Path]) -> None:
    first = add(store, checkpoints[0])
    second = add(store, checkpoints[1], parent=first.version, origin=DraftOrigin.TRAINED)
    other = add(store, checkpoints[2], lineage="domain-b", parent=first.version)
    assert [(draft.lineage, draft.number) for draft in store.list()] == [("domain-b", 0), ("main", 0), ("main", 1)]
    assert store.list("main") == [first, second]
    assert store.get("domain-b@0") == other
    assert store.get("main@1").parent == first.version


def test_writers_at_the_same_time_get_different_numbers(
    store: DraftStore, checkpoints: list[Path], tmp_path: Path
) -> None:
    threads = [
        threading.Thread(target=add, args=(DraftStore(tmp_path / "drafts"), staged))
        for staged in checkpoints
        for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(draft.number for draft in store.list("main")) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "ref",
    ["abc", "", "..", "../drafts", "/etc/passwd", "A" * 64, "main@", "main@x", "main@7", "Main@0", "f" * 64, "a\0b"],
)
def test_a_reference_that_names_nothing_is_refused(store: DraftStore, checkpoints: list[Path], ref: str) -> None:
    add(store, checkpoints[0])
    with pytest.raises(Refused):
        store.get(ref)


def test_a_prefix_must_name_one_draft(store: DraftStore, checkpoints: list[Path], tmp_path: Path) -> None:
    draft = add(store, checkpoints[0])
    twin = draft.version[:8] + "0" * 56
    copy = tmp_path / "drafts" / twin
    copy.mkdir()
    (copy / "draft.json").write_text(
        json.dumps({**json.loads((store.path(draft.version) / "draft.json").read_text()), "version": twin})
    )
    with pytest.raises(Refused, match="2 drafts begin with"):
        store.get(draft.version[:8])
    assert store.get(draft.version) == draft


@pytest.mark.parametrize("version", ["..", "../../etc", "a" * 63, "a" * 64])
def test_paths_stay_below_the_root(store: DraftStore, version: str) -> None:
    with pytest.raises(Refused):
        store.path(version)


def test_symlinks_are_not_followed(store: DraftStore, checkpoints: list[Path], tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / CONFIG_FILE).write_bytes((checkpoints[0] / CONFIG_FILE).read_bytes())
    (staged / WEIGHTS_FILE).symlink_to(checkpoints[0] / WEIGHTS_FILE)
    with pytest.raises(Refused, match="symbolic link"):
        add(store, staged)
    linked = tmp_path / "drafts" / ("a" * 64)
    linked.symlink_to(checkpoints[0])
    with pytest.raises(NotFound):
        store.path("a" * 64)
    assert store.list() == []


def test_a_draft_for_another_target_or_a_broken_one_leaves_nothing_behind(
    store: DraftStore, checkpoints: list[Path], tmp_path: Path
) -> None:
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / CONFIG_FILE).write_bytes((checkpoints[0] / CONFIG_FILE).read_bytes())
    raw = (checkpoints[0] / WEIGHTS_FILE).read_bytes()
    (staged / WEIGHTS_FILE).write_bytes(raw[: len(raw) // 2])
    good = Evaluation("f" * 64, 3, (), (), (), ())
    attempts: list[tuple[Path, dict[str, Any]]] = [
        (staged, {}),
        (tmp_path / "missing", {}),
        (checkpoints[0], {"target": replace(TARGET, hidden=64)}),
        (checkpoints[0], {"evaluation": good}),
        (checkpoints[0], {"lineage": "../x"}),
        (checkpoints[0], {"parent": "x"}),
    ]
    for directory, changes in attempts:
        with pytest.raises(Refused):
            add(store, directory, **changes)
    assert files(tmp_path / "drafts") in ([], [".lock"])


def test_a_full_disk_is_unavailable_and_leaves_nothing_behind(
    store: DraftStore, checkpoints: list[Path], tmp_path: Path
) -> None:
    """A file size limit stands for the full disk: the same write fails in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(Unavailable, match="free space"):
            add(store, checkpoints[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "drafts") == [".lock"]
    assert add(store, checkpoints[0]).number == 0


def test_what_a_killed_writer_left_is_swept_and_never_seen(
    store: DraftStore, checkpoints: list[Path], tmp_path: Path
) -> None:
    left = tmp_path / "drafts" / ".staging-1"
    left.mkdir()
    (left / WEIGHTS_FILE).write_bytes(b"half")
    assert store.list() == []
    add(store, checkpoints[0])
    assert not left.exists()


def test_a_flipped_bit_on_disk_is_found_before_a_deployment(store: DraftStore, checkpoints: list[Path]) -> None:
    version = add(store, checkpoints[0]).version
    weights = store.path(version) / WEIGHTS_FILE
    raw = bytearray(weights.read_bytes())
    raw[-1000] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(Refused):
        store.verify(version)


def test_quarantine_stays_with_its_first_reason(store: DraftStore, checkpoints: list[Path], tmp_path: Path) -> None:
    version = add(store, checkpoints[0]).version
    assert store.quarantine(version, "acceptance fell").quarantined == "acceptance fell"
    store.quarantine(version, "again")
    again = DraftStore(tmp_path / "drafts")
    assert again.get(version).quarantined == "acceptance fell"
    assert add(again, checkpoints[0]).quarantined == "acceptance fell"
    store.verify(version)
    with pytest.raises(NotFound):
        store.quarantine("a" * 64, "x")


@pytest.mark.parametrize("record", ['{"v": 2}', "not json", "[]", '{"v": 1, "version": "x"}'])
def test_an_unreadable_record_is_refused_and_left_out_of_lists(
    store: DraftStore, checkpoints: list[Path], record: str
) -> None:
    kept = add(store, checkpoints[1])
    version = add(store, checkpoints[0]).version
    (store.path(version) / "draft.json").write_text(record)
    with pytest.raises(Refused):
        store.get(version)
    assert store.list() == [kept]


def test_a_root_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TideError, match="draft store failed"):
        DraftStore(tmp_path / "file" / "drafts")
