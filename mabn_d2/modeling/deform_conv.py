"""Detectron2's deformable convolutions with centred filters; they need its compiled operators."""

from collections.abc import Callable

import torch
from detectron2.layers.deform_conv import (
    DeformConv,
    ModulatedDeformConv,
    deform_conv,
    modulated_deform_conv,
)

from ..layers import center_weight
from .convolutions import apply_norm_and_activation


class CenDeformConv(DeformConv):
    """Detectron2's DeformConv with filters that are centred in the forward."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        if x.numel() == 0:
            return super().forward(x, offset)
        return _run(self, deform_conv, x, offset, center_weight(self.weight))


class CenModulatedDeformConv(ModulatedDeformConv):
    """Detectron2's ModulatedDeformConv with filters that are centred in the forward."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        if x.numel() == 0:
            return super().forward(x, offset, mask)
        weight = center_weight(self.weight)
        return _run(self, modulated_deform_conv, x, offset, mask, weight, self.bias)


def _run(
    conv: DeformConv | ModulatedDeformConv,
    operator: Callable[..., torch.Tensor],
    *tensors: torch.Tensor | None,
) -> torch.Tensor:
    """Return what a deformable convolution makes of the operator's tensors."""
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups, conv.deformable_groups
    return apply_norm_and_activation(conv, operator(*tensors, *geometry))
