"""Detectron2's launcher, through which signals reach the workers."""

import multiprocessing
import os
import signal
import sys

from detectron2.engine import launch as detectron2_launch
from torch.multiprocessing import ProcessExitedException

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(main, num_gpus, num_machines=1, machine_rank=0, dist_url=None, args=()):
    """`detectron2.engine.launch`, but a run of several processes is stopped by a signal as one of
    a single process is (`StopOnSignal`): the workers get what this process gets, it waits for them,
    and exits with their status, 128 + signal.

    Without this the parent dies at once, and what takes its end for the job's kills the workers
    while they write their checkpoint. A worker that exits by itself has said why: so does this one.
    """
    arguments = (main, num_gpus, num_machines, machine_rank, dist_url, args)
    if num_machines * num_gpus <= 1:  # main runs in this process
        return detectron2_launch(*arguments)
    before = {number: signal.signal(number, _forward) for number in SIGNALS}
    try:
        return detectron2_launch(*arguments)
    except ProcessExitedException as error:
        if error.exit_code <= 0:  # killed
            raise
        sys.exit(error.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward(number, frame):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
