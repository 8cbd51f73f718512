"""Hidden states on their way from the device to host memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class HostStates:
    """States [rows, width] of one step. Copied from a device on a side stream, so that the next step need not wait.

    The path over CUDA was not run on the machines where the rest was tested.
    """

    def __init__(self, parts: Sequence["torch.Tensor"]) -> None:
        import torch

        self._event: Any = None
        self._parts = list(parts)
        device = parts[0].device
        if device.type != "cuda":
            return
        # The next replay of a graph overwrites its outputs: copied on the device first, in order with the forward.
        staged = [part.clone() for part in parts]
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._parts = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in staged]
            for host, part in zip(self._parts, staged, strict=True):
                host.copy_(part, non_blocking=True)
                part.record_stream(side)
            self._event = torch.cuda.Event()
            self._event.record(side)

    def rows(self, hidden: int, chosen: Sequence[int]) -> "torch.Tensor":
        """The chosen rows, [len(chosen), states, hidden]."""
        import torch

        if self._event is not None:
            self._event.synchronize()
        whole = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=-1)
        if list(chosen) != list(range(whole.shape[0])):
            whole = whole[torch.tensor(chosen, dtype=torch.int64)]
        return whole.reshape(len(chosen), -1, hidden)


_side_streams: dict[Any, Any] = {}


def _side_stream(device: Any) -> Any:
    import torch

    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
