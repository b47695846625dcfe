"""Weights in and out: conversion, folding, recalibration, files that are safe to read and write."""

from .checkpointer import SafeCheckpointer
from .detector import convert_detector
from .imagenet import convert_imagenet
from .io import CheckpointError, read_checkpoint, weights_file, write_checkpoint
from .record import differences, record_of_config, warn_of_differences
from .stock_detector import fold_detector, load_whole

__all__ = [
    "CheckpointError",
    "SafeCheckpointer",
    "convert_detector",
    "convert_imagenet",
    "differences",
    "fold_detector",
    "load_whole",
    "read_checkpoint",
    "record_of_config",
    "warn_of_differences",
    "weights_file",
    "write_checkpoint",
]
