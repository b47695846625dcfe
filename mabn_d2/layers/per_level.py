"""One norm layer for several feature levels: statistics for each level, weight and bias shared."""

import copy

import torch
from torch import nn


class PerLevelNorm(nn.ModuleList):
    """Cycles through copies of a norm layer, one for each level, that share its weight and bias.

    The levels of a pyramid have different distributions, so one running average fits none of them
    (section 5.2 of "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576). MABN's windows would also mix
    the levels of one iteration. Detectron2's CycleBatchNormList does this for BatchNorm. It applies
    weight and bias outside of the norm, but in MABN the weight is part of the backward.

    Note that the level is the position of the call, as in CycleBatchNormList: the caller must always
    run over all levels in order. So activation checkpointing must repeat all levels together.

    Args:
        norm: a layer with parameters `weight` and `bias`, which becomes the first level's.
        length: number of levels.
    """

    def __init__(self, norm: nn.Module, length: int) -> None:
        super().__init__([norm, *(copy.deepcopy(norm) for _ in range(length - 1))])
        for other in list(self)[1:]:
            other.weight, other.bias = norm.weight, norm.bias
        self._level = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x (N, C, H, W) of the next level -> the same shape."""
        norm = self[self._level]
        self._level = (self._level + 1) % len(self)
        return norm(x)
