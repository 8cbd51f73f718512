"""Several processes that train one draft: `torchrun ... -m tided.training`, FSDP2 over gloo or what the device has.

Weights, gradients and optimizer state are sharded over the processes, and gathered for a step. Each process computes its share of a
batch's packs, so that a step is the same as in one process but for rounding. Process 0 speaks for all: its clock decides when to stop,
it scores, and it writes files.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from tided.model.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count`. One that torchrun did not start is alone, and shards nothing."""

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def shard(self, module: nn.Module) -> None:
        """Spread the parameters of `module` over the processes. Its forward gathers them, its backward sums the gradients' means."""
        if self.mesh is not None:
            fully_shard(module, mesh=self.mesh)

    def put_rows(self, into: Tensor, at: Tensor, rows: Tensor) -> None:
        """`into[at] = rows`, of which `into` may be sharded: by rows, in chunks of one size, in the processes' order (FSDP2)."""
        first, part = 0, into
        if isinstance(into, DTensor):
            first, part = self.rank * -(-len(into) // self.count), into.to_local()
        mine = (at >= first) & (at < first + len(part))
        part[at[mine] - first] = rows[mine]

    @contextmanager
    def whole(self, module: nn.Module) -> Generator[None]:
        """Inside, a sharded `module` has its whole parameters, to read. All processes must enter."""
        if isinstance(module, FSDPModule):
            module.unshard()
        try:
            yield
        finally:
            if isinstance(module, FSDPModule):
                module.reshard()

    def told(self, value: float) -> float:
        """Process 0's `value`, in all."""
        if self.mesh is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    def total(self, value: float) -> float:
        """The sum of all processes' values."""
        if self.mesh is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared)
        return float(shared)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of what may be sharded. All processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every process has, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def device_of(name: str) -> str:
    """The device of this process: of a kind without a number, the one whose number is the process's on its host."""
    if name == "cpu" or ":" in name or "LOCAL_RANK" not in os.environ:
        return name
    return f"{name}:{os.environ['LOCAL_RANK']}"


@contextmanager
def joined(device: str) -> Generator[Ranks]:
    """Join the other processes, when torchrun started this one. Raises `Unavailable` when they cannot be reached."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    chosen = torch.device(device_of(device))
    if chosen.type != "cpu":
        torch.accelerator.set_device_index(chosen.index)
    try:
        backend = dist.get_default_backend_for_device(chosen)
        backend = "gloo" if chosen.type == "cpu" else f"cpu:gloo,{chosen.type}:{backend}"
        store, rank, count = next(rendezvous("env://"))
        # torchrun keeps its store when it starts the processes again: without a prefix they would find the addresses of the dead.
        store = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as exc:
        raise Unavailable(f"the other training processes cannot be reached: {exc}") from exc
    try:
        yield Ranks(rank, count, init_device_mesh(chosen.type, (count,)))
    finally:
        dist.destroy_process_group()
