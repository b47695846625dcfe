"""Finds objects in photos with a trained model; writes pictures and COCO results.

    tools/predict.py --checkpoint output/own_data/model_best.pth photos/*.jpg --output predictions

The checkpoint holds the config and the class names. Images are files, folders or patterns. Exit status
1 if no image could be read or a file could not be written, 130 after Ctrl-C; predictions.json then holds
what was predicted before.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger

from ..command_names import name_commands
from ..config_files import find_config_file
from ..engine import ConfigError, one_line_errors, read_config
from ..engine.predict_files import find_images, predict_files
from ..predictor import load_predictor


def add_model_arguments(parser: argparse.ArgumentParser, threshold: float) -> None:
    """Add the options that name a trained model, and --threshold with its default value."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="a trained model (.pth)"
    )
    parser.add_argument(
        "--config-file",
        type=find_config_file,
        metavar="FILE",
        help="of the model, if the checkpoint holds no config",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=threshold,
        help="leave out lower scores; default: %(default)s",
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=name_commands(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", help="image files, folders, or patterns in quotes")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="FOLDER")
    parser.add_argument("--device", help='"cpu" or "cuda"; default: the GPU if there is one')
    add_model_arguments(parser, threshold=0.5)
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, and print a table."""
    args = parse_args(arguments)
    setup_logger(name="mabn_d2")
    check_threshold(args.threshold)
    _check_device(args.device)
    files = find_images(args.images, args.output)
    cfg = read_config(args.config_file) if args.config_file else None
    predictor = load_predictor(args.checkpoint, args.device, args.threshold, cfg)
    try:
        predicted = predict_files(predictor, files, args.output)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print(predicted.table)
    print(f"pictures and predictions.json: {args.output}")
    if predicted.skipped:
        print(f"skipped: {len(predicted.skipped)} of {len(files)} images can't be read")
    if not predicted.images:
        sys.exit(1)


def check_threshold(threshold: float) -> None:
    """Raise ConfigError for a score that no object can have."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold is {threshold}: use a number from 0 to 1")


def _check_device(device: str) -> None:
    try:
        type = torch.device(device or "cpu").type
    except RuntimeError as error:
        raise ConfigError(f'--device is {device!r}: use "cpu" or "cuda"') from error
    if type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {device!r}, but there is no GPU: use --device cpu")
