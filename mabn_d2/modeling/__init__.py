"""Detectron2's models with MABN."""

from . import norm, surgery_of_detectron2
from .backbone import (
    PublishedResNet,
    build_mabn_resnet_backbone,
    build_mabn_resnet_fpn_backbone,
)
from .box_head import PublishedConvFCHead
from .norm import configure_mabn

__all__ = [
    "PublishedConvFCHead",
    "PublishedResNet",
    "build_mabn_resnet_backbone",
    "build_mabn_resnet_fpn_backbone",
    "configure_mabn",
]

surgery_of_detectron2.register()
norm.register()
