"""The processes that train one classifier."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..engine.launch import StartedProcess, join_group


class Processes(NamedTuple):
    """This process's rank and the number of processes."""

    rank: int
    world_size: int

    @classmethod
    def of(cls, started: StartedProcess | None) -> "Processes":
        """Return the place of a process that torchrun or srun started; without it, one process."""
        return cls(started.rank, started.world_size) if started else cls(0, 1)


@contextmanager
def process_group(device: torch.device, started: StartedProcess | None) -> Iterator[None]:
    """Join the group of several processes, and leave it at the end."""
    if started is None or dist.is_initialized():
        yield
        return
    join_group(started, "nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of a list of numbers over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace running_mean and running_var by their means over the ranks.

    Each rank trains with statistics of its own.
    """
    if dist.is_initialized():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
