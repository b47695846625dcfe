"""The processes that train one classifier."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Processes(NamedTuple):
    """This process's rank and the number of processes, as torchrun sets them."""

    rank: int
    world_size: int

    @classmethod
    def of_environment(cls) -> "Processes":
        """Return what RANK and WORLD_SIZE say; without them, one process."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def process_group(device: torch.device, world_size: int) -> Iterator[None]:
    """Join the group of several processes, and leave it at the end."""
    own = world_size > 1 and not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if own:
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
