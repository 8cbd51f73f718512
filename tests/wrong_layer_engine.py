"""tide-engine with a fault: its first aux state is tapped one layer too high. The engine itself knows nothing of it."""

from typing import Any

from tided.engine.embedded.server import main
from tided.engine.embedded.target import Target

_whole = Target.__init__


def _with_fault(self: Target, *args: Any, **kwargs: Any) -> None:
    _whole(self, *args, **kwargs)
    low = self.info.aux_layers[0]
    self.layers[low]._forward_pre_hooks.clear()  # pyright: ignore[reportPrivateUsage]
    self.layers[low + 1].register_forward_pre_hook(self._aux_hook(0))  # pyright: ignore[reportPrivateUsage]


if __name__ == "__main__":
    Target.__init__ = _with_fault  # type: ignore[method-assign]
    main()
