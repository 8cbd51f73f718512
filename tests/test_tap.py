"""The tap without a server: what it takes, merges, splits, sheds and counts, and that it never raises into an engine."""

import logging
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.dataplane import HIDDEN, STATES, settings, states_of
from tests.device import DEVICE
from tided.engine.tap import MAX_REQUESTS, Slot, Tap, TapSettings
from tided.model.engines import TapTotals
from tided.model.errors import Refused
from tided.model.ids import prompt_group
from tided.wire.samples import CHUNK_BYTES, End, RequestRef, Segment

ROW_BYTES = STATES * HIDDEN * 2


def capturing(slots: int = 4, flush_s: float = 10.0) -> Tap:
    tap = Tap(settings(slots=slots, flush_s=flush_s), pinned=DEVICE != "cpu")
    tap.set_capture(True, 1 << 20)
    return tap


def taken(tap: Tap) -> Slot:
    slot = tap.take(1.0)
    assert slot is not None
    return slot


def values(slot: Slot) -> list[int]:
    rows = torch.frombuffer(bytearray(slot.payload(ROW_BYTES)), dtype=torch.bfloat16).view(-1, STATES, HIDDEN)
    assert (rows == rows[:, :1, :1]).all()
    return [int(value) for value in rows[:, 0, 0]]


def record(tap: Tap, *segments: tuple[str, int, int]) -> None:
    ids = [position + i for _, position, rows in segments for i in range(rows)]
    tap.record(segments, ids, states_of(ids))


def test_rows_ids_and_positions_stay_together() -> None:
    tap = capturing()
    tap.begin("a", [1, 2, 3], False)
    tap.begin("b", [4], False)
    record(tap, ("a", 0, 3), ("b", 0, 1))
    record(tap, ("a", 3, 2), ("b", 1, 1))
    tap.end("a", "stop", [99])
    tap.flush()
    slot = taken(tap)
    assert values(slot) == [0, 1, 2, 0, 3, 4, 1]
    assert list(slot.ids[: slot.rows]) == [0, 1, 2, 0, 3, 4, 1]
    assert slot.segments == [Segment(0, 0, 3), Segment(1, 0, 1), Segment(0, 3, 2), Segment(1, 1, 1)]
    group = prompt_group(torch.tensor([1, 2, 3], dtype=torch.int32).numpy().tobytes())
    assert slot.requests[0] == RequestRef("a", 3, group)
    assert slot.ends == [End(0, "stop", (99,))]


def test_what_continues_is_merged_and_a_jump_is_a_gap() -> None:
    tap = capturing()
    tap.begin("a", [1], False)
    record(tap, ("a", 0, 2))
    record(tap, ("a", 2, 2))
    record(tap, ("a", 128, 1))
    tap.flush()
    assert taken(tap).segments == [Segment(0, 0, 4), Segment(0, 128, 1)]


def test_a_record_over_a_slot_boundary_is_split_and_nothing_is_lost() -> None:
    tap = capturing(slots=3)
    capacity = tap.settings.slot_rows
    tap.begin("a", [1], False)
    ids = [i % 251 for i in range(capacity + 5)]
    tap.record([("a", 10, capacity + 5)], ids, states_of(ids))
    tap.flush()
    first, second = taken(tap), taken(tap)
    assert (first.segments, second.segments) == ([Segment(0, 10, capacity)], [Segment(0, 10 + capacity, 5)])
    assert values(first) + values(second) == ids
    assert second.requests == first.requests


def test_a_chunk_is_whole_rows_just_under_the_wire_size() -> None:
    smollm = TapSettings("e1", "i-1", "ab" * 32, states=4, hidden=576)
    assert CHUNK_BYTES - smollm.row_bytes < smollm.slot_rows * smollm.row_bytes <= CHUNK_BYTES


def test_a_full_ring_sheds_and_counts_exactly() -> None:
    tap = capturing(slots=2)
    capacity = tap.settings.slot_rows
    tap.begin("a", [1], False)
    ids = [0] * (2 * capacity + 7)
    tap.record([("a", 0, len(ids))], ids, states_of(ids))
    assert tap.totals() == TapTotals(tapped=len(ids), sent=0, shed=7, ring=2 * capacity)
    record(tap, ("a", len(ids), 3))
    assert tap.totals().shed == 10
    tap.give_back(taken(tap), sent=True)
    record(tap, ("a", len(ids) + 3, 3))
    assert tap.totals() == TapTotals(tapped=len(ids) + 6, sent=capacity, shed=10, ring=capacity + 3)


def test_an_end_that_finds_the_ring_full_waits_for_room() -> None:
    tap = capturing(slots=1)
    capacity = tap.settings.slot_rows
    tap.begin("a", [1], False)
    ids = [0] * capacity
    tap.record([("a", 0, capacity)], ids, states_of(ids))
    tap.end("a", "length", [7])
    full = taken(tap)
    assert full.ends == []
    tap.give_back(full, sent=True)
    tap.flush()
    late = taken(tap)
    assert (late.rows, late.ends) == (0, [End(0, "length", (7,))])
    assert late.requests == [RequestRef("a", 1, late.requests[0].group)]


def test_only_requests_that_begin_while_capture_is_on_are_tapped() -> None:
    tap = Tap(settings())
    tap.begin("before", [1], False)
    tap.set_capture(True, 1 << 20)
    record(tap, ("before", 0, 4))
    tap.begin("during", [1], False)
    tap.set_capture(False, 0)
    record(tap, ("during", 0, 3))
    tap.begin("after", [1], False)
    record(tap, ("after", 0, 2))
    assert tap.totals().tapped == 3
    assert not tap.capturing


def test_opted_out_rows_are_counted_and_never_copied() -> None:
    tap = capturing()
    tap.begin("a", [1], False)
    tap.begin("secret", [9], True)
    record(tap, ("a", 0, 2), ("secret", 0, 3), ("a", 2, 1))
    tap.end("secret", "stop", [9])
    tap.flush()
    slot = taken(tap)
    assert values(slot) == [0, 1, 2]
    assert [ref.request for ref in slot.requests] == ["a"]
    assert slot.ends == []
    assert tap.totals() == TapTotals(tapped=3, ring=3, skipped=3)


def test_more_requests_than_a_header_may_name_go_to_several_chunks() -> None:
    tap = capturing(slots=8)
    names = [f"r{i}" for i in range(MAX_REQUESTS + 50)]
    for name in names:
        tap.begin(name, [1], False)
    record(tap, *[(name, 0, 1) for name in names])
    tap.flush()
    slots = [taken(tap), taken(tap)]
    assert [ref.request for slot in slots for ref in slot.requests] == names
    assert tap.totals() == TapTotals(tapped=len(names), ring=len(names))


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        ([1, 2, 3], torch.zeros(2, STATES, HIDDEN)),
        ([1, 2], torch.zeros(2, STATES, HIDDEN)),
        ([1, 2, 3], torch.zeros(3, STATES, HIDDEN + 1)),
        (["x", "y", "z"], torch.zeros(3, STATES, HIDDEN)),
        ([1, 2, 2**40], torch.zeros(3, STATES, HIDDEN)),
    ],
)
def test_a_fault_costs_its_rows_only_and_is_logged_once(
    ids: list[int], rows: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    tap = capturing()
    tap.begin("a", [1], False)
    with caplog.at_level(logging.ERROR):
        tap.record([("a", 0, 3)], ids, rows)
        tap.record([("a", 3, 3)], ids, rows)
    assert tap.errors == 2
    assert len(caplog.records) == 1
    record(tap, ("a", 6, 2))
    totals = tap.totals()
    assert (totals.shed, totals.ring, totals.tapped) == (totals.tapped - 2, 2, totals.shed + 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numpy_arrays_and_bytes_give_the_rows_that_tensors_give(dtype: str) -> None:
    plain = TapSettings("e1", "i-1", "ab" * 32, states=STATES, hidden=HIDDEN, dtype=dtype, ring_slots=2)
    ids = [i % 251 for i in range(plain.slot_rows + 9)]
    tensor = states_of(ids).to(getattr(torch, dtype)).contiguous()
    host = tensor.cpu()
    array: Any = host.view(torch.int16).numpy().view("<u2") if dtype == "bfloat16" else host.numpy()
    payloads: list[bytes] = []
    for rows in (tensor, array, array.tobytes(), memoryview(array), bytearray(array.tobytes())):
        tap = Tap(plain)
        tap.set_capture(True, 1 << 20)
        tap.begin("a", [1], False)
        tap.record([("a", 0, 3), ("other", 0, 4), ("a", 3, len(ids) - 7)], ids, rows)
        tap.flush()
        assert tap.errors == 0
        payloads.append(b"".join(bytes(taken(tap).payload(plain.row_bytes)) for _ in range(2)))
    want = array[[i for i in range(len(ids)) if not 3 <= i < 7]].tobytes()
    assert payloads == [want] * 5


WRONG_BUFFERS: dict[str, Any] = {
    "dtype": np.zeros((3, STATES, HIDDEN), "<f2"),
    "flat": np.zeros((3, STATES * HIDDEN), "<u2"),
    "transposed": np.zeros((3, HIDDEN, STATES), "<u2"),
    "big-endian": np.zeros((3, STATES, HIDDEN), ">u2"),
    "strided": np.zeros((6, STATES, HIDDEN), "<u2")[::2],
    "short": np.zeros((2, STATES, HIDDEN), "<u2"),
    "bytes": bytes(3 * ROW_BYTES - 1),
    "list": [[0.0]],
    "text": "text",
}


@pytest.mark.parametrize("name", sorted(WRONG_BUFFERS))
def test_a_buffer_that_is_not_what_the_tap_holds_costs_its_rows_only(name: str) -> None:
    tap = capturing()
    tap.begin("a", [1], False)
    tap.record([("a", 0, 3)], [1, 2, 3], WRONG_BUFFERS[name])
    assert tap.errors == 1
    assert tap.totals() == TapTotals(tapped=3, shed=3)


def test_a_tap_without_torch_takes_rows() -> None:
    code = (
        "import sys; from tided.engine.tap import Tap, TapSettings\n"
        f"tap = Tap(TapSettings('e1', 'i-1', {'ab' * 32!r}, 3, 8)); tap.set_capture(True, 1 << 20)\n"
        "tap.begin('a', [1], False); tap.record([('a', 0, 2)], [1, 2], bytes(2 * 48)); assert tap.totals().ring == 2\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_id_that_the_wire_refuses_is_not_tapped() -> None:
    tap = capturing()
    tap.begin("r" * 300, [1], False)
    record(tap, ("r" * 300, 0, 2))
    assert tap.totals().tapped == 0
    assert tap.errors == 1


def test_an_old_slot_is_handed_over_by_itself() -> None:
    tap = capturing(flush_s=0.02)
    tap.begin("a", [1], False)
    record(tap, ("a", 0, 2))
    assert taken(tap).rows == 2
    assert tap.take(0.0) is None


def test_a_waiting_publisher_is_woken_by_the_first_row() -> None:
    tap = capturing(flush_s=0.01)
    tap.begin("a", [1], False)
    got: list[Slot | None] = []
    thread = threading.Thread(target=lambda: got.append(tap.take(10.0)))
    thread.start()
    record(tap, ("a", 0, 2))
    thread.join(5.0)
    assert got[0] is not None
    assert got[0].rows == 2


@pytest.mark.parametrize("bad", [{"engine": "E 1"}, {"incarnation": ""}, {"target": "x"}])
def test_settings_that_the_collector_would_refuse_are_refused_at_once(bad: dict[str, str]) -> None:
    plain = {"engine": "e1", "incarnation": "i-1", "target": "ab" * 32, **bad}
    with pytest.raises(Refused):
        Tap(TapSettings(plain["engine"], plain["incarnation"], plain["target"], states=3, hidden=8))


def test_the_engine_side_modules_import_without_torch() -> None:
    modules = "tided.engine.tap, tided.engine.publisher, tided.engine.agent"
    code = f"import {modules}, sys; assert not {{'torch', 'numpy', 'pydantic', 'structlog'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
