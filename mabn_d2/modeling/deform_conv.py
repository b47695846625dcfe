"""Detectron2's deformable convolutions with centred filters; they need its compiled operators."""

import torch
from detectron2.layers.deform_conv import (
    DeformConv,
    ModulatedDeformConv,
    deform_conv,
    modulated_deform_conv,
)

from ..layers import center_weight


class CenDeformConv(DeformConv):
    """Detectron2's DeformConv with filters that are centred in the forward."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        if x.numel() == 0:
            return super().forward(x, offset)
        x = deform_conv(
            x,
            offset,
            center_weight(self.weight),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deformable_groups,
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class CenModulatedDeformConv(ModulatedDeformConv):
    """Detectron2's ModulatedDeformConv with filters that are centred in the forward."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        if x.numel() == 0:
            return super().forward(x, offset, mask)
        x = modulated_deform_conv(
            x,
            offset,
            mask,
            center_weight(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deformable_groups,
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
