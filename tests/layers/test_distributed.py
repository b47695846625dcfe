"""DistributedDataParallel's broadcast of buffers leaves the windows of each rank alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mabn_d2.layers import CenConv2d, MABN2d
from mabn_d2.layers.distributed import rank_buffers


def make_net(split_batch):
    torch.manual_seed(0)
    # r stays 1: it would depend on running_var, which the broadcast changes.
    warmup_iters = 100 if split_batch else 2
    settings = {"simulated_batch_size": 6, "warmup_iters": warmup_iters, "split_batch": split_batch}
    inner = nn.Sequential(CenConv2d(2, 3, 3), MABN2d(3, **settings), nn.ReLU())
    return nn.Sequential(inner, nn.Sequential(CenConv2d(3, 3, 3), MABN2d(3, **settings)))


def train(rank, net, **options):
    """Take steps on the images of this rank; return its statistics."""
    model = DistributedDataParallel(net, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        x = (1 + rank) * torch.randn(2, 2, 8, 8, generator=generator)
        model(x).sin().mean().backward()
        optimizer.step()
    return {name: value.clone() for name, value in net.named_buffers()}


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for split_batch in False, True:
        with_broadcast = train(rank, make_net(split_batch))
        without = train(rank, make_net(split_batch), broadcast_buffers=False)
        torch.save((with_broadcast, without), f"{folder}/{split_batch}_{rank}.pth")
    dist.destroy_process_group()


def test_windows_stay_those_of_the_rank(tmp_path):
    mp.spawn(run, (str(tmp_path),), nprocs=2)
    for split_batch in False, True:
        ranks = [torch.load(tmp_path / f"{split_batch}_{rank}.pth") for rank in (0, 1)]
        names = rank_buffers(make_net(split_batch))
        assert len(names) == 8
        for with_broadcast, without in ranks:
            assert all(torch.equal(with_broadcast[name], without[name]) for name in names)
        (first, _), (second, alone) = ranks
        for layer in "0.1", "1.1":
            assert first[f"{layer}.iters"] == second[f"{layer}.iters"] == 5
            assert not torch.equal(first[f"{layer}.buffer_x2"], second[f"{layer}.buffer_x2"])
            # running_var is rank 0's before each forward, as BatchNorm's statistics are.
            name = f"{layer}.running_var"
            distance = (second[name] - first[name]).abs().max()
            assert distance < (alone[name] - first[name]).abs().max()


@pytest.mark.parametrize("build", [CenConv2d, MABN2d])
def test_other_modules_are_registered_as_ever(build):
    net = nn.Sequential(build(3, 3, 1) if build is CenConv2d else build(3))
    assert not hasattr(net, "parameters_to_ignore")
