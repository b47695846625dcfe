"""Detectron2's models with MABN."""

from .backbone import build_mabn_resnet_backbone, build_mabn_resnet_fpn_backbone
from .convert import convert_mabn
from .norm import configure_mabn, register

__all__ = [
    "build_mabn_resnet_backbone",
    "build_mabn_resnet_fpn_backbone",
    "configure_mabn",
    "convert_mabn",
]

register()
