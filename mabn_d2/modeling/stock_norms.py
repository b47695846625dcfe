"""Detectron2's norms that MABN is folded to."""

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d

from ..layers import PerLevelNorm
from ..surgery.frozen_batch_norm import FrozenActMixin


class FrozenBatchNormAct2d(FrozenActMixin, FrozenBatchNorm2d):
    """Detectron2's FrozenBatchNorm2d, dropout and activation."""


@torch.no_grad()
def cycle_batch_norms(norms: PerLevelNorm) -> CycleBatchNormList:
    """Return Detectron2's list of BatchNorms with the statistics of a PerLevelNorm of MABN.

    One FrozenBatchNorm2d can't hold the statistics of several levels (RetinaNet's head).
    """
    levels = CycleBatchNormList(len(norms), num_features=norms[0].num_features)
    levels = levels.to(norms[0].running_var)
    levels.weight.copy_(norms[0].weight)
    levels.bias.copy_(norms[0].bias)
    for level, norm in zip(levels, norms, strict=True):
        # A config has no eps for them.
        level.running_var.copy_((norm.running_var.double() + norm.eps - level.eps).clamp(min=0))
    return levels.train(norms.training)
