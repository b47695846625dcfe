"""Hooks of the trainer: seeds, statistics over ranks, recalibration, signals."""

import logging
import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from ..checkpoint import update_mabn_stats
from ..data.loader import mix
from ..layers import MABN2d


class SeedEachIteration(HookBase):
    """Seeds all generators before every iteration, so that a resumed run draws what the straight
    one drew (samples of anchors and RoIs, dropout)."""

    def __init__(self, seed):
        self.seed = seed

    def before_step(self):
        seed_all_rng(mix(self.seed, comm.get_rank(), self.trainer.iter))


class SyncStatistics(HookBase):
    """Averages `running_var` over the ranks every so many iterations and after the last one.

    Each rank trains with statistics of its own; evaluation and checkpoints see their mean.

    Args:
        model: whose MABN layers are averaged.
        periods: iterations, 0 for none; those of evaluation and checkpoints.
    """

    def __init__(self, model, periods):
        self.buffers = [m.running_var for m in model.modules() if isinstance(m, MABN2d)]
        self.periods = [period for period in periods if period > 0]

    def after_step(self):
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self.average()

    @torch.no_grad()
    def average(self):
        if comm.get_world_size() == 1 or not self.buffers:
            return
        flat = torch.cat(self.buffers)  # one message instead of one a layer
        dist.all_reduce(flat)
        flat /= comm.get_world_size()
        torch._foreach_copy_(self.buffers, list(flat.split([len(b) for b in self.buffers])))


class RecalibrateMABN(HookBase):
    """Sets running_var of MABN by `update_mabn_stats` every `period` iterations and after the last.

    It is what TEST.PRECISE_BN asks for; Detectron2's own hook finds BatchNorm only.

    Args:
        period: in iterations; 0 is after the last iteration only.
        model: in training mode, so that the RoI heads see what they see in training.
        data_loader: batches apart from those that train, the same first ones each time.
        num_iters: the number of batches.
    """

    def __init__(self, period, model, data_loader, num_iters):
        self.period, self.model = period, model
        self.data_loader, self.num_iters = data_loader, num_iters

    def after_step(self):
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period > 0 and done % self.period == 0):
            logging.getLogger(__name__).info(f"recalibrating MABN on {self.num_iters} batches")
            with EventStorage():  # what the model logs meanwhile is no progress of the training
                update_mabn_stats(self.model, self.data_loader, self.num_iters)


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT: finishes the iteration, writes a checkpoint, exits with 128 + signal.

    A signal to any rank stops all of them after the same iteration. A second signal ends the
    process at once, as it would without this hook, unless it comes within a second: then it is
    the same one, by way of the process group or of the parent.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    SAME = 1.0  # seconds

    def __init__(self, checkpointer):
        self.checkpointer = checkpointer
        self.received = 0
        self._before = {}

    def before_train(self):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {s: signal.signal(s, self._receive) for s in self.SIGNALS}

    def after_train(self):
        self._restore()

    def _restore(self):
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number, frame):
        if not self.received:
            self.received, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > self.SAME:
            self._restore()
            os.kill(os.getpid(), number)

    def after_step(self):
        # Detectron2 gathers metrics over the ranks in every iteration by the same means.
        received = max(comm.all_gather(self.received))
        iteration = self.trainer.iter
        if not received or iteration + 1 >= self.trainer.max_iter:
            return
        if comm.is_main_process():
            self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        comm.synchronize()
        logging.getLogger(__name__).warning(
            f"{signal.Signals(received).name} after iteration {iteration}: go on with --resume"
        )
        raise SystemExit(128 + received)
