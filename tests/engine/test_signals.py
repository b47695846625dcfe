"""SIGTERM and SIGINT to real processes: the iteration ends, a checkpoint is written."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from commands import CONFIG, SMALL, assert_ended, start
from mabn_d2.engine.hooks import StopOnSignal


@pytest.mark.parametrize(
    "number, whole_group, processes",
    [
        pytest.param(number, whole_group, processes, marks=[] if fast else [pytest.mark.slow])
        for number in (signal.SIGTERM, signal.SIGINT)
        for whole_group in (False, True)
        for processes, fast in (
            (1, whole_group == (number == signal.SIGTERM)),
            (2, whole_group == (number == signal.SIGINT)),
        )
    ],
)
def test_signal_writes_a_checkpoint(tmp_path, number, whole_group, processes):
    """From a user to the process or the parent of several, from a scheduler or a terminal to all:
    the same, once. Loader workers are in the group too."""
    process = start(
        "train_net.py", "--num-gpus", processes, "--dist-url", "auto", "--config-file", CONFIG, *SMALL,
        "OUTPUT_DIR", tmp_path, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 100000,
        "DATALOADER.NUM_WORKERS", 2, start_new_session=True,
    )  # fmt: skip
    lines, sent = [], False
    for line in process.stdout:
        lines.append(line)
        if "iter: 19 " in line and not sent:
            sent = True
            (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(timeout=60) == 128 + number, "".join(lines[-30:])
    assert not [line for line in lines if "Traceback" in line], "".join(lines[-30:])
    iteration = int((tmp_path / "last_checkpoint").read_text()[len("model_") : -len(".pth")])
    state = torch.load(tmp_path / f"model_{iteration:07d}.pth", weights_only=False)
    assert 19 <= state["iteration"] == iteration < 200
    assert_ended(process.pid)


def say_and_wait(started):
    started.set()
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_forked_children_end(number):
    """A pool that a dataset or an evaluator uses ends its processes by SIGTERM."""
    # A shell lets what it runs in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = StopOnSignal(None)
    hook.before_train()
    try:
        fork = multiprocessing.get_context("fork")
        started = fork.Event()
        child = fork.Process(target=say_and_wait, args=(started,))
        child.start()
        assert started.wait(60)  # Python forgets signals that come in the middle of a fork
        os.kill(child.pid, number)
        child.join(20)
        # Python's own handler of SIGINT raises KeyboardInterrupt.
        assert child.exitcode == (-number if number == signal.SIGTERM else 1)
        assert not hook.received
    finally:
        if child.is_alive():
            child.kill()
        hook.after_train()
        signal.signal(signal.SIGINT, before)
