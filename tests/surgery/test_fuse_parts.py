"""surgery/fuse_relu.py, on every component of Detectron2 with a ReLU behind a norm, and on others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BasicStem, regnet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn
from torchvision.models import resnet18, vgg11_bn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.segmentation import deeplabv3_resnet50

from detectors import fused, randomized
from mabn_d2 import convert_mabn, fuse_relu, unfuse_relu
from mabn_d2.layers import MABN2d


def regnet_of(stem, block):
    return regnet.AnyNet(
        stem_class=stem,
        stem_width=8,
        block_class=block,
        depths=[1],
        widths=[16],
        group_widths=[4],
        strides=[1],
        bottleneck_ratios=[1.0],
        se_ratio=0.25,
        activation_class=nn.ReLU,
        norm="MABN",
    )


@pytest.mark.parametrize("make, count", [
    (lambda: BasicStem(3, 8, norm="MABN"), 1),
    (lambda: BasicBlock(3, 3, norm="MABN"), 1),
    (lambda: BottleneckBlock(3, 8, bottleneck_channels=4, norm="MABN"), 2),
    (lambda: Conv2d(3, 4, 3, norm=get_norm("MABN", 4), activation=F.relu), 1),
    (lambda: Conv2d(3, 4, 3, norm=get_norm("MABN", 4), activation=F.gelu), 0),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), get_norm("MABN", 4), nn.ReLU(inplace=True)), 1),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), get_norm("MABN", 4), nn.ReLU6()), 0),
    (lambda: regnet_of(regnet.ResStem, regnet.VanillaBlock), 3),
    (lambda: regnet_of(regnet.SimpleStem, regnet.ResBasicBlock), 2),
    (lambda: regnet_of(regnet.SimpleStem, regnet.ResBottleneckBlock), 3),
    (lambda: type("Own", (BasicStem,), {})(3, 8, norm="MABN"), 0),
    (lambda: BasicStem(3, 8, norm="BN"), 0),
])  # fmt: skip
def test_parts(make, count):
    plain = randomized(make())
    net, x = fuse_relu(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
    assert fused(net) == count and list(net.state_dict()) == list(plain.state_dict())
    for mode in (False, True):
        found, expected = (m.train(mode)(x) for m in (net, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [RetinaNetHead, FCOSHead])
def test_heads_over_levels(kind):
    anchors = {"num_anchors": 1} if kind is RetinaNetHead else {}
    plain = kind(
        input_shape=[ShapeSpec(channels=8)] * 3,
        num_classes=4,
        conv_dims=[8, 8],
        norm="MABN",
        **anchors,
    )
    net = fuse_relu(copy.deepcopy(nn.ModuleList([plain])))[0]
    levels = [torch.randn(2, 8, n, n) for n in (8, 4, 2)]
    assert fused(net) == 4 * 3 and list(net.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(net(levels), plain(levels), rtol=0, atol=0)


class Stages(nn.Module):
    """An nn.Sequential, run as a whole or part by part, with or without keeping what a norm returns."""

    def __init__(self, how, nested):
        super().__init__()
        parts = [nn.Conv2d(3, 4, 3), get_norm("MABN", 4), nn.ReLU()]
        parts = [*parts, nn.Conv2d(4, 4, 3), get_norm("MABN", 4), nn.ReLU()]
        self.parts = nn.Sequential(nn.Sequential(*parts)) if nested else nn.Sequential(*parts)
        self.how, self.nested = how, nested

    def forward(self, x):
        if self.how == "whole":
            return [self.parts(x)]
        if self.how == "no trace" and x.mean() > 1e6:
            return [x]
        outputs = []
        for i, part in enumerate(self.parts[0] if self.nested else self.parts):
            x = part(x)
            if i in (1, 4, 5):
                outputs.append(x)
        return outputs


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how, count", [("whole", 2), ("kept", 0), ("no trace", 0)])
def test_parts_of_a_sequence_that_are_kept(how, count, nested):
    plain = randomized(Stages(how, nested))
    net, x = nn.Sequential(fuse_relu(copy.deepcopy(plain))), torch.randn(2, 3, 8, 8)
    assert fused(net) == fused(fuse_relu(nn.Sequential(copy.deepcopy(plain)))) == count
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("make, count", [
    (lambda: maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None), 8),
    (lambda: deeplabv3_resnet50(weights=None, weights_backbone=None), 6),
    (vgg11_bn, 8),
    (resnet18, 0),  # its blocks have one ReLU for two norms
])  # fmt: skip
def test_torchvision_models_are_fused(make, count):
    with torch.device("meta"):
        assert fused(fuse_relu(convert_mabn(make()))) == count


def test_what_is_left_alone():
    norm, made = MABN2d(4), MABN2d(4, activation="relu")
    shared = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()) for _ in range(2))
    assert fused(fuse_relu(shared)) == 0
    net = nn.Sequential(Conv2d(3, 4, 3, norm=made), nn.ReLU())
    assert fused(unfuse_relu(fuse_relu(net))) == 1
