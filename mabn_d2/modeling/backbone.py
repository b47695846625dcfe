"""ResNet and ResNet-FPN backbones whose every norm is MABN."""

import logging
from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from ..config_keys import get_key
from .norm import NORM, configure_mabn
from .norm_table import norm_settings
from .registry import register

# What a NORM of the backbones of MABN may be.
MABN_OR_ANOTHER = (
    f'"{NORM}", or set MODEL.BACKBONE.NAME build_any_norm_resnet_fpn_backbone for another norm'
)
BLOCKS_PER_STAGE = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class PublishedResNet(ResNet):
    """Detectron2's ResNet, its convolutions in the published initial state: kaiming_uniform, a = 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight_init.c2_xavier_fill(module)


@register(BACKBONE_REGISTRY)
def build_mabn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet with MABN behind every convolution, its weights in the published init.

    MODEL.RESNETS is read as by Detectron2's `build_resnet_backbone`, except that

    - the norm is MABN, whether NORM says "MABN" or is left at Detectron2's default;
    - the basic-block depths (10, 18, 34) take any STEM_OUT_CHANNELS and RES2_OUT_CHANNELS.

    Raises:
        ValueError: for a setting that this backbone does not have.
    """
    _check_norm(cfg, "RESNETS", "FrozenBN")
    return configure_mabn(_build_resnet(cfg, input_shape, NORM), **norm_settings(cfg))


def _build_resnet(cfg: CfgNode, input_shape: ShapeSpec, norm: str) -> ResNet:
    node = cfg.MODEL.RESNETS
    basic = node.DEPTH < 50
    _check(
        node.DEPTH in BLOCKS_PER_STAGE, cfg, "MODEL.RESNETS.DEPTH", f"one of {[*BLOCKS_PER_STAGE]}"
    )
    _check(not any(node.DEFORM_ON_PER_STAGE), cfg, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", "all False")
    _check(
        node.RES5_DILATION in ((1,) if basic else (1, 2)),
        cfg,
        "MODEL.RESNETS.RES5_DILATION",
        "1, or 2 from depth 50 on",
    )
    _check(not basic or node.NUM_GROUPS == 1, cfg, "MODEL.RESNETS.NUM_GROUPS", "1 below depth 50")

    in_channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    bottleneck_channels = node.NUM_GROUPS * node.WIDTH_PER_GROUP
    stem = BasicStem(input_shape.channels, in_channels, norm=norm)
    stages = []
    for stage, num_blocks in enumerate(BLOCKS_PER_STAGE[node.DEPTH], start=2):
        dilation = node.RES5_DILATION if stage == 5 else 1
        first_stride = 1 if stage == 2 or dilation == 2 else 2
        kwargs: dict[str, Any] = {
            "stride_per_block": [first_stride] + [1] * (num_blocks - 1),
            "norm": norm,
        }
        if not basic:
            kwargs |= {
                "bottleneck_channels": bottleneck_channels,
                "num_groups": node.NUM_GROUPS,
                "stride_in_1x1": node.STRIDE_IN_1X1,
                "dilation": dilation,
            }
        stages.append(
            ResNet.make_stage(
                BasicBlock if basic else BottleneckBlock,
                num_blocks,
                in_channels=in_channels,
                out_channels=out_channels,
                **kwargs,
            )
        )
        in_channels, out_channels = out_channels, out_channels * 2
        bottleneck_channels *= 2

    resnet = PublishedResNet(stem, stages, out_features=node.OUT_FEATURES)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@register(BACKBONE_REGISTRY)
def build_mabn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an FPN over `build_mabn_resnet_backbone`, MABN in its convolutions too.

    MODEL.FPN is read as by Detectron2's `build_resnet_fpn_backbone`, except that the norm is MABN
    whether NORM says so or is left empty, Detectron2's default.

    Raises:
        ValueError: for a setting that this backbone does not have.
    """
    _check_norm(cfg, "FPN", "")
    fpn = _build_fpn(cfg, build_mabn_resnet_backbone(cfg, input_shape), NORM)
    return configure_mabn(fpn, **norm_settings(cfg))


@register(BACKBONE_REGISTRY)
def build_any_norm_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build what `build_mabn_resnet_fpn_backbone` builds under RESNETS.NORM and FPN.NORM, any norm.

    The baselines' configs use it, so that a comparison changes the norms only: depths, widths and
    initial weights are the same for every norm.
    """
    resnet = _build_resnet(cfg, input_shape, cfg.MODEL.RESNETS.NORM)
    return _build_fpn(cfg, resnet, cfg.MODEL.FPN.NORM)


def _build_fpn(cfg: CfgNode, bottom_up: ResNet, norm: str) -> FPN:
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=norm,
        top_block=LastLevelMaxPool(),
        fuse_type=node.FUSE_TYPE,
    )


def _check_norm(cfg: CfgNode, node: str, default: str) -> None:
    """Take MABN, or Detectron2's default, and say that MABN comes in its place."""
    key, value = f"MODEL.{node}.NORM", cfg.MODEL[node].NORM
    _check(value in (NORM, default), cfg, key, MABN_OR_ANOTHER)
    if value != NORM:
        logging.getLogger(__name__).info(
            f"{key} is {value!r}, Detectron2's default, in whose place {cfg.MODEL.BACKBONE.NAME} puts "
            f"{NORM}"
        )


def _check(good: bool, cfg: CfgNode, key: str, wanted: str) -> None:
    if not good:
        raise ValueError(
            f"{key} is {get_key(cfg, key)!r}, which {cfg.MODEL.BACKBONE.NAME} does not support: set it to "
            f"{wanted}"
        )
