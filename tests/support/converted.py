"""A converted classifier compared with its source."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from mabn_d2 import add_mabn_config
from mabn_d2.modeling.backbone import build_mabn_resnet_backbone

PREFIX = "backbone.bottom_up."
STAGES = ["res2", "res3", "res4", "res5"]


def cfg_of(checkpoint):
    """The config that the record asks for."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    for key, value in checkpoint["mabn_d2"]["config"].items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = STAGES
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    return cfg


def backbone_of(checkpoint):
    """The Detectron2 backbone that the record asks for, with the converted weights."""
    backbone = build_mabn_resnet_backbone(cfg_of(checkpoint), ShapeSpec(channels=3))
    state = {name.removeprefix(PREFIX): value for name, value in checkpoint["model"].items()}
    backbone.load_state_dict(state, strict=True)
    return backbone.eval()


def assert_same_features(source, checkpoint, size=64):
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = source.eval().features(x), backbone_of(checkpoint)(x)
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert value.std() > 1e-2 and error < 1e-4, (name, error)
