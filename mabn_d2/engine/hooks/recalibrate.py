"""Recalibration of MABN in the course of a training."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ...layers import MABN2d
from ...surgery.recalibrate import update_mabn_stats

_logger = logging.getLogger(__name__)


@contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Set back what forwards in training mode move beside MABN: other buffers, RetinaNet's average."""
    others = [module for module in model.modules() if not isinstance(module, MABN2d)]
    attributes = {module: dict(vars(module)) for module in others}
    buffers = {b: b.clone() for module in others for b in module.buffers(recurse=False)}
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


class RecalibrateMABN(HookBase):
    """Sets running_var of MABN by `update_mabn_stats` every `period` iterations and after the last.

    It is what TEST.PRECISE_BN asks for; Detectron2's own hook finds BatchNorm only.

    Args:
        period: in iterations; 0 is after the last iteration only.
        model: in training mode, so that the RoI heads see what they see in training.
        data_loader: batches apart from those that train, the same first ones each time.
        num_iters: the number of batches.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iters: int
    ) -> None:
        self.period, self.model = period, model
        self.data_loader, self.num_iters = data_loader, num_iters

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period > 0 and done % self.period == 0):
            _logger.info(f"recalibrating MABN on {self.num_iters} batches")
            # What the model logs meanwhile is no progress of the training.
            with EventStorage(), _unmoved(self.model):
                update_mabn_stats(self.model, self.data_loader, self.num_iters)


CONVERTED_IMAGES = 32  # what the paper's window spans; each has thousands of pixels


def recalibrate_converted(model: nn.Module, data_loader: Iterable[Any]) -> None:
    """Set running_var of all MABN layers, frozen ones too, after weights were converted.

    Args:
        model: in training mode.
        data_loader: batches of training images, on each rank.
    """
    batches = iter(data_loader)
    first = next(batches)
    num_iters = max(CONVERTED_IMAGES // (len(first) * comm.get_world_size()), 1)
    weights = [norm.weight for norm in model.modules() if isinstance(norm, MABN2d)]
    frozen = [weight for weight in weights if not weight.requires_grad]
    _logger.warning(
        f"recalibrating the {len(weights)} MABN layers on {num_iters} batches, as the weights were "
        "converted from BatchNorm"
    )
    try:
        for weight in frozen:
            weight.requires_grad_(True)  # which update_mabn_stats takes for not frozen
        with EventStorage(), _unmoved(model):
            update_mabn_stats(model, itertools.chain([first], batches), num_iters)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
