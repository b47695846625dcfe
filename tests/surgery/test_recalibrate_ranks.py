"""update_mabn_stats on two ranks."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mabn_d2 import update_mabn_stats
from mabn_d2.layers import CenConv2d, MABN2d
from paths import ROOT


def model_and_images():
    torch.manual_seed(3)
    model = nn.Sequential(
        CenConv2d(3, 6, 3), MABN2d(6, activation="relu"), CenConv2d(6, 4, 3), MABN2d(4)
    )
    return model, torch.randn(8, 3, 9, 9)


def main(rank, folder):
    model, images = model_and_images()
    mine = images[:3] if rank == 0 else images[3:]
    update_mabn_stats(nn.parallel.DistributedDataParallel(model), [mine], 1)
    torch.save([model[1].running_var, model[3].running_var], f"{folder}/rank{rank}.pt")


def test_two_halves_of_the_images_give_what_all_of_them_give(tmp_path):
    url = f"tcp://127.0.0.1:{20000 + zlib.crc32(str(tmp_path).encode()) % 10000}"
    command = (
        "import sys; from detectron2.engine import launch; from test_recalibrate_ranks import main"
    )
    command += (
        f"; rank = int(sys.argv[1]); launch(main, 1, 2, rank, {url!r}, (rank, {str(tmp_path)!r}))"
    )
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "tests/support")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    model, images = model_and_images()
    update_mabn_stats(model, [images], 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(found, [model[1].running_var, model[3].running_var])


class TwoWays(nn.Module):
    """The first norm sees ones, the second tens; which one comes first is up to the input."""

    def __init__(self):
        super().__init__()
        self.one, self.ten = MABN2d(2), MABN2d(2)

    def forward(self, first):
        ways = [(self.one, 1.0), (self.ten, 10.0)]
        for norm, value in ways if first == 0 else ways[::-1]:
            norm(torch.full((2, 2, 4, 4), value))


def run_two_ways(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = TwoWays()
    update_mabn_stats(model, [rank], 1)
    with pytest.raises(ValueError, match="the data loader has 1: change num_iters"):
        update_mabn_stats(model, [rank] * (1 + rank), 2)
    torch.save([model.one.running_var[0], model.ten.running_var[0]], f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_use_other_layers_first_and_have_fewer_batches(tmp_path):
    mp.spawn(run_two_ways, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == [1, 100]
