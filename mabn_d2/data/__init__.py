"""Datasets that come with the plugin, and the training loader."""

from .coco_check import check_coco
from .digit_scenes import LIT_SCENES, register_digit_scenes
from .errors import BadAnnotationError, DataError

__all__ = ["LIT_SCENES", "BadAnnotationError", "DataError", "check_coco", "register_digit_scenes"]
