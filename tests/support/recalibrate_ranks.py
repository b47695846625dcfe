"""Two processes recalibrate a model whose layers they use in another order."""

import torch
import torch.distributed as dist
from torch import nn

from mabn_d2 import MABN2d, update_mabn_stats


class TwoWays(nn.Module):
    """The first norm sees ones, the second tens; which one comes first is up to the input."""

    def __init__(self):
        super().__init__()
        self.one, self.ten = MABN2d(2), MABN2d(2)

    def forward(self, first):
        ways = [(self.one, 1.0), (self.ten, 10.0)]
        for norm, value in ways if first == 0 else ways[::-1]:
            norm(torch.full((2, 2, 4, 4), value))


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = TwoWays()
    update_mabn_stats(model, [rank], 1)
    print(model.one.running_var[0].item(), model.ten.running_var[0].item(), flush=True)
    try:
        update_mabn_stats(model, [rank] * (1 + rank), 2)
    except ValueError as error:
        print(error, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (folder,), nprocs=2)
