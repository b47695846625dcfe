"""Detectron2's convolutions, which hold their norm and activation, with centred filters."""

import torch
from detectron2.layers import Conv2d

from ..layers import CenConv2d


class CenNormConv2d(CenConv2d, Conv2d):
    """Detectron2's Conv2d with filters that are centred in the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
