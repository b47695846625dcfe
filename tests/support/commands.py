"""Runs the tools as a user does."""

import os
import re
import runpy
import socket
import subprocess
import sys
import time

import pytest

from paths import ROOT

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"
# Options of CONFIG for a model whose iteration takes a tenth of a second.
SMALL = [
    "MODEL.RESNETS.DEPTH", 10, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
    "TEST.DETECTIONS_PER_IMAGE", 5,
]  # fmt: skip
# A config file of such a model, for four iterations.
SMALL_CONFIG = f"""
_BASE_: "{ROOT}/configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8}}
  FPN: {{OUT_CHANNELS: 16}}
  ROI_BOX_HEAD: {{CONV_DIM: 16}}
  ROI_MASK_HEAD: {{CONV_DIM: 16}}
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{MAX_ITER: 4}}
TEST: {{DETECTIONS_PER_IMAGE: 5}}
"""


def start(tool, *arguments, stderr=subprocess.STDOUT, **options):
    """Start a tool; its output is read from `stdout`."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",  # Detectron2's own
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, f"tools/{tool}", *map(str, arguments)], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=stderr, text=True, **options,
    )  # fmt: skip


def run_support(script, *arguments):
    """Run a script of tests/support, which may start processes of its own."""
    support = ROOT / "tests/support"
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{support}",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, support / script, *map(str, arguments)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def run(tool, *arguments):
    """Run a tool to its end."""
    process = start(tool, *arguments, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def train(*arguments):
    return run("train_net.py", "--config-file", CONFIG, *arguments)


def lines(stderr):
    """Return what a command says but for torch's own log, of missing CUDA for example."""
    return [line for line in stderr.splitlines() if not re.match(r"W\d{4} .*torch", line)]


def exit_line(monkeypatch, tool, *arguments):
    """Run a tool in this process; return the line that it exits with, status 1."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    # What Python prints to stderr, to exit with 1.
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert stop.value.code.startswith(f"{tool}: ")
    return stop.value.code


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def slurm_variables(rank, port):
    """Return what SLURM's srun sets for one of two tasks on this machine."""
    slurm = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2, "SLURM_JOB_ID": 7,
             "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_ID": 0, "SLURM_STEP_TASKS_PER_NODE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return {name: str(value) for name, value in slurm.items()}


def assert_ended(group):
    """No process of a group is left, workers included, or is soon: torch's look every 5 s."""
    for _ in range(60):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.5)
    raise AssertionError(f"processes of the group {group} are left")
