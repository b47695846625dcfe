"""Detectron2's norms that MABN is folded to."""

import logging

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d

from ..layers import MABN2d, PerLevelNorm
from ..surgery.fold import stock_values
from ..surgery.frozen_batch_norm import FrozenActMixin

_logger = logging.getLogger(__name__)


class FrozenBatchNormAct2d(FrozenActMixin, FrozenBatchNorm2d):
    """Detectron2's FrozenBatchNorm2d, dropout and activation."""


@torch.no_grad()
def cycle_batch_norms(norms: PerLevelNorm) -> CycleBatchNormList:
    """Return Detectron2's list of BatchNorms with the statistics of a PerLevelNorm of MABN.

    One FrozenBatchNorm2d can't hold the statistics of several levels (RetinaNet's head).
    """
    layers = [norm for norm in norms if isinstance(norm, MABN2d)]
    first = layers[0]
    levels = CycleBatchNormList(len(layers), num_features=first.num_features, eps=first.stock_eps)
    levels = levels.to(first.running_var)
    levels.weight.copy_(first.weight)
    levels.bias.copy_(first.bias)
    for level, norm in zip(levels, layers, strict=True):
        level.running_var.copy_(stock_values(norm)["running_var"])
        # The levels share their weight, which so can't make up for a variance below 0.
        small = int((norm.running_var.double() + norm.eps < norm.stock_eps).sum())
        if small:
            _logger.warning(
                f"MODEL.MABN.EPS {norm.eps}: the folded norm, whose eps is {norm.stock_eps}, gives "
                f"smaller outputs in {small} channels, whose running_var is smaller than that"
            )
    return levels.train(norms.training)
