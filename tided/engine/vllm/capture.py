"""A step's rows, as every runner of vLLM gives them to its draft, onto the tap.

The draft is fed what the tap wants: token ids, positions and aux states of all scheduled tokens, with the number of rejected ones per
request. What a request will not keep is left out: rejected tokens, tokens past its stop token or its length, and rows that were
recorded before (a preempted request is computed again). A prefix-cache hit has no rows: positions then begin behind it, which is a
declared gap.

Which rows count is known on the device first. So a step is recorded as the next one begins: its numbers are on the host by then, and
nobody has waited for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tided.engine.tap import Tap, TapSettings

if TYPE_CHECKING:
    import torch

DROPPED = ""
"""Stands for no request in a tap segment."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """One target forward. Request i's rows are `starts[i]` to `starts[i + 1]`, of which the last `rejected[i]` (None: 0) do not count.

    ids and positions [N]; next_ids [requests]: the token that follows each request's last row; aux [N, 3 * hidden]; last [N or more,
    hidden], after the final norm, or None.
    """

    requests: Sequence[str]
    starts: Sequence[int]
    rejected: "torch.Tensor | None"
    ids: "torch.Tensor"
    positions: "torch.Tensor"
    next_ids: "torch.Tensor"
    aux: "torch.Tensor"
    last: "torch.Tensor | None"


@dataclass(frozen=True, slots=True)
class Ending:
    """When a request ends by itself: at `most` tokens in all, or at the first generated one of `stops`."""

    most: int
    stops: frozenset[int]


@dataclass(slots=True)
class _Followed:
    prompt: list[int]
    ending: Ending
    next: int = 0  # the first position without a row
    tail: list[int] = field(default_factory=list[int])  # the token at `next`, if known
    over: bool = False  # its last token is known

    def stops_at(self, position: int, token: int) -> bool:
        return position >= len(self.prompt) and token in self.ending.stops


class Capture:
    """Follows requests on the runner's thread. What it raises is its caller's to guard."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._followed: dict[str, _Followed] = {}
        self._step: _Step | None = None  # the newest, while it is not recorded

    def begin(self, request_id: str, prompt_ids: Sequence[int], ending: Ending, opt_out: bool) -> None:
        """A request is scheduled for the first time. One that comes again (V2, after a preemption) goes on."""
        if request_id in self._followed or not self._tap.capturing:
            return
        prompt = list(prompt_ids)
        self._tap.begin(request_id, prompt, opt_out)
        self._followed[request_id] = _Followed(prompt, ending)

    def end(self, request_id: str) -> None:
        """The runner was told that the request is over. Why is told by its last token."""
        self.settle()
        followed = self._followed.pop(request_id, None)
        if followed is None:
            return
        position, tail = followed.next, followed.tail
        if tail and followed.stops_at(position, tail[0]):
            finish = "stop"
        elif position + len(tail) >= followed.ending.most:
            finish = "length"
        else:
            finish = "abort"
        self._tap.end(request_id, finish, tail)

    def step(self, rows: StepRows) -> None:
        """Take one step; `settle` records it."""
        self.settle()
        if any(request in self._followed for request in rows.requests):
            self._step = _Step(rows, self._tap.settings)

    def settle(self) -> None:
        """Record the step that was taken last. To be called before the next one begins."""
        step, self._step = self._step, None
        if step is None:
            return
        ids, firsts, following, rejected = step.numbers()
        segments: list[tuple[str, int, int]] = []
        for i, request in enumerate(step.requests):
            start, end = step.starts[i], step.starts[i + 1]
            followed = self._followed.get(request)
            if followed is None:
                segments.append((DROPPED, 0, end - start))
                continue
            count = end - rejected[i] - start
            known = ids[start : start + count]
            before, kept = self._keep(followed, firsts[i], known, following[i])
            segments.append((DROPPED, 0, before))
            segments.append((request, firsts[i] + before, kept))
            segments.append((DROPPED, 0, end - start - before - kept))
        self._tap.record([segment for segment in segments if segment[2]], ids, step.states)

    def _keep(self, followed: _Followed, first: int, ids: list[int], following: int) -> tuple[int, int]:
        """How many of a request's rows were recorded before, and how many of the rest to record; notes what follows them."""
        before = min(max(followed.next - first, 0), len(ids))
        if followed.over or before == len(ids):
            return before, 0
        prompt = len(followed.prompt)
        kept = len(ids) - before
        # A row whose token is the request's last has no successor: that token is its tail.
        kept = min(kept, max(followed.ending.most - 1 - first - before, 0))
        for i in range(max(prompt - first, before), before + kept):
            if followed.stops_at(first + i, ids[i]):
                kept = i - before
                break
        followed.next = position = first + before + kept
        if before + kept < len(ids):
            followed.over, followed.tail = True, [ids[before + kept]]
        else:
            followed.tail = [followed.prompt[position] if position < prompt else following]
        return before, kept


class _Step:
    """What is kept of a step until the next one: the runner's own buffers are written again then."""

    def __init__(self, rows: StepRows, settings: TapSettings) -> None:
        import torch

        from tided.engine.device import HostCopy

        self.requests, count = tuple(rows.requests), len(rows.requests)
        self.starts = tuple(rows.starts[: count + 1])
        self.states = _states(rows, self.starts[count], settings)
        firsts = rows.positions[list(self.starts[:count])]
        rejected = rows.rejected if rows.rejected is not None else torch.zeros_like(rows.next_ids)
        parts = (rows.ids[: self.starts[count]], firsts, rows.next_ids, rejected)
        self._sizes = [len(part) for part in parts]
        self._numbers = HostCopy(torch.cat([part.to(torch.int64) for part in parts]))

    def numbers(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """The rows' ids; each request's first position, the token that follows it, and how many of its rows do not count."""
        ids, firsts, following, rejected = self._numbers.get().split(self._sizes)
        return ids.tolist(), firsts.tolist(), following.tolist(), rejected.tolist()


def _states(rows: StepRows, total: int, settings: TapSettings) -> "torch.Tensor":
    """[total, states, hidden]; on a host without a copy when there is no last hidden state."""
    import torch

    from tided.engine.device import kept

    aux = rows.aux[:total]
    if not settings.has_last:
        return kept(aux).unflatten(-1, (-1, settings.hidden))
    if rows.last is None:
        raise ValueError("the runner gave no last hidden state")
    return torch.cat((aux, rows.last[:total]), dim=-1).unflatten(-1, (-1, settings.hidden))
