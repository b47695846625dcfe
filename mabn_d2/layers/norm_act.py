"""MABN with the dropout and activation that some libraries put into their BatchNorm."""

from typing import Any

import torch
from torch import nn

from .mabn import MABN2d
from .split_norms import SplitMABN2d


class NormAct:
    """A norm followed by its children `drop` and `act`, as in timm's BatchNormAct2d.

    Args:
        drop, act: modules, nn.Identity for none.
        others: those of the norm.
    """

    def __init__(self, num_features: int, drop: nn.Module, act: nn.Module, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> the same shape."""
        return self.act(self.drop(super().forward(x)))


class MABNAct2d(NormAct, MABN2d):
    """MABN2d, dropout and activation; its state is MABN2d's and theirs."""


class SplitMABNAct2d(NormAct, SplitMABN2d):
    """SplitMABN2d, dropout and activation."""
