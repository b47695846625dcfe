"""torchvision's deformable convolution with centred filters."""

import torch
from torchvision.ops import DeformConv2d, deform_conv2d

from ..layers import center_weight
from .convolutions import register_centred


class CenDeformConv2d(DeformConv2d):
    """torchvision's DeformConv2d with filters that are centred in the forward."""

    def forward(
        self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        return deform_conv2d(
            input,
            offset,
            center_weight(self.weight),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )


register_centred(DeformConv2d, CenDeformConv2d)
