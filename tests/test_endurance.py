"""Kills at random moments, dying loader workers, long runs."""

import gc
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetMapper
from torch import nn

from mabn_d2.data.loader import build_train_loader
from mabn_d2.layers import CenConv2d, MABN2d

from conftest import ROOT

COMMAND = [
    sys.executable, "tools/train_net.py", "--num-gpus", "0", "--resume", "--config-file",
    "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml", "MODEL.RESNETS.DEPTH", "10",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8",
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.MABN.SIMULATED_BATCH_SIZE", "8",
    "MODEL.MABN.WARMUP_ITERS", "2", "MODEL.MABN.CLIP_START", "4", "DATASETS.TEST", "()",
    "DATALOADER.NUM_WORKERS", "0", "SOLVER.CHECKPOINT_PERIOD", "1",
]  # fmt: skip


def start(folder, iterations, wait=None):
    """Run the training; kill it `wait` seconds after its first output, if given."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, "SOLVER.MAX_ITER", str(iterations), "OUTPUT_DIR", str(folder)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if wait is None:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output[-3000:]
        return
    for line in process.stdout:  # imports take seconds, in which there is little to destroy
        if "Starting training" in line:
            break
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.timeout(1500)
def test_killed_run_equals_the_undisturbed_one(tmp_path, kills):
    """A checkpoint is written in every iteration, so that many kills hit one that is being written."""
    iterations, rng = 8 * kills, random.Random(kills)
    start(tmp_path / "straight", iterations)
    for _ in range(kills):
        start(tmp_path / "killed", iterations, wait=rng.uniform(0, 2.5))
    start(tmp_path / "killed", iterations)
    states = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=False)
        for name in ("straight", "killed")
    ]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert states[0]["iteration"] == states[1]["iteration"] == iterations - 1


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


@pytest.mark.parametrize("iterations", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_flat_and_statistics_finite(iterations):
    net = nn.Sequential(
        CenConv2d(3, 16, 3, bias=False), MABN2d(16), nn.ReLU(), CenConv2d(16, 8, 3, bias=False),
        MABN2d(8, clip_start=100), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    marks = []
    for iteration in range(iterations):
        x = torch.randn(2, 3, 16, 16) * (1 + iteration % 7)
        loss = nn.functional.cross_entropy(net(x), torch.randint(0, 4, (2,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration + 1 in (iterations // 5, iterations):
            marks.append((count_tensors(), resident_mib()))
    assert marks[0][0] == marks[1][0]
    assert marks[1][1] - marks[0][1] < 20  # MiB: the allocator's, no tensor of an iteration is kept
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert net[1].iters == iterations
