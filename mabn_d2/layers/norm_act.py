"""MABN with the dropout and activation that some libraries put into their BatchNorm."""

from typing import Any

import torch
from torch import nn

from .mabn import MABN2d
from .split_norms import SplitMABN2d


class MABNAct2d(MABN2d):
    """MABN2d followed by its children `drop` and `act`, as in timm's BatchNormAct2d.

    Args:
        num_features: C.
        drop, act: modules, nn.Identity for none.
        settings: the other arguments of MABN2d.
    """

    # What `convert_mabn` made it from, without parameters, buffers and children.
    stock: nn.Module

    def __init__(self, num_features: int, drop: nn.Module, act: nn.Module, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize, drop and activate x: (N, C, H, W) -> the same shape."""
        return self.act(self.drop(super().forward(x)))


class SplitMABNAct2d(MABNAct2d, SplitMABN2d):
    """SplitMABN2d followed by its children `drop` and `act`."""


MABNAct2d.FORMS = {False: MABNAct2d, True: SplitMABNAct2d}
