"""Datasets that come with the plugin, and the training loader."""

from .coco_check import BadAnnotationError, check_coco
from .digit_scenes import LIT_SCENES, register_digit_scenes

__all__ = ["LIT_SCENES", "BadAnnotationError", "check_coco", "register_digit_scenes"]
