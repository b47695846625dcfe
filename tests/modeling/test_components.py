"""MABN and BRN in every component of Detectron2 that takes a norm."""

import copy
from importlib.util import find_spec

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling import Backbone, build_model
from detectron2.modeling.backbone.regnet import (
    AnyNet,
    ResBasicBlock,
    ResBottleneckBlock,
    ResStem,
    SimpleStem,
    VanillaBlock,
)
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.events import EventStorage
from torch import nn

from detectors import narrow_cfg, randomized
from inputs import training_inputs
from mabn_d2 import add_mabn_config, configure_mabn, fold_mabn
from mabn_d2.layers import BatchRenorm2d, CenConv2d, CenConvTranspose2d, MABN2d, PerLevelNorm
from mabn_d2.modeling.convolutions import CenNormConv2d
from mabn_d2.solver import build_optimizer


def build(name, *opts):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    narrow = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.BACKBONE.FREEZE_AT",
        0,
        "SOLVER.IMS_PER_BATCH",
        2,
        "MODEL.RESNETS.NORM",
        "MABN",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        4,
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
        4,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        8,
    ]
    cfg.merge_from_list([*narrow, *opts])
    return build_model(cfg)


def centred(module):
    """Number of MABN layers, each behind a centred convolution of its own."""
    norms = [m for m in module.modules() if isinstance(m, MABN2d)]
    convs = [m for m in module.modules() if isinstance(m, (CenConv2d, CenNormConv2d))]
    assert len(norms) == len(convs)
    return len(norms)


@pytest.mark.parametrize(
    "name, opts, in_backbone, in_heads",
    [
        ("Base-RCNN-C4.yaml", [], 43, 10),  # res5 is the box head
        ("Base-RCNN-DilatedC5.yaml", [], 53, 0),
        ("Base-RCNN-FPN.yaml", ["MODEL.FPN.NORM", "MABN"], 61, 0),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            ["MODEL.SEM_SEG_HEAD.NORM", "MABN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8],
            53,
            7,
        ),
        (
            "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
            [
                "MODEL.ROI_BOX_HEAD.NAME",
                "FastRCNNConvFCHead",
                "MODEL.ROI_BOX_HEAD.NUM_CONV",
                2,
                "MODEL.ROI_BOX_HEAD.NORM",
                "MABN",
                "MODEL.ROI_MASK_HEAD.NORM",
                "MABN",
            ],
            53,
            10,
        ),
    ],
)
def test_meta_architectures(name, opts, in_backbone, in_heads):
    model = build(name, "MODEL.FPN.OUT_CHANNELS", 8, *opts)
    assert centred(model.backbone) == in_backbone and centred(model) == in_backbone + in_heads
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    "name, res5, dilation",
    [("Base-RCNN-C4.yaml", "roi_heads.res5", 1), ("Base-RCNN-DilatedC5.yaml", "backbone.res5", 2)],
)
def test_training_step_without_fpn(name, res5, dilation):
    """C4 runs res5 on RoIs, as its box head; DilatedC5 has dilation where the others have a stride."""
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50]
    model = build(name, "MODEL.MASK_ON", True, *opts)
    assert model.get_submodule(f"{res5}.2.conv2").dilation == (dilation, dilation)
    before = copy.deepcopy(model.state_dict())
    with EventStorage():
        sum(model.train()(training_inputs(96, 96)).values()).backward()
    build_optimizer(narrow_cfg(), model).step()
    norms = [m for m in model.modules() if isinstance(m, MABN2d)]
    assert all(m.iters == 1 and m.weight.grad.isfinite().all() for m in norms)
    after = model.state_dict()
    for key in (
        f"{res5}.2.conv2.weight",
        f"{res5}.2.conv2.norm.running_var",
        "backbone.stem.conv1.weight",
    ):
        assert not torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("block", [VanillaBlock, ResBasicBlock, ResBottleneckBlock])
@pytest.mark.parametrize("stem", [SimpleStem, ResStem])
def test_regnet(stem, block):
    net = AnyNet(
        stem_class=stem,
        stem_width=8,
        block_class=block,
        depths=[1, 2],
        widths=[8, 16],
        group_widths=[4, 4],
        strides=[1, 2],
        bottleneck_ratios=[1.0, 1.0],
        se_ratio=0.25,
        activation_class=nn.ReLU,
        norm="MABN",
    )
    plain = {VanillaBlock: 7, ResBasicBlock: 8, ResBottleneckBlock: 11}[block]
    assert centred(net) == plain
    net(torch.randn(2, 3, 64, 64))["s2"].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", [RetinaNetHead, FCOSHead])
@pytest.mark.parametrize("norm, layer", [("MABN", MABN2d), ("BRN", BatchRenorm2d)])
def test_shared_heads_have_statistics_per_level(kind, norm, layer):
    def head(norm):
        anchors = {"num_anchors": 1} if kind is RetinaNetHead else {}  # FCOS always has one
        return kind(
            input_shape=[ShapeSpec(channels=8)] * 3,
            num_classes=4,
            conv_dims=[8, 8],
            norm=norm,
            **anchors,
        )

    model, plain = head(norm), head("BN")
    lists = [m for m in model.modules() if isinstance(m, PerLevelNorm)]
    assert len(lists) == 4 == sum(isinstance(m, CycleBatchNormList) for m in plain.modules())
    assert all(type(n) is layer for levels in lists for n in levels)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    convs = [model.cls_subnet[0], model.bbox_subnet[3]]
    assert all((type(c) is CenConv2d) == (norm == "MABN") for c in convs)

    levels = [k * torch.randn(2, 8, 16 // k, 16 // k) for k in (1, 2, 4)]
    outputs = model(levels)
    sum(t.square().sum() for level in outputs for t in level).backward()
    first = model.cls_subnet[1]
    for norm, x in zip(first, levels, strict=True):
        z = model.cls_subnet[0](x)
        kept = norm.momentum
        moment = z.square() if layer is MABN2d else (z - z.mean((0, 2, 3), keepdim=True)).square()
        wanted = kept + (1 - kept) * moment.mean((0, 2, 3))
        torch.testing.assert_close(norm.running_var, wanted)
        assert norm.weight is first[0].weight
    assert first[0].weight.grad.any()


def test_deformable_convolutions():
    """The pure Python copy of Detectron2 has none; the official build centres them."""
    stages = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]]
    if find_spec("detectron2._C") is None:
        with pytest.raises(ImportError, match="not compiled"):
            build("Base-RCNN-FPN.yaml", *stages)
        return
    from mabn_d2.modeling.deform_conv import CenDeformConv, CenModulatedDeformConv

    for modulated, kind in ((False, CenDeformConv), (True, CenModulatedDeformConv)):
        opts = [*stages, "MODEL.RESNETS.DEFORM_MODULATED", modulated]
        block = build("Base-RCNN-FPN.yaml", *opts).backbone.bottom_up.res5[0]
        stock = build("Base-RCNN-FPN.yaml", *opts, "MODEL.RESNETS.NORM", "FrozenBN")
        stock = stock.backbone.bottom_up.res5[0].eval()
        assert type(block.conv2) is kind and type(block.conv2.norm) is MABN2d
        randomized(block)
        block.conv2_offset.weight.data.normal_(std=0.1)
        folded = fold_mabn(block)
        stock.load_state_dict(folded.state_dict(), strict=True)
        assert type(folded.conv2) is kind.__base__
        if not modulated:  # those need a GPU
            x = torch.randn(1, block.in_channels, 8, 8)
            with torch.no_grad():
                assert torch.equal(stock(x), block(x))
            with pytest.raises(ValueError, match="conv2.norm: CenDeformConv has no bias"):
                fold_mabn(block, "conv")


def test_trident_convolution():
    """Of a project that is not installed with Detectron2 (projects/TridentNet on the path)."""
    TridentConv = pytest.importorskip("tridentnet.trident_conv").TridentConv
    dilations = {"paddings": [1, 2, 3], "dilations": [1, 2, 3], "num_branch": 3}
    conv = TridentConv(3, 4, 3, norm=get_norm("MABN", 4), **dilations)
    assert type(conv).__name__ == "CenTridentConv"
    images = [torch.randn(1, 3, 8, 8) for _ in range(3)]
    conv(images)
    randomized(conv)
    stock = TridentConv(3, 4, 3, norm=get_norm("BN", 4), **dilations).eval()
    stock.load_state_dict(fold_mabn(conv, "batch_norm").state_dict(), strict=True)
    for folded in (stock, fold_mabn(conv, "conv")):
        for found, expected in zip(folded(images), conv(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_centred_is_an_error_at_build():
    with pytest.raises(TypeError, match="AvgPool2d can't be"):
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), get_norm("MABN", 4))
    with pytest.raises(ValueError, match="0.0 in .*ModuleList.*known class.*use another norm"):
        configure_mabn(nn.ModuleList([nn.ModuleList([get_norm("MABN", 4)])]))


def test_transposed_convolution_of_simple_feature_pyramid():
    """ViTDet's neck: ConvTranspose2d, norm, GELU."""
    net = SimpleFeaturePyramid(
        Features(), "x", out_channels=8, scale_factors=(4.0, 2.0, 1.0), norm="MABN", square_pad=64
    )
    assert sum(isinstance(m, CenConvTranspose2d) for m in net.modules()) == 1
    net(torch.randn(1, 8, 4, 4))["p2"].sum().backward()
    randomized(net)
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        for into in ("frozen_bn", "conv"):
            found, expected = fold_mabn(net, into)(x), net(x)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


class Features(Backbone):
    """Returns its input as the features of stride 16."""

    def __init__(self):
        super().__init__()
        self._out_feature_channels, self._out_feature_strides = {"x": 8}, {"x": 16}
        self._out_features = ["x"]

    def forward(self, x):
        return {"x": x}
