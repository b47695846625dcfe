"""Detectron2's models with MABN."""

from .backbone import (
    PublishedResNet,
    build_mabn_resnet_backbone,
    build_mabn_resnet_fpn_backbone,
)
from .box_head import PublishedConvFCHead
from .norm import configure_mabn, register

__all__ = [
    "PublishedConvFCHead",
    "PublishedResNet",
    "build_mabn_resnet_backbone",
    "build_mabn_resnet_fpn_backbone",
    "configure_mabn",
]

register()
