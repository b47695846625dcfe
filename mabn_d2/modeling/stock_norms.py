"""Detectron2's norms that MABN is folded to."""

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d

from ..layers import MABN2d, PerLevelNorm
from ..surgery.frozen_batch_norm import FrozenActMixin


class FrozenBatchNormAct2d(FrozenActMixin, FrozenBatchNorm2d):
    """Detectron2's FrozenBatchNorm2d, dropout and activation."""


@torch.no_grad()
def cycle_batch_norms(norms: PerLevelNorm) -> CycleBatchNormList:
    """Return Detectron2's list of BatchNorms with the statistics of a PerLevelNorm of MABN.

    One FrozenBatchNorm2d can't hold the statistics of several levels (RetinaNet's head).
    """
    layers = [norm for norm in norms if isinstance(norm, MABN2d)]
    levels = CycleBatchNormList(len(layers), num_features=layers[0].num_features)
    levels = levels.to(layers[0].running_var)
    levels.weight.copy_(layers[0].weight)
    levels.bias.copy_(layers[0].bias)
    for level, norm in zip(levels, layers, strict=True):
        # A config has no eps for them.
        level.running_var.copy_((norm.running_var.double() + norm.eps - level.eps).clamp(min=0))
    return levels.train(norms.training)
