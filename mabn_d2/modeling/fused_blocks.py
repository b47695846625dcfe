"""Detectron2's ResNet blocks without the ReLU that the norms in them apply, see `fuse_relu`.

The last norm of a block is added to the shortcut before the ReLU, and can't apply it.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock


class FusedBasicStem(BasicStem):
    """BasicStem; the norm of conv1 applies the ReLU."""

    with_relu = ("conv1",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    """BasicBlock; the norm of conv1 applies the ReLU."""

    with_relu = ("conv1",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        out = self.conv2(self.conv1(x))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class FusedBottleneckBlock(BottleneckBlock):
    """BottleneckBlock; the norms of conv1 and conv2 apply the ReLU."""

    with_relu = ("conv1", "conv2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        out = self.conv3(self.conv2(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)
