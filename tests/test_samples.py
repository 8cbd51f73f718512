"""Shards at rest: all or nothing, one counted reason for every row that leaves, and the held-out side for ever (promise 1)."""

import json
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tided.draft.tensors import read_header
from tided.model.errors import Conflict, Unavailable
from tided.store.samples import Discarded, Reason, Run, SampleStore, Source, Split, StoreLedger

TARGET = "ab" * 32
SOURCE = Source("e1", TARGET, 3, 4, has_last=False)
FRACTION = 0.3


def make(root: Path, *, max_bytes: int = 1 << 30, max_age_s: float = 3600.0) -> SampleStore:
    return SampleStore(root, FRACTION, max_bytes, max_age_s)


def run_of(store: SampleStore, split: Split, rows: int = 10, name: str = "r") -> Run:
    """A run whose prompt is on the wanted side of the split."""
    group = next(g for i in range(1000) if store.split_of(g := i.to_bytes(16, "big")) is split)
    states = np.arange(rows * 12, dtype=np.uint16).reshape(rows, 3, 4)
    return Run(name, group, 5, 2, np.arange(rows + 2, dtype=np.int32), (states[:4], states[4:]))


def put(store: SampleStore, split: Split, rows: int = 10, source: Source = SOURCE) -> None:
    store.publish(store.commit({source: [run_of(store, split, rows)]}, receipt={}))


def adds_up(ledger: StoreLedger) -> bool:
    gone = ledger.trained + ledger.expired + ledger.purged + ledger.over_budget
    return ledger.stored == gone + ledger.held_out + ledger.waiting


def test_a_commit_is_invisible_until_it_is_published(tmp_path: Path) -> None:
    store = make(tmp_path)
    both = [run_of(store, Split.TRAIN, 10), run_of(store, Split.HELD_OUT, 7)]
    commit = store.commit({SOURCE: both}, receipt={"n": 1})
    assert store.shards(Split.TRAIN) == store.shards(Split.HELD_OUT) == ()
    assert [found.receipt for found in make(tmp_path).unpublished()] == [{"n": 1}]
    store.publish(commit)
    assert (store.rows(Split.TRAIN), store.rows(Split.HELD_OUT)) == (10, 7)
    assert store.unpublished() == []


def test_a_shard_has_the_documented_format(tmp_path: Path) -> None:
    store = make(tmp_path)
    put(store, Split.TRAIN)
    (shard,) = store.shards(Split.TRAIN)
    header = read_header(shard.path)
    assert {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()} == {
        "states": ("BF16", (10, 3, 4)),
        "ids": ("I32", (12,)),
        "run_rows": ("I32", (1,)),
        "run_ids": ("I32", (1,)),
        "first_position": ("I32", (1,)),
        "prompt_tokens": ("I32", (1,)),
        "groups": ("U8", (1, 16)),
    }
    assert header.metadata["schema"] == "1"
    assert json.loads(header.metadata["requests"]) == ["r"]
    assert (shard.rows, shard.runs, shard.engine, shard.target, shard.has_last) == (10, 1, "e1", TARGET, False)


def test_a_shard_says_since_when_its_requests_ended(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.publish(store.commit({SOURCE: [run_of(store, Split.TRAIN)]}, receipt={}, age_s=2.5))
    (shard,) = store.shards(Split.TRAIN)
    assert shard.created_ms - shard.since_ms == 2500


def test_everything_is_for_one_user_alone(tmp_path: Path) -> None:
    store = make(tmp_path / "state" / "samples")
    put(store, Split.TRAIN)
    store.purge()
    put(store, Split.HELD_OUT)
    os.close(store.lock_writer())
    paths = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}


def test_publishing_again_after_half_of_it_was_done_is_harmless(tmp_path: Path) -> None:
    store = make(tmp_path)
    commit = store.commit({SOURCE: [run_of(store, Split.TRAIN), run_of(store, Split.HELD_OUT)]}, receipt={})
    half = next(commit.path.glob("train.*"))
    half.rename(tmp_path / "train" / half.name.split(".", 1)[1])
    for found in make(tmp_path).unpublished():
        store.publish(found)
    assert (len(store.shards(Split.TRAIN)), len(store.shards(Split.HELD_OUT))) == (1, 1)


def test_a_prompt_never_changes_sides(tmp_path: Path) -> None:
    store = make(tmp_path)
    groups = [os.urandom(16) for _ in range(4000)]
    held = [group for group in groups if store.split_of(group) is Split.HELD_OUT]
    assert 0.25 < len(held) / len(groups) < 0.35
    wider = SampleStore(tmp_path, 0.4, 1, 1)
    assert all(wider.split_of(group) is Split.HELD_OUT for group in held)


def test_each_reason_is_counted_and_the_ledger_adds_up(tmp_path: Path) -> None:
    store = make(tmp_path)
    for rows in (1, 2, 4, 8):
        put(store, Split.TRAIN, rows + 4)
    put(store, Split.HELD_OUT, 16)
    first, second, *_ = store.shards(Split.TRAIN)
    assert store.consume([first.path, str(second.path), tmp_path / "train" / "gone.safetensors"]).rows == 5 + 6
    assert store.consume([first.path]) == Discarded()
    ledger = store.ledger()
    assert ledger == StoreLedger(stored=47, trained=11, expired=0, purged=0, over_budget=0, held_out=16, waiting=20)
    assert store.purge("another") == Discarded()
    assert store.purge("e1").rows == 36
    assert store.ledger() == StoreLedger(47, trained=11, expired=0, purged=36, over_budget=0, held_out=0, waiting=0)
    assert make(tmp_path).ledger() == store.ledger()


def test_held_out_shards_are_not_consumed(tmp_path: Path) -> None:
    store = make(tmp_path)
    put(store, Split.HELD_OUT)
    assert store.consume([shard.path for shard in store.shards(Split.HELD_OUT)]) == Discarded()
    assert store.rows(Split.HELD_OUT) == 10


def test_what_is_too_old_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path, max_age_s=60.0)
    put(store, Split.TRAIN)
    put(store, Split.HELD_OUT)
    assert store.prune()[Reason.EXPIRED] == Discarded()
    later_ns = time.time_ns() + 61 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later_ns)
    assert store.prune()[Reason.EXPIRED].rows == 20
    assert store.ledger().expired == 20


def test_over_the_budget_the_oldest_go_and_held_out_has_its_own_share(tmp_path: Path) -> None:
    store = make(tmp_path)
    for _ in range(4):
        put(store, Split.TRAIN, 100)
    put(store, Split.HELD_OUT, 10)
    shards = store.shards(Split.TRAIN)
    tight = make(tmp_path, max_bytes=int(2.5 * shards[0].bytes / 0.75))
    assert tight.prune()[Reason.OVER_BUDGET].rows == 200
    assert tight.shards(Split.TRAIN) == shards[2:]
    assert tight.rows(Split.HELD_OUT) == 10
    assert adds_up(tight.ledger())


def test_shards_are_listed_oldest_first_and_by_target_and_engine(tmp_path: Path) -> None:
    store = make(tmp_path)
    other = Source("e2", "cd" * 32, 3, 4, has_last=False)
    for source in (SOURCE, other, SOURCE):
        put(store, Split.TRAIN, 10, source)
    assert [shard.engine for shard in store.shards(Split.TRAIN)] == ["e1", "e2", "e1"]
    assert [shard.engine for shard in store.shards(Split.TRAIN, target="cd" * 32)] == ["e2"]
    assert len(store.shards(Split.TRAIN, engine="e1")) == 2


def test_a_second_collector_on_the_same_root_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path)
    held = store.lock_writer()
    with pytest.raises(Conflict, match="another tided-collector"):
        make(tmp_path).lock_writer()
    os.close(held)
    os.close(make(tmp_path).lock_writer())


def test_what_never_became_durable_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    store = make(tmp_path)
    (tmp_path / "staging" / "tmp-commit-1").mkdir()
    (tmp_path / "staging" / "tmp-commit-1" / "train.s-1.safetensors").write_bytes(b"half")
    os.close(store.lock_writer())
    assert list((tmp_path / "staging").iterdir()) == []


@contextmanager
def full_disk() -> Generator[None]:
    """Every write of this process fails: the smallest file size limit that there is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_unavailable_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = make(tmp_path)
    put(store, Split.TRAIN)
    with full_disk(), pytest.raises(Unavailable, match="free space"):
        store.commit({SOURCE: [run_of(store, Split.TRAIN)]}, receipt={})
    assert store.unpublished() == []
    assert list((tmp_path / "staging").iterdir()) == []
    assert store.ledger().waiting == 10


def test_an_unreadable_shard_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    store = make(tmp_path)
    put(store, Split.TRAIN)
    bad = tmp_path / "train" / "s-0.safetensors"
    bad.write_bytes(b"\xff" * 100)
    assert store.rows(Split.TRAIN) == 10
    assert not bad.exists()
    assert bad.with_suffix(".bad").exists()


_CONSUME = """
import sys; from pathlib import Path; from tests.test_samples import make; from tided.store.samples import Split
store = make(Path(sys.argv[1])); store.consume([shard.path for shard in store.shards(Split.TRAIN)])
"""


def test_kill_9_between_counting_and_deleting_neither_loses_nor_doubles_the_count(tmp_path: Path) -> None:
    store = make(tmp_path)
    for _ in range(3):
        put(store, Split.TRAIN)
    environment = {**os.environ, "TIDED_FAILPOINT": "samples.discarding"}
    process = subprocess.run([sys.executable, "-c", _CONSUME, str(tmp_path)], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "train").iterdir())) == 3
    assert store.shards(Split.TRAIN) == ()
    assert store.ledger() == StoreLedger(30, trained=30, expired=0, purged=0, over_budget=0, held_out=0, waiting=0)
    assert list((tmp_path / "train").iterdir()) == []
    put(store, Split.TRAIN)
    assert (store.ledger().stored, store.ledger().waiting) == (40, 10)


def _consume_all(root: Path) -> None:
    store = make(root)
    store.consume([shard.path for shard in store.shards(Split.TRAIN)])


def test_processes_that_discard_the_same_shards_count_them_once(tmp_path: Path) -> None:
    store = make(tmp_path)
    for _ in range(20):
        put(store, Split.TRAIN)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_consume_all, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert store.ledger() == StoreLedger(200, trained=200, expired=0, purged=0, over_budget=0, held_out=0, waiting=0)
