"""The plugin's parts without vLLM: rows onto the tap, V2's arguments, counts, schedule, boundary, opting out, the command line."""

import json
import queue
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.ctl_run import tidectl
from tests.device import DEVICE
from tests.support import eventually
from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.engine.plugin import Faults, plain_temperature
from tided.engine.tap import Tap, TapSettings
from tided.engine.vllm import counts as vllm_counts
from tided.engine.vllm import worker
from tided.engine.vllm.boundary import StepBoundary
from tided.engine.vllm.capture import Capture, Ending, StepRows
from tided.engine.vllm.counts import Schedule, SchedulerCounts
from tided.engine.vllm.optout import EXTRA_ARGUMENT, MARK, NoCapture, opted_out
from tided.engine.vllm.packing import exchange, repack
from tided.engine.vllm.remote import RemoteTap
from tided.engine.vllm.sampling import expand, mend
from tided.engine.vllm.settings import VllmSettings
from tided.engine.vllm.worker import AttachRequest, Status
from tided.model.engines import TapTotals
from tided.model.errors import Refused, Unavailable

HIDDEN = 4
WAKEUP = ("wake up", None)


def make_tap(*, last: bool = False) -> Tap:
    settings = TapSettings("e", "i", "ab" * 32, 3 + int(last), HIDDEN, "float32", has_last=last, ring_slots=2)
    tap = Tap(settings, pinned=DEVICE != "cpu")
    tap.set_capture(True, 1 << 20)
    return tap


def step(
    requests: list[str], segments: list[tuple[int, list[int], int]], following: list[int], *, last: bool = False
) -> StepRows:
    """One step: for each request (first position, ids, rejected). The states of a row are its token id."""
    starts, ids, positions = [0], list[int](), list[int]()
    for first, tokens, _ in segments:
        ids += tokens
        positions += range(first, first + len(tokens))
        starts.append(len(ids))
    values = torch.tensor(ids, dtype=torch.float32, device=DEVICE)[:, None]
    return StepRows(
        requests,
        starts,
        torch.tensor([rejected for _, _, rejected in segments], device=DEVICE),
        torch.tensor(ids, device=DEVICE),
        torch.tensor(positions, device=DEVICE),
        torch.tensor(following, device=DEVICE),
        values.expand(-1, 3 * HIDDEN).contiguous(),
        values.expand(-1, HIDDEN).contiguous() if last else None,
    )


def taken(tap: Tap) -> dict[str, tuple[dict[int, int], str, tuple[int, ...]]]:
    """Request -> (position -> id, finish, tail). Checks that each row's states are its id's."""
    tap.flush()
    slot = tap.take(0.0)
    assert slot is not None
    found: dict[str, tuple[dict[int, int], str, tuple[int, ...]]] = {ref.request: ({}, "", ()) for ref in slot.requests}
    states = np.frombuffer(slot.payload(tap.settings.row_bytes), np.float32).reshape(slot.rows, -1)
    assert (states == np.array(slot.ids[: slot.rows])[:, None]).all()
    at = 0
    for segment in slot.segments:
        rows = found[slot.requests[segment.request].request][0]
        for i in range(segment.rows):
            rows[segment.position + i] = slot.ids[at + i]
        at += segment.rows
    for end in slot.ends:
        name = slot.requests[end.request].request
        found[name] = (found[name][0], end.finish, end.tail)
    return found


NEVER = Ending(1000, frozenset())


def test_rejected_tokens_are_left_out_and_the_newest_is_the_tail() -> None:
    tap = make_tap()
    capture = Capture(tap)
    capture.begin("a", [5, 6, 7], NEVER, False)
    capture.step(step(["other", "a"], [(9, [1], 0), (0, [5, 6, 7], 0)], [2, 20]))
    capture.step(step(["a"], [(3, [20, 21, 90, 91], 2)], [22]))
    capture.end("a")
    assert taken(tap) == {"a": ({0: 5, 1: 6, 2: 7, 3: 20, 4: 21}, "abort", (22,))}
    assert tap.totals().tapped == 5


@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_nothing_after_a_stop_token_among_accepted_drafts(accepted: int) -> None:
    tap = make_tap()
    capture = Capture(tap)
    capture.begin("a", [5, 99], Ending(1000, frozenset({99})), False)
    capture.step(step(["a"], [(0, [5, 99], 0)], [20]))
    capture.step(step(["a"], [(2, [20, 99, 21, 22], 3 - accepted)], [23]))
    capture.step(step(["a"], [(3 + accepted, [23, 24], 0)], [25]))
    capture.end("a")
    assert taken(tap) == {"a": ({0: 5, 1: 99, 2: 20}, "stop", (99,))}


@pytest.mark.parametrize("most", [4, 5, 6])
def test_nothing_beyond_the_length(most: int) -> None:
    tap = make_tap()
    capture = Capture(tap)
    tokens = [5, 6, 20, 21, 22, 23]
    capture.begin("a", tokens[:2], Ending(most, frozenset()), False)
    capture.step(step(["a"], [(0, tokens[:2], 0)], [20]))
    capture.step(step(["a"], [(2, tokens[2:], 0)], [24]))
    capture.end("a")
    assert taken(tap) == {"a": (dict(enumerate(tokens[: most - 1])), "length", (tokens[most - 1],))}


def test_a_preempted_request_is_recorded_once() -> None:
    """It is computed again from wherever its cache still holds, and a second beginning (V2) changes nothing."""
    tap = make_tap()
    capture = Capture(tap)
    capture.begin("a", [5, 6, 7], NEVER, False)
    capture.step(step(["a"], [(0, [5, 6], 0)], [7]))
    capture.step(step(["a"], [(2, [7], 0)], [20]))
    capture.begin("a", [5, 6, 7], NEVER, False)
    capture.step(step(["a"], [(0, [5, 6], 0)], [7]))
    capture.step(step(["a"], [(2, [7, 20, 21], 0)], [22]))
    capture.end("a")
    assert taken(tap) == {"a": ({0: 5, 1: 6, 2: 7, 3: 20, 4: 21}, "abort", (22,))}


def test_a_prefix_cache_leaves_a_gap_and_a_chunk_a_prompt_tail() -> None:
    tap = make_tap()
    capture = Capture(tap)
    capture.begin("a", [5, 6, 7, 8, 9], NEVER, False)
    capture.step(step(["a"], [(2, [7, 8], 0)], [0]))  # vLLM feeds its draft something else here
    capture.end("a")
    assert taken(tap) == {"a": ({2: 7, 3: 8}, "abort", (9,))}


def test_the_last_state_is_the_fourth_and_opted_out_rows_are_counted() -> None:
    tap = make_tap(last=True)
    capture = Capture(tap)
    capture.begin("a", [5], NEVER, False)
    capture.begin("b", [6], NEVER, True)
    capture.step(step(["a", "b"], [(0, [5], 0), (0, [6, 60], 1)], [7, 8], last=True))
    assert tap.totals().tapped == 0, "which rows count is asked for as the next step begins"
    capture.settle()
    assert taken(tap) == {"a": ({0: 5}, "", ())}
    assert tap.totals().skipped == 1


class FakeV2:
    """As much of the V2 runner as the plugin touches."""

    def __init__(self) -> None:
        self.device = torch.device(DEVICE)
        self.model_config = SimpleNamespace(max_model_len=64)
        self.speculator = SimpleNamespace(propose=self._propose)
        self.drafted = 0
        self.execute_model = self._execute

    def _execute(self, scheduler_output: Any) -> str:
        return "executed"

    def _propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        last_sampled: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> str:
        self.drafted += 1
        return "drafts"

    def get_draft_model(self) -> None:
        return None


def attached(monkeypatch: pytest.MonkeyPatch, runner: Any, tap: TapSettings) -> worker.WorkerSide:
    monkeypatch.setattr(worker, "_place", lambda: (0, 1, True))
    request = AttachRequest(tap, "redis://127.0.0.1:1/0", 0, "no-such-directory")
    return worker.WorkerSide(SimpleNamespace(model_runner=runner), request)


def v2_arguments(rejected: int) -> tuple[Any, ...]:
    batch = SimpleNamespace(
        req_ids=["a"],
        num_reqs=1,
        idx_mapping=torch.tensor([1], device=DEVICE),
        query_start_loc_np=torch.tensor([0, 3]).numpy(),
        input_ids=torch.tensor([5, 6, 7, 0], device=DEVICE),
        positions=torch.tensor([0, 1, 2, 0], device=DEVICE),
    )
    rows = torch.tensor([5.0, 6.0, 7.0, 0.0], device=DEVICE)[:, None].expand(-1, HIDDEN)
    sampled = torch.tensor([[70], [71]], device=DEVICE)
    return batch, None, None, rows, [rows, rows, rows], None, torch.tensor([rejected], device=DEVICE), sampled


def new_request(name: str, prompt: list[int]) -> SimpleNamespace:
    params = SimpleNamespace(max_tokens=4, eos_token_id=None, stop_token_ids=None, extra_args=None)
    new = SimpleNamespace(req_id=name, prompt_token_ids=prompt, sampling_params=params)
    return SimpleNamespace(finished_req_ids=set[str](), scheduled_new_reqs=[new])


def test_v2_is_tapped_but_not_in_dummy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeV2()
    side = attached(monkeypatch, runner, make_tap(last=True).settings)
    assert side.tap is not None
    assert (side.attached.runner, side.attached.taps) == ("v2", True)
    assert side.attached.swap
    side.publisher.close(0.0) if side.publisher else None
    side.tap.set_capture(True, 1 << 20)
    assert runner.execute_model(new_request("a", [5, 6])) == "executed"
    assert runner.speculator.propose(*v2_arguments(0), dummy_run=True) == "drafts"
    assert runner.speculator.propose(*v2_arguments(1), num_speculative_tokens=0) == "drafts"
    runner.execute_model(SimpleNamespace(finished_req_ids={"a"}, scheduled_new_reqs=[]))
    assert taken(side.tap) == {"a": ({0: 5, 1: 6}, "abort", (71,))}
    assert side.status().broken == ()


@pytest.mark.parametrize(("metadata", "verified"), [(2, True), (0, False), (None, False)])
def test_what_drafted_nothing_is_sampled_and_not_verified(
    monkeypatch: pytest.MonkeyPatch, metadata: int | None, verified: bool
) -> None:
    runner = SimpleNamespace(
        device=torch.device("cpu"),
        model_config=SimpleNamespace(max_model_len=64),
        drafter=SimpleNamespace(propose=lambda: None),
        execute_model=lambda output: None,
        propose_draft_token_ids=lambda hidden_states: None,
        _sample=lambda logits, spec_decode_metadata: (logits, spec_decode_metadata is not None),
        get_draft_model=lambda: None,
    )
    side = attached(monkeypatch, runner, make_tap(last=True).settings)
    side.publisher.close(0.0) if side.publisher else None
    given = SimpleNamespace(max_spec_len=metadata) if metadata is not None else None
    assert runner._sample("logits", given) == ("logits", verified)


def test_a_hook_that_fails_is_counted_and_the_step_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeV2()
    side = attached(monkeypatch, runner, make_tap().settings)
    assert runner.speculator.propose("not a batch", *v2_arguments(0)[1:]) == "drafts"
    assert runner.execute_model("not an output") == "executed"
    assert side.status().broken == (worker.TAP,)
    assert side.faults.total == 2
    side.close(0.0)


class FakeScheduler:
    """As much of the scheduler as the plugin touches."""

    def __init__(self) -> None:
        self.num_spec_tokens = 3
        self.dynamic_sd_lookup: list[int] | None = [0, 0, 1, 2, 3]
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []
        self.waiting: list[Any] = []

    def add(self, name: str, output_tokens: int) -> None:
        self.requests[name] = SimpleNamespace(
            request_id=name,
            num_output_tokens=output_tokens,
            num_prompt_tokens=8,
            prefill_stats=SimpleNamespace(num_prompt_tokens=8, num_cached_tokens=4) if name == "a" else None,
            is_finished=lambda: False,
            sampling_params=SimpleNamespace(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0),
        )

    def schedule(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_scheduled_tokens={"a": 3, "b": 3, "c": 1, "d": 5},
            scheduled_spec_decode_tokens={"a": [1, 2], "b": [3, 4]},
            num_invalid_spec_tokens=None,
        )

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "updated"

    def _free_request(self, request: Any) -> str:
        return "freed"


def test_counts_of_a_mixed_step() -> None:
    """Two requests verify two tokens, one decodes plainly, one ends its prompt: the last is no decoding."""
    scheduler, faults = FakeScheduler(), Faults()
    counts = SchedulerCounts(scheduler, faults, lambda: "v")
    for name, tokens in (("a", 3), ("b", 1), ("c", 1), ("d", 0)):
        scheduler.add(name, tokens)
    output = SimpleNamespace(
        sampled_token_ids=[[7, 8, 9], [7], [7], [7]], req_id_to_index={"a": 0, "b": 1, "c": 2, "d": 3}
    )
    assert scheduler.update_from_output(scheduler.schedule(), output) == "updated"
    vars(scheduler)["_free_request"](scheduler.requests["a"])
    steps, finished = counts.take()
    assert [(item.batch, item.gamma, item.steps, item.accepted) for item in steps] == [
        (1, 0, 1, (1,)),
        (2, 2, 1, (1, 0, 1)),
    ]
    assert all(item.seconds > 0 for item in steps)
    (stats,) = finished
    assert (stats.spec_steps, stats.drafted, stats.accepted, stats.version) == (1, 2, 2, "v")
    assert stats.temperature == 0.7
    assert stats.cached_tokens == 4
    assert counts.take() == ((), ())
    assert scheduler.update_from_output("broken", output) == "updated"
    assert faults.total == 1


def test_a_step_lasts_from_the_end_of_the_one_that_it_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM does between two steps is counted; an engine that had nothing to do is not."""
    clock = 0.0
    monkeypatch.setattr(vllm_counts, "time", SimpleNamespace(perf_counter=lambda: clock))
    scheduler = FakeScheduler()
    counts = SchedulerCounts(scheduler, Faults(), lambda: "v")
    for name in ("a", "b", "c", "d"):
        scheduler.add(name, 1)
    output = SimpleNamespace(sampled_token_ids=[[7], [7], [7], [7]], req_id_to_index={"a": 0, "b": 1, "c": 2, "d": 3})
    for scheduled_s, updated_s, running in ((10.0, 12.0, ["a"]), (13.0, 15.0, []), (99.0, 100.0, [])):
        clock = scheduled_s
        step = scheduler.schedule()
        clock, scheduler.running = updated_s, running
        scheduler.update_from_output(step, output)
    steps, _ = counts.take()
    shares = {
        1: 1 / 12,
        2: 6 / 12,
    }  # of a step's twelve tokens: "c" decodes one, "a" and "b" verify two each; "d" is at its prompt
    assert {item.batch: item.seconds for item in steps} == pytest.approx(
        {batch: share * (2.0 + 3.0 + 1.0) for batch, share in shares.items()}
    )


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"temperature": 0.0, "top_k": 0, "top_p": 0.5}, 0.0),
        ({"temperature": 0.7, "top_k": -1}, 0.7),
        ({"temperature": 0.7, "top_k": 1 << 30}, 0.7),
        ({"temperature": 1.0, "top_k": 1}, 0.0),  # what SGLang makes of temperature 0
        ({"temperature": 0.7, "top_k": 40}, None),
        ({"temperature": 0.7, "top_p": 0.9}, None),
        ({"temperature": 0.7, "min_p": 0.1}, None),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, None),
        ({"temperature": 0.7, "logit_bias": {7: 1.0}}, None),
        ({"temperature": 0.7, "structured_outputs": object()}, None),
        ({"temperature": 0.7, "json_schema": "{}"}, None),
    ],
)
def test_a_temperature_is_told_where_nothing_else_shapes_the_distribution(
    params: dict[str, Any], told: float | None
) -> None:
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    assert plain_temperature(SimpleNamespace(**{**neutral, **params})) == told


def test_values_are_spread_over_drafted_tokens() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    spread = torch.full((6,), 9.0)
    expand(spread, torch.tensor([0.7, 1.3, 0.0]), ends, 0, 1)
    assert spread.tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0, 1.0, 9.0])
    whole = torch.zeros(5, dtype=torch.int32)
    expand(whole, torch.tensor([50, 7, 9], dtype=torch.int32), ends, 0, 0, MAX_NUM_TOKENS=128)
    assert whole.tolist() == [50, 50, 9, 9, 9]
    kernels = SimpleNamespace(_expand_kernel_impl=print)
    for _ in range(2):
        mend(kernels)
        assert kernels._expand_kernel_impl is expand


def test_a_schedule_is_the_schedulers_table() -> None:
    scheduler = FakeScheduler()
    schedule = Schedule(scheduler)
    assert schedule.gammas == (0, 1, 2, 3)
    schedule.set((3, 1))
    assert scheduler.dynamic_sd_lookup == [3, 3, 1, 1, 1]
    for wrong in ((), (4,), (-1,)):
        with pytest.raises(Refused, match="whole numbers"):
            schedule.set(wrong)
    scheduler.dynamic_sd_lookup = None
    with pytest.raises(Refused, match="num_speculative_tokens_per_batch_size"):
        Schedule(scheduler).set((0,))


class FakeCore:
    """A loop like the engine core's: messages from a queue, one after the other."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.handled: list[Any] = []
        self._handle_client_request = self._handle

    def _handle(self, *message: Any) -> None:
        self.handled.append(message)

    def run(self) -> None:
        while (message := self.input_queue.get()) is not None:
            self._handle_client_request(*message)


async def test_actions_run_on_the_idle_cores_thread() -> None:
    core = FakeCore()
    boundary = StepBoundary(core, WAKEUP)
    with pytest.raises(Unavailable, match="dropped"):
        boundary.call(lambda: pytest.fail("dropped, but run"), 0.01)
    assert not boundary.work_waits()
    core.input_queue.put(("add", "request"))
    assert boundary.work_waits()
    thread = threading.Thread(target=core.run)
    thread.start()
    assert boundary.call(threading.get_ident) == thread.ident

    def fail() -> None:
        raise Refused("no")

    with pytest.raises(Refused, match="no"):
        boundary.call(fail)
    assert ("add", "request") in core.handled
    boundary.close()
    with pytest.raises(Unavailable, match="ending"):
        boundary.call(fail)
    core.input_queue.put(None)
    await eventually(lambda: not thread.is_alive())


async def test_the_header_marks_the_requests_id() -> None:
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))

    middleware = NoCapture(app)
    for headers in ([(b"x-tide-no-capture", b"1")], [(b"x-tide-no-capture", b"1"), (b"x-request-id", b"mine")], []):
        await middleware({"type": "http", "headers": headers}, None, None)
    names = [headers.get(b"x-request-id", b"").decode() for headers in seen]
    assert [opted_out(f"cmpl-{name}-0", None) for name in names] == [True, True, False]
    assert names[1] == f"{MARK}-mine"
    assert opted_out("cmpl-1", {EXTRA_ARGUMENT: 1})
    assert not opted_out("cmpl-1", {EXTRA_ARGUMENT: 0})


def test_settings() -> None:
    assert VllmSettings.from_environment({}) is None
    found = VllmSettings.from_environment({"TIDED_ENGINE": "e", "TIDED_SKIP_DRAFT_AFTER": "0"})
    assert found is not None
    assert (found.plugin.engine, found.skip_draft_after, found.mend_sampling) == ("e", 0, True)
    for name in ("TIDED_SKIP_DRAFT_AFTER", "TIDED_MEND_SAMPLING"):
        with pytest.raises(Refused, match=name):
            VllmSettings.from_environment({"TIDED_ENGINE": "e", name: "some"})


def test_engine_args_print_a_command_that_a_shell_reads(tmp_path: Path) -> None:
    target = make_target(tmp_path / "a target")
    path = tmp_path / "config.toml"
    path.write_text(
        f'[daemon]\nstate_dir = "{tmp_path / "s"}"\n[target]\npath = "{target}"\n[training]\ndraft_vocab = 64\n'
        '[engine]\nid = "v"\nport = 8123\nmax_batch = 2\ngamma_max = 4\n'
    )
    shown = tidectl("--config", str(path), "engine-args", "vllm", "--python", "/venv/bin/python")
    assert (shown.code, shown.err) == (0, "")
    as_json = json.loads(tidectl("--config", str(path), "engine-args", "vllm", "--json").out)
    environment = as_json["environment"]
    words = shlex.split(shown.out.replace("\\\n", " "))
    assert words[: len(environment)] == [f"{name}={value}" for name, value in environment.items()]
    assert words[len(environment) :] == ["/venv/bin/python", *as_json["arguments"][1:]]
    assert environment["TIDED_ENGINE"] == "v"
    options = dict(zip(words[len(environment) + 3 :: 2], words[len(environment) + 4 :: 2], strict=True))
    assert (options["--model"], options["--port"], options["--max-num-seqs"]) == (str(target), "8123", "2")
    speculation = json.loads(options["--speculative-config"])
    assert {gamma for _, _, gamma in speculation["num_speculative_tokens_per_batch_size"]} == {0, 1, 2, 3, 4}
    assert checkpoint.read_config(Path(speculation["model"])).draft_vocab == 64
    whole = make_draft(target, tmp_path / "whole", draft_vocab=VOCAB)
    refused = tidectl("--config", str(path), "engine-args", "vllm", "--draft", str(whole))
    assert refused.code == 1
    assert "vocabulary is the target's" in refused.err
    unknown = tidectl("--config", str(path), "engine-args", "nothing")
    assert unknown.code == 1
    assert "known are vllm" in unknown.err


def test_a_worker_is_asked_only_when_there_is_something_to_learn() -> None:
    steps, told = 0, [TapTotals(tapped=5, ring=5), TapTotals(tapped=5, sent=5)]
    asked: list[str] = []

    def ask(_: float, method: Callable[..., Any], *__: Any) -> list[Status]:
        asked.append(method.__name__)
        return [Status(told.pop(0), (), 0)]

    tap = RemoteTap(ask, lambda: steps)
    assert tap.totals() == TapTotals()
    assert asked == []
    steps = 1
    assert tap.totals().ring == 5
    assert tap.totals().sent == 5  # no step since, but rows were still on their way
    assert tap.totals().sent == 5
    assert asked == ["status", "status"]


class FakeHandler:
    """As vLLM's CPUDNNLGEMMHandler: frees what lies at its address when it goes."""

    def __init__(self, address: int) -> None:
        self.handler_tensor = torch.tensor(address)


def test_a_packed_linear_is_exchanged_in_place() -> None:
    """A compiled graph holds on to the tensors of the first closure: they must tell of the new weights, and the old copy must be freed."""

    def closure(handler: FakeHandler, packed_weight: torch.Tensor, rows: int) -> Callable[[], tuple[object, ...]]:
        return lambda: (handler, packed_weight, rows)

    old, new = FakeHandler(17), FakeHandler(99)
    address, packed = old.handler_tensor, torch.zeros(2)
    exchange(closure(old, packed, 4), closure(new, torch.ones(2), 4))
    assert (int(address), int(new.handler_tensor)) == (99, 17)
    assert packed.tolist() == [1.0, 1.0]


def test_a_draft_that_was_not_packed_is_left_alone() -> None:
    repack(torch.nn.Sequential(torch.nn.Linear(2, 2)))
