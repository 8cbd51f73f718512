"""What leaves a device for the host goes on a stream of its own, beside what is computed there: nothing here waits for the device.

On a host there is nothing to do, and what is asked for is given back as it came.
"""

from typing import Any

import torch
from torch import Tensor

_streams: dict[torch.device, "SideStream"] = {}


class SideStream:
    """Copies to the host, in the order in which they are asked for. One a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.Stream(device)

    @classmethod
    def of(cls, device: torch.device) -> "SideStream":
        return _streams.get(device) or _streams.setdefault(device, cls(device))

    def copy(self, into: Tensor, source: Tensor) -> torch.Event:
        """Copy `source`, as it is once all that was queued so far has run, into pinned memory; the event comes behind the copy.

        Nobody may write to `source` before that. It may be dropped: its memory is kept for the copy.
        """
        self._stream.wait_stream(torch.accelerator.current_stream(source.device))
        with self._stream:
            into.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        return self._stream.record_event()


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._tensor, self._event = source, None
        if on_host(source):
            return
        self._tensor = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._event: Any = SideStream.of(source.device).copy(self._tensor, source)

    def get(self) -> Tensor:
        """The tensor on the host; waits until it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def kept(tensor: Tensor) -> Tensor:
    """`tensor` for later: the next replay of a graph overwrites its outputs on a device."""
    return tensor if on_host(tensor) else tensor.clone()
