"""Detectron2's convolutions, which hold their norm and activation, with centred filters."""

import torch
from detectron2.layers import Conv2d

from ..layers import CenConv2d


class CenNormConv2d(CenConv2d, Conv2d):
    """Detectron2's Conv2d with filters that are centred in the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        return apply_norm_and_activation(self, self._conv_forward(x, self.weight, self.bias))


def apply_norm_and_activation(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return the output x of `conv` behind the norm and the activation that it holds, if any.

    Args:
        conv: one of Detectron2's convolutions, deformable ones too.
        x: (N, out_channels, H, W).
    Returns:
        The same shape.
    """
    if conv.norm is not None:
        x = conv.norm(x)
    return x if conv.activation is None else conv.activation(x)
