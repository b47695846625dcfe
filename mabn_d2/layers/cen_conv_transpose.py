"""Transposed convolution with zero-centred filters."""

import torch
import torch.nn.functional as F
from torch import nn


def center_transposed_weight(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Return weight (I, O / groups, kH, kW) minus its mean over the filter of each output channel."""
    by_group = weight.unflatten(0, (groups, -1))
    return (by_group - by_group.mean((1, 3, 4), keepdim=True)).flatten(0, 1)


class CenConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose filters are centred in the forward, see `CenConv2d`.

    Arguments, parameters and state are those of `nn.ConvTranspose2d`. With a stride each output
    pixel sees a part of the filter only; the mean of the outputs over all pixels is still zero if
    the inputs have equal means over a filter's channels.
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            input,
            center_transposed_weight(self.weight, self.groups),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
