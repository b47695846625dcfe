"""Writes a trained detector to a file that runs without Detectron2 and without this package.

    tools/export_model.py --checkpoint output/own_data/model_best.pth --format onnx \\
        --output detector.onnx --images photos/*.jpg

The file takes one image, (C, H, W) float32, 0-255, and gives boxes, classes, scores and masks. It is
compared with the model before it is written. docs/export.md shows how to run it.
"""

import argparse
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from ..command_names import name_commands
from ..engine import one_line_errors, read_config
from ..engine.predict_files import find_images
from ..export import FORMATS, export_checkpoint
from .predict import add_model_arguments, check_threshold


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=name_commands(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="pixels of the image to trace with; default: by INPUT.MIN_SIZE_TEST",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="compare on these images too: files, folders, or patterns in quotes",
    )
    add_model_arguments(parser, threshold=0.05)
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Export, and say what was written."""
    args = parse_args(arguments)
    setup_logger(name="mabn_d2")
    check_threshold(args.threshold)
    images = find_images(args.images)
    print(f"exporting {args.checkpoint} as {args.format}: this takes about a minute", flush=True)
    said = export_checkpoint(
        args.checkpoint,
        args.format,
        args.output,
        args.image_size and tuple(args.image_size),
        images,
        args.threshold,
        read_config(args.config_file) if args.config_file else None,
    )
    print(f"{args.output}: {said}")
