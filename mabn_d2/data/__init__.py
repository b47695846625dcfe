"""Datasets that come with the plugin, and the training loader."""

from .digit_scenes import register_digit_scenes

__all__ = ["register_digit_scenes"]
