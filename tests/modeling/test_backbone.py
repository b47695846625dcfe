"""mabn_d2/modeling/backbone.py and box_head.py."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from mabn_d2 import add_mabn_config
from mabn_d2.layers import MABN2d
from mabn_d2.modeling.convolutions import CenNormConv2d
from mabn_d2.modeling.norm import build_model
from repository_configs import load, narrow


def config(name, node=True, **resnets):
    cfg = get_cfg()
    if node:
        add_mabn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def count(model):
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return sum(isinstance(m, MABN2d) for m in model.modules())


@pytest.mark.parametrize("node", [True, False])
def test_same_keys_and_shapes_as_detectron2s(node):
    mabn = build_backbone(config("build_mabn_resnet_fpn_backbone", node))
    cfg = config("build_resnet_fpn_backbone", NORM="MABN")
    cfg.MODEL.FPN.NORM = "MABN"
    stock = build_backbone(cfg)
    assert {k: v.shape for k, v in mabn.state_dict().items()}.keys() == stock.state_dict().keys()
    assert count(mabn) == count(stock) == 53 + 8
    assert mabn.output_shape() == stock.output_shape()


@pytest.mark.parametrize("depth, norms", [(10, 12), (18, 20), (34, 36), (101, 104)])
def test_depths_and_widths(depth, norms):
    width = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8} if depth < 50 else {}
    resnet = build_backbone(config("build_mabn_resnet_backbone", DEPTH=depth, **width))
    assert count(resnet) == norms
    out = resnet.eval()(torch.randn(1, 3, 32, 32))
    channels = 8 if depth < 50 else 256
    assert [f.shape[1] for f in out.values()] == [channels * 2**i for i in range(4)]


def test_resnext_dilation_and_stride():
    cfg = config(
        "build_mabn_resnet_backbone",
        NUM_GROUPS=2,
        WIDTH_PER_GROUP=8,
        RES5_DILATION=2,
        STRIDE_IN_1X1=False,
    )
    resnet = build_backbone(cfg, ShapeSpec(channels=5))
    assert resnet.stem.conv1.in_channels == 5
    assert resnet.res3[0].conv1.stride == (1, 1) and resnet.res3[0].conv2.stride == (2, 2)
    assert resnet.res2[0].conv2.groups == 2 and resnet.res2[0].conv2.out_channels == 16
    assert resnet.output_shape()["res5"].stride == 16


def test_settings_come_from_the_node():
    cfg = config("build_mabn_resnet_backbone", DEPTH=18, RES2_OUT_CHANNELS=64)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.MODEL.MABN.WARMUP_ITERS, cfg.MODEL.MABN.CLIP_START = 7, 9
    norm = build_backbone(cfg).stem.conv1.norm
    assert (norm.batch_size, norm.window, norm.warmup_iters, norm.clip_start) == (2, 16, 7, 9)
    cfg.SOLVER.IMS_PER_BATCH = 5  # 32 / 5 rounds up to 7 iterations
    assert build_backbone(cfg).stem.conv1.norm.window == 7
    cfg.MODEL.MABN.BATCH_SIZE = 3
    with pytest.raises(ValueError, match=r"BATCH_SIZE \(3\) .*SIMULATED_BATCH_SIZE \(32\)"):
        build_backbone(cfg)


def test_freeze_at():
    cfg = config("build_mabn_resnet_backbone", DEPTH=18, RES2_OUT_CHANNELS=64)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    resnet = build_backbone(cfg).train()
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    resnet(torch.randn(2, 3, 64, 64))["res5"].sum().backward()
    after = resnet.state_dict()
    frozen = [k for k in after if k.startswith(("stem", "res2"))]
    assert len(frozen) == 5 * 7 and all(torch.equal(before[k], after[k]) for k in frozen)
    assert not torch.equal(
        before["res3.0.conv1.norm.running_var"], after["res3.0.conv1.norm.running_var"]
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("DEPTH", 20),
        ("NORM", "GN"),
        ("NORM", "BN"),
        ("DEFORM_ON_PER_STAGE", [False, True, True, True]),
        ("RES5_DILATION", 3),
    ],
)
def test_unsupported_settings(name, value):
    with pytest.raises(ValueError, match=f"MODEL.RESNETS.{name} is"):
        build_backbone(config("build_mabn_resnet_backbone", **{name: value}))


def test_published_initialization():
    weight = build_backbone(config("build_mabn_resnet_backbone")).res4[0].conv2.weight.detach()
    bound = (3 / weight[0].numel()) ** 0.5  # kaiming_uniform, a = 1, fan in
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert isinstance(
        build_backbone(config("build_mabn_resnet_backbone")).stem.conv1, CenNormConv2d
    )


def test_the_norm_changes_nothing_else():
    """Each row of the table, from its own config and as BN: one seed gives the same initial weights."""
    weights = {}
    for row in ("mabn", "bn", "brn", "gn", "syncbn"):
        for norm in (None, "BN"):
            cfg = narrow(f"scratch_mask_rcnn_R50_FPN_{row}_2x.yaml")
            if norm:  # the MABN config names a backbone that has no other norm
                cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
            for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
                cfg.MODEL[node].NORM = norm or cfg.MODEL[node].NORM
            torch.manual_seed(3)
            state = build_model(cfg).state_dict()
            weights[row, norm] = {k: v for k, v in state.items() if ".norm." not in k}
    first = weights["mabn", None]
    assert sum("backbone" in key or "conv" in key or "mask_fcn" in key for key in first) >= 69
    for other in weights.values():
        assert other.keys() == first.keys()
        assert all(torch.equal(value, first[key]) for key, value in other.items())


def test_box_convolutions_start_as_published():
    cfg = load("scratch_mask_rcnn_R50_FPN_bn_2x.yaml")
    head = build_model(cfg).roi_heads.box_head
    for conv in (head.conv1, head.conv4):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
    bound = (3 / head.fc1.in_features) ** 0.5  # Detectron2's, and the published
    assert head.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
