"""timm's convolutions: "same" padding with centred filters; weight standardization is centred."""

import torch
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.std_conv import StdConv2d, StdConv2dSame

from ..layers import center_weight
from .convolutions import register_centred, register_standardized


class CenConv2dSame(Conv2dSame):
    """timm's Conv2dSame with filters that are centred in the forward."""

    # torch annotates them for convolutions of any number of dimensions.
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        return conv2d_same(
            x,
            center_weight(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


register_centred(Conv2dSame, CenConv2dSame)
register_standardized(StdConv2d, StdConv2dSame)
