"""Which rows belong together and when they are due: no IO, a clock of the test's own."""

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tided.model.engines import TapTotals
from tided.services.assembly import Assembly, Limits, Plan, SeenChunks
from tided.store.ledger import Seen
from tided.store.samples import Run
from tided.wire.samples import End, RequestRef, SampleHeader, Segment

LIMITS = Limits(shard_rows=100, shard_age_s=10.0, hold_s=60.0, hold_bytes=1 << 20)
H = 4


def group_of(request: str) -> bytes:
    return request.encode().ljust(16, b".")


class Stream:
    """Builds the chunks of one producer. A row's token id is its position."""

    def __init__(self, incarnation: str = "i-1") -> None:
        self.incarnation = incarnation
        self.seq = 0
        self.rows = 0

    def chunk(
        self,
        *segments: tuple[str, int, int],
        ends: Sequence[str] = (),
        tail: tuple[int, ...] = (),
        dtype: str = "bfloat16",
    ) -> tuple[str, int, SampleHeader, bytes]:
        names = list(dict.fromkeys([name for name, _, _ in segments] + list(ends)))
        ids = [position + i for _, position, rows in segments for i in range(rows)]
        kind = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[dtype]
        payload = np.repeat(np.array(ids, dtype=kind), 3 * H).tobytes()
        header = SampleHeader(
            engine="e1",
            incarnation=self.incarnation,
            seq=self.seq,
            target="ab" * 32,
            dtype=dtype,
            rows=len(ids),
            states=3,
            hidden=H,
            has_last=False,
            ids=np.array(ids, dtype="<i4").tobytes(),
            requests=tuple(RequestRef(name, 2, group_of(name)) for name in names),
            segments=tuple(Segment(names.index(name), position, rows) for name, position, rows in segments),
            ends=tuple(End(names.index(name), "stop", tail) for name in ends),
            totals=TapTotals(self.rows + len(ids), self.rows),
            payload_bytes=len(payload),
            crc32=zlib.crc32(payload),
            at_ms=0,
        )
        self.seq += 1
        self.rows += len(ids)
        return f"{self.incarnation}-{header.seq}", len(payload), header, payload


def runs_of(plan: Plan | None) -> list[Run]:
    assert plan is not None
    return [run for runs in plan.runs.values() for run in runs]


def shape(run: Run) -> tuple[str, int, int, list[int]]:
    return run.request, run.first_position, run.rows, [int(token) for token in run.ids]


def test_a_request_over_several_chunks_is_one_run_with_its_labels() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 3), ("b", 0, 1)), 0.0)
    assembly.add(*stream.chunk(("b", 1, 2), ("a", 3, 2), ends=["a"], tail=(5, 6, 7)), 1.0)
    assert assembly.due(5.0) is None
    plan = assembly.due(11.0)
    assert [shape(run) for run in runs_of(plan)] == [("a", 0, 5, [0, 1, 2, 3, 4, 5, 6])]
    assert plan is not None
    assert [(chunk.seq, chunk.stored) for chunk in plan.acknowledgements["i-1"]] == [(0, ((0, 3),)), (1, ((1, 2),))]
    assert assembly.written(plan) == []  # b is in both chunks and goes on
    rest = assembly.due(12.0, everything=True)
    assert [shape(run) for run in runs_of(rest)] == [("b", 0, 3, [0, 1, 2])]
    assert rest is not None
    assert assembly.written(rest) == [("i-1", 0), ("i-1", 1)]
    assert assembly.held_bytes == 0


def test_while_a_question_waits_ended_requests_are_due_soon_and_say_since_when() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 3), ends=["a"]), 5.0)
    assembly.add(*stream.chunk(("b", 0, 3), ends=["b"]), 6.0)
    assert assembly.due(7.0) is None
    assembly.pressed = True
    assert assembly.due(5.9) is None
    plan = assembly.due(6.0)
    assert plan is not None
    assert (len(runs_of(plan)), plan.since_s) == (2, 5.0)


def test_a_gap_ends_a_run_and_only_the_last_has_the_tail() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 128, 3), ("a", 140, 2), ends=["a"], tail=(142,)), 0.0)
    found = [shape(run) for run in runs_of(assembly.due(10.0))]
    assert found == [("a", 128, 3, [128, 129, 130]), ("a", 140, 2, [140, 141, 142])]


def test_a_lost_chunk_is_a_gap() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 3)), 0.0)
    stream.chunk(("a", 3, 3))
    assembly.add(*stream.chunk(("a", 6, 3), ends=["a"]), 0.0)
    assert [(run.first_position, run.rows) for run in runs_of(assembly.due(10.0))] == [(0, 3), (6, 3)]


def test_chunks_that_arrive_out_of_order_are_put_in_order() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    first, second = stream.chunk(("a", 0, 3)), stream.chunk(("a", 3, 2), ends=["a"])
    assembly.add(*second, 0.0)
    assembly.add(*first, 0.0)
    assert [shape(run) for run in runs_of(assembly.due(10.0))] == [("a", 0, 5, [0, 1, 2, 3, 4])]


def test_enough_rows_of_ended_requests_are_due_at_once() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 99), ("open", 0, 200), ends=["a"]), 0.0)
    assert assembly.due(0.0) is None
    assembly.add(*stream.chunk(("b", 0, 1), ends=["b"]), 0.0)
    assert [run.request for run in runs_of(assembly.due(0.0))] == ["a", "b"]


def test_a_request_that_does_not_end_is_due_after_the_hold() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 5)), 0.0)
    assert assembly.due(59.0) is None
    plan = assembly.due(60.0)
    assert [shape(run) for run in runs_of(plan)] == [("a", 0, 5, [0, 1, 2, 3, 4])]
    assert plan is not None
    assembly.written(plan)
    assembly.add(*stream.chunk(("a", 5, 2), ends=["a"]), 60.0)
    assert [run.first_position for run in runs_of(assembly.due(70.0))] == [5]


def test_bytes_bound_what_is_held() -> None:
    assembly, stream = Assembly(Limits(10**6, 100.0, hold_bytes=2000)), Stream()
    assembly.add(*stream.chunk(("a", 0, 50)), 0.0)
    assert assembly.due(0.0) is None
    assert not assembly.full
    assembly.add(*stream.chunk(("a", 50, 50)), 0.0)
    assert assembly.full
    assert [run.rows for run in runs_of(assembly.due(0.0))] == [100]


def test_a_chunk_of_totals_alone_is_acknowledged_without_a_shard() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(), 0.0)
    plan = assembly.due(0.0)
    assert plan is not None
    assert plan.runs == {}
    assert assembly.written(plan) == [("i-1", 0)]
    assert assembly.due(0.0) is None


def test_parts_that_an_earlier_collector_stored_are_not_taken_again() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 3), ("b", 0, 2), ends=["a", "b"]), 0.0, frozenset({0}))
    plan = assembly.due(10.0)
    assert [run.request for run in runs_of(plan)] == ["b"]
    assert plan is not None
    assert assembly.written(plan) == [("i-1", 0)]


def test_requests_of_a_dead_producer_are_over() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 3)), 0.0)
    assembly.end_incarnation("i-2", 1.0)
    assert assembly.due(20.0) is None
    assembly.end_incarnation("i-1", 1.0)
    assert len(runs_of(assembly.due(11.0))) == 1


def test_nothing_changes_until_the_plan_was_written() -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 0, 3), ends=["a"]), 0.0)
    first, second = assembly.due(10.0), assembly.due(10.0)
    assert [shape(run) for run in runs_of(first)] == [shape(run) for run in runs_of(second)]
    assert assembly.holds_chunk("i-1", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_become_bfloat16(dtype: str) -> None:
    assembly, stream = Assembly(LIMITS), Stream()
    assembly.add(*stream.chunk(("a", 1, 2), ends=["a"], dtype=dtype), 0.0)
    bits = runs_of(assembly.due(10.0))[0].states[0][:, 0, 0]
    assert list(bits) == ([1, 2] if dtype == "bfloat16" else [0x3F80, 0x4000])


@given(st.lists(st.integers(0, 200), max_size=300))
def test_the_set_of_seen_chunks_forgets_none(numbers: list[int]) -> None:
    seen = SeenChunks(Seen(0, frozenset(), {}))
    for number in numbers:
        seen.add(number)
    assert all((number in seen) == (number in numbers) for number in range(250))
