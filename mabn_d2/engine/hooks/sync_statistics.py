"""Running variances, averaged over the ranks."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ...layers import MABN2d


class SyncStatistics(HookBase):
    """Averages `running_var` over the ranks every so many iterations and after the last one.

    Each rank trains with statistics of its own; evaluation and checkpoints see their mean.

    Args:
        model: whose MABN layers are averaged.
        periods: iterations, 0 for none; those of evaluation and checkpoints.
    """

    def __init__(self, model: nn.Module, periods: Iterable[int]) -> None:
        self.buffers = [m.running_var for m in model.modules() if isinstance(m, MABN2d)]
        self.periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Average them now; all ranks must call it."""
        if comm.get_world_size() == 1 or not self.buffers:
            return
        flat = torch.cat(self.buffers)  # one message instead of one a layer
        dist.all_reduce(flat)
        flat /= comm.get_world_size()
        torch._foreach_copy_(self.buffers, list(flat.split([len(b) for b in self.buffers])))
