"""Kills at random moments, dying loader workers, long runs."""

import gc
import multiprocessing
import os
import random
import signal
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from detectron2.data import DatasetMapper
from torch import nn

from commands import CONFIG, SMALL, assert_ended, run, start
from mabn_d2.data.loader import build_train_loader
from mabn_d2.layers import CenConv2d, MABN2d
from nested import flat

OPTIONS = [
    "--num-gpus", 0, "--resume", "--config-file", CONFIG, *SMALL, "MODEL.MABN.SIMULATED_BATCH_SIZE", 8,
    "MODEL.MABN.WARMUP_ITERS", 2, "MODEL.MABN.CLIP_START", 4, "DATASETS.TEST", "()",
    "DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 1,
]  # fmt: skip


def undisturbed(folder, iterations):
    done = run("train_net.py", *OPTIONS, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", folder)
    assert done.returncode == 0, done.stderr[-3000:]


def killed(folder, iterations, saves, rng):
    """Run the training and kill it while its n-th checkpoint is written, or soon after.

    Returns:
        whether half a checkpoint was left.
    """
    process = start("train_net.py", *OPTIONS, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", folder,
                    start_new_session=True)  # fmt: skip
    for line in process.stdout:
        saves -= "Saving checkpoint" in line
        if saves == 0:
            break
    time.sleep(rng.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert_ended(process.pid)
    return any(folder.glob(".*.pth.*.partial"))


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_killed_run_equals_the_undisturbed_one(tmp_path, kills):
    """A checkpoint is written in every iteration, each start gets one to three of them further."""
    iterations, rng = 3 * kills + 2, random.Random(kills)
    undisturbed(tmp_path / "straight", iterations)
    halves = sum(
        killed(tmp_path / "killed", iterations, rng.randint(1, 3), rng) for _ in range(kills)
    )
    assert halves or kills < 30
    undisturbed(tmp_path / "killed", iterations)
    straight, other = (
        flat(torch.load(tmp_path / name / "model_final.pth", weights_only=False))
        for name in ("straight", "killed")
    )
    assert straight.keys() == other.keys()
    assert {"optimizer", "LRScheduler"} <= {name for path in straight for name in path}
    for path, value in straight.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        if path == ("config",):  # which names the folder of its run
            value = value.replace(str(tmp_path / "straight"), str(tmp_path / "killed"))
        assert same(value, other[path]), path


class DyingMapper(DatasetMapper):
    """Kills its process when it comes to the sixth image."""

    def __call__(self, record):
        if record["image_id"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(record)


def test_dying_worker_ends_the_run(digits_cfg):
    digits_cfg.DATALOADER.NUM_WORKERS = 4
    loader = build_train_loader(digits_cfg, mapper=DyingMapper(digits_cfg, True))
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed|exited)"):
        for _, batch in zip(range(1000), loader):
            assert len(batch) == 2


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def count_tensors():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def long_run(iterations):
    """Train a small net; return memory marks at a fifth and at the end, seconds, the net."""
    torch.manual_seed(0)
    net = nn.Sequential(
        CenConv2d(3, 16, 3, bias=False), MABN2d(16), nn.ReLU(), CenConv2d(16, 8, 3, bias=False),
        MABN2d(8, clip_start=100), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    marks, seconds = [], []
    for iteration in range(iterations):
        began = time.process_time()  # not what others take
        x = torch.randn(2, 3, 16, 16) * (1 + iteration % 7)
        loss = nn.functional.cross_entropy(net(x), torch.randint(0, 4, (2,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
        if iteration + 1 in (iterations // 5, iterations):
            marks.append((count_tensors(), resident_mib()))
    return marks, seconds, net


@pytest.mark.parametrize("iterations", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_flat_and_statistics_finite(iterations):
    # A process of its own: what other tests leave behind is freed at times of its own.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        marks, seconds, net = pool.submit(long_run, iterations).result()
    fifths = [seconds[k : k + iterations // 5] for k in range(0, iterations, iterations // 5)]
    # Shown by -s, not asserted: a machine may change its pace.
    print(
        "\nmedian ms of CPU an iteration, by fifths of the run:",
        *(f"{1000 * statistics.median(fifth):.3f}" for fifth in fifths),
    )
    assert marks[0][0] == marks[1][0]
    assert marks[1][1] - marks[0][1] < 20  # MiB: the allocator's, no tensor of an iteration is kept
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert net[1].iters == iterations
