"""Transposed convolution with zero-centred filters."""

from typing import Any, cast

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
        # torch annotates these tuples as lists and strings.
        stride, padding, kernel, dilation = cast(
            Any, (self.stride, self.padding, self.kernel_size, self.dilation)
        )
        output_padding = self._output_padding(
            input, output_size, stride, padding, kernel, 2, dilation
        )
        weight = center_transposed_weight(self.weight, self.groups)
        return F.conv_transpose2d(
            input, weight, self.bias, stride, padding, output_padding, self.groups, dilation
        )
