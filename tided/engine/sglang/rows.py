"""SGLang's steps as rows of the tap: which request each row belongs to, its position, its token.

A step is seen twice: when the worker has run it (the states exist, perhaps only on the device) and when the scheduler has processed
its result, one step later with overlapped scheduling. Only then is it known which drafted tokens count and where a request
ended, and tokens are plain lists, so nothing here waits for the device. Row j of a verification is token j of what was accepted
before it: the newest token of the request first, then its accepted drafted tokens (chains only: top-k 1).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tided.engine.plugin import plain_temperature
from tided.engine.sglang.steps import StepBook
from tided.engine.tap import MAX_TAIL, Tap
from tided.model.engines import RequestStats

if TYPE_CHECKING:
    import torch

OPT_OUT = "tided_no_capture"
"""Key in a request's sampling_params.custom_params; the HTTP header sets it (see `plugin`)."""
OWN = "tided_profile"
"""Likewise for the requests that measure the latency profile: neither tapped nor counted."""


@dataclass(slots=True)
class Tracked:
    """A request between its first prefill and its end."""

    request: Any
    tapped: bool  # began while capture was on, opted out or not
    next_position: int = 0  # of the first row that was not seen yet
    spec_steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Step:
    """One forward of the worker, until its result was processed."""

    prefill: bool
    started_s: float
    spans: list[tuple[str, int, int]] = field(default_factory=list)  # of a prefill: (request id, first position, rows)
    gamma: int = 0
    states: Sequence["torch.Tensor"] = ()  # [rows, width] each


class RowTap:
    """Follows every request of one scheduler. All calls come from the scheduler's thread.

    `tap` is None where nothing is tapped; requests and steps are counted all the same.
    """

    def __init__(self, tap: Tap | None, book: StepBook, version: Callable[[], str]) -> None:
        self._tap, self._book, self._version = tap, book, version
        self._tracked: dict[str, Tracked] = {}
        self._ended_s = 0.0

    @property
    def running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._tracked)

    def begin_step(self, batch: Any) -> Step | None:
        """Before the forward of `batch`: what its rows will be. None for an idle step."""
        mode = batch.forward_mode
        if mode.is_idle():
            return None
        step = Step(prefill=bool(mode.is_extend()), started_s=time.perf_counter())
        if step.prefill:
            for request, first, count in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
                self._begin(request)
                step.spans.append((request.rid, int(first), int(count)))
        return step

    def ran(self, step: Step, gamma: int, states: Sequence["torch.Tensor"]) -> None:
        """After the forward: `states` are the aux states [rows, 3 * hidden] and, if tapped, the last [rows, hidden]."""
        step.gamma = gamma
        if states and any(tracked.tapped for tracked in self._tracked.values()):
            from tided.engine.device import kept

            step.states = [kept(part) for part in states]

    def processing(self, batch: Any) -> list[int]:
        """Before the result of `batch` is processed: how many output tokens each request has, -1 for those that are over."""
        return [-1 if request.finished() or request.is_retracted else len(request.output_ids) for request in batch.reqs]

    def processed(self, step: Step, batch: Any, before: Sequence[int], accept_lens: Sequence[int]) -> None:
        """After it was processed: count, tap, and see who is over. `accept_lens` counts the bonus token too."""
        if step.prefill:
            self._tap_prefill(step)
        else:
            self._count(step, batch, before, accept_lens)
            self._tap_verification(step, batch, before, accept_lens)
        self._ended_s = time.perf_counter()
        for request in batch.reqs:
            if request.finished() and request.rid in self._tracked:
                self._end(request)

    def abandon(self, request_ids: Sequence[str]) -> None:
        """Requests that were dropped while they waited: retracted or half prefilled, then aborted."""
        for request_id in request_ids:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._close(tracked, "abort")

    def tracked_ids(self) -> tuple[str, ...]:
        return tuple(self._tracked)

    def _begin(self, request: Any) -> None:
        if request.rid in self._tracked or _custom(request).get(OWN):
            return
        self._tracked[request.rid] = Tracked(request, self._tap is not None and self._tap.capturing)
        if self._tap is not None:
            self._tap.begin(request.rid, request.origin_input_ids, bool(_custom(request).get(OPT_OUT)))

    def _tap_prefill(self, step: Step) -> None:
        picked = _Picked()
        start = 0
        for request_id, first, count in step.spans:
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.tapped:
                # After a retraction rows come again that were seen before.
                skip = min(max(tracked.next_position - first, 0), count)
                picked.add(tracked, first + skip, start + skip, count - skip)
            start += count
        self._record(step, picked)

    def _tap_verification(self, step: Step, batch: Any, before: Sequence[int], accept_lens: Sequence[int]) -> None:
        picked = _Picked()
        for i, request in enumerate(batch.reqs):
            tracked = self._tracked.get(request.rid)
            if tracked is None or not tracked.tapped or before[i] < 0:
                continue
            first = len(request.origin_input_ids) + before[i] - 1
            count = min(_length(request) - 1 - first, accept_lens[i])
            if first >= tracked.next_position:
                picked.add(tracked, first, i * (step.gamma + 1), count)
        self._record(step, picked)

    def _record(self, step: Step, picked: "_Picked") -> None:
        if self._tap is not None and picked.segments and step.states:
            rows = _chosen(step.states, picked.chosen, self._tap.settings.hidden)
            self._tap.record(picked.segments, picked.ids, rows)

    def _count(self, step: Step, batch: Any, before: Sequence[int], accept_lens: Sequence[int]) -> None:
        accepted: list[int] = []
        for request, earlier, length in zip(batch.reqs, before, accept_lens, strict=True):
            tracked = self._tracked.get(request.rid)
            if earlier < 0 or tracked is None:
                continue
            accepted.append(length - 1)
            if step.gamma:
                tracked.spec_steps += 1
                tracked.drafted += step.gamma
                tracked.accepted += length - 1
        # Overlapped steps begin before their predecessor was processed: a step's time is what it added.
        seconds = time.perf_counter() - max(step.started_s, self._ended_s)
        if not accepted:
            return
        self._book.step(len(accepted), step.gamma, accepted, seconds)

    def _end(self, request: Any) -> None:
        kind = str(request.finished_reason.to_json().get("type", "abort"))
        self._close(self._tracked[request.rid], kind if kind in ("stop", "length") else "abort")

    def _close(self, tracked: Tracked, finish: str) -> None:
        request = tracked.request
        del self._tracked[request.rid]
        length, prompt = _length(request), len(request.origin_input_ids)
        if self._tap is not None:
            tail = min(length, tracked.next_position + MAX_TAIL)
            self._tap.end(request.rid, finish, _tokens(request, tracked.next_position, tail))
        self._book.finished(
            RequestStats(
                prompt_tokens=prompt,
                output_tokens=length - prompt,
                spec_steps=tracked.spec_steps,
                drafted=tracked.drafted,
                accepted=tracked.accepted,
                version=self._version(),
                temperature=plain_temperature(request.sampling_params),
                cached_tokens=getattr(request, "cached_tokens", None),
            )
        )


class _Picked:
    """The rows of one step that go onto the tap."""

    def __init__(self) -> None:
        self.segments: list[tuple[str, int, int]] = []
        self.ids: list[int] = []
        self.chosen: list[int] = []

    def add(self, tracked: Tracked, position: int, row: int, count: int) -> None:
        """`count` rows from `row` on, which stand at `position` of the request. None is allowed."""
        if count <= 0:
            return
        self.segments.append((tracked.request.rid, position, count))
        self.ids.extend(_tokens(tracked.request, position, position + count))
        self.chosen.extend(range(row, row + count))
        tracked.next_position = position + count


def _chosen(parts: Sequence["torch.Tensor"], rows: Sequence[int], hidden: int) -> "torch.Tensor":
    """[len(rows), states, hidden]: these rows of the parts side by side."""
    import torch

    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
    if list(rows) != list(range(whole.shape[0])):
        whole = whole[torch.tensor(rows, dtype=torch.int64, device=whole.device)]
    return whole.reshape(len(rows), -1, hidden)


def _custom(request: Any) -> Mapping[str, Any]:
    custom = getattr(request.sampling_params, "custom_params", None)
    return cast("dict[str, Any]", custom) if isinstance(custom, dict) else {}


def _length(request: Any) -> int:
    """Tokens of a request up to its end: what was accepted behind a stop token is not part of it."""
    return len(request.origin_input_ids) + len(request.output_ids_through_stop)


def _tokens(request: Any, start: int, stop: int) -> list[int]:
    """Its tokens `start` to `stop`, without building the whole list: prompts are long and steps are many."""
    prompt = len(request.origin_input_ids)
    head = list(request.origin_input_ids[start:stop])
    return [*head, *request.output_ids[max(start - prompt, 0) : max(stop - prompt, 0)]]
