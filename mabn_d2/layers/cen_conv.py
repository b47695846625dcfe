"""Convolution with zero-centred filters, the companion of MABN2d."""

from torch import nn


def center_weight(weight):
    """Return weight (O, I, kH, kW) minus its mean over input channels and kernel, per filter."""
    return weight - weight.mean(dim=(1, 2, 3), keepdim=True)


class CenConv2d(nn.Conv2d):
    """`nn.Conv2d` whose filters are centred in the forward (section 4.2 of the paper, "weight
    centralization"); arguments, parameters and state are those of `nn.Conv2d`.

    Where inputs have equal means over a filter's channels, its outputs have a mean of zero, which
    is why MABN2d subtracts none. The stored weight itself is free: its mean gets no gradient.
    """

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, center_weight(weight), bias)
