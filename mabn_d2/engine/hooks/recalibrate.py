"""Recalibration of MABN in the course of a training."""

import logging

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from ...surgery.recalibrate import update_mabn_stats


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
