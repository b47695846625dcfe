"""The convolution of Detectron2's TridentNet project with centred filters."""

import torch
import torch.nn.functional as F
from tridentnet.trident_conv import TridentConv

from ..layers import center_weight
from ..surgery.convolutions import register_centred


class CenTridentConv(TridentConv):
    """TridentConv, one convolution in several dilations, with filters centred in the forward."""

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """A list of (N, in_channels, H, W), one for each branch -> outputs of the branches."""
        if inputs[0].numel() == 0:
            return super().forward(inputs)
        branches = list(zip(self.paddings, self.dilations, strict=True))
        if not self.training and self.test_branch_idx != -1:
            branches = [branches[self.test_branch_idx]]
        weight = center_weight(self.weight)
        outputs = [
            F.conv2d(x, weight, self.bias, self.stride, padding, dilation, self.groups)
            for x, (padding, dilation) in zip(inputs, branches, strict=True)
        ]
        if self.norm is not None:
            outputs = [self.norm(x) for x in outputs]
        if self.activation is not None:
            outputs = [self.activation(x) for x in outputs]
        return outputs


register_centred(TridentConv, CenTridentConv)
