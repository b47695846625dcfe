"""Weights in and out: conversion, folding, recalibration, files that are safe to read and write."""

from .checkpointer import SafeCheckpointer
from .detector import convert_detector
from .fold import fold_detector, fold_mabn, load_whole, stock_config
from .imagenet import convert_imagenet
from .io import CheckpointError, read_checkpoint, write_checkpoint
from .recalibrate import layers_to_recalibrate, update_mabn_stats
from .record import differences, warn_of_differences

__all__ = [
    "CheckpointError",
    "SafeCheckpointer",
    "convert_detector",
    "convert_imagenet",
    "differences",
    "fold_detector",
    "fold_mabn",
    "layers_to_recalibrate",
    "load_whole",
    "read_checkpoint",
    "stock_config",
    "update_mabn_stats",
    "warn_of_differences",
    "write_checkpoint",
]
