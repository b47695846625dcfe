"""One norm layer for several feature levels: statistics of each level, weight and bias of all."""

import copy

from torch import nn


class PerLevelNorm(nn.ModuleList):
    """Cycles through copies of a norm layer, one a level, that share its weight and bias.

    A head that runs over the levels of a pyramid meets another distribution on each of them, so one
    running average fits none (section 5.2 of "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576);
    MABN's windows would mix the levels of one iteration, too. Detectron2's CycleBatchNormList is
    this for BatchNorm; it scales outside of the norm, which in MABN is part of the backward.

    Note that, as there, the level is the position of the call: the caller runs over all levels in
    turn, always.

    Args:
        norm: a layer with parameters `weight` and `bias`, which becomes the first level's.
        length: number of levels.
    """

    def __init__(self, norm, length):
        super().__init__([norm, *(copy.deepcopy(norm) for _ in range(length - 1))])
        for other in list(self)[1:]:
            other.weight, other.bias = norm.weight, norm.bias
        self._level = 0

    def forward(self, x):
        """(N, C, H, W) of the next level -> the same shape."""
        norm = self[self._level]
        self._level = (self._level + 1) % len(self)
        return norm(x)
