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

from detectors import fused, randomized
from mabn_d2 import fuse_relu, unfuse_relu
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
    net, levels = fuse_relu(copy.deepcopy(plain)), [torch.randn(2, 8, n, n) for n in (8, 4, 2)]
    assert fused(net) == 4 * 3 and list(net.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(net(levels), plain(levels), rtol=0, atol=0)


def test_what_is_left_alone():
    norm, made = MABN2d(4), MABN2d(4, activation="relu")
    shared = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()) for _ in range(2))
    assert fused(fuse_relu(shared)) == 0
    net = nn.Sequential(Conv2d(3, 4, 3, norm=made), nn.ReLU())
    assert fused(unfuse_relu(fuse_relu(net))) == 1
