"""Converts checkpoints: classifiers and detectors to Detectron2, MABN to stock norms."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import setup_logger

from ..config_files import find_config_file
from ..engine import one_line_errors
from ..engine.convert_file import convert_file
from ..surgery.fold import INTO


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "imagenet": "ResNet classifier -> weights of a Detectron2 backbone with MABN",
        "detector": "maskrcnn-benchmark detector with MABN -> Detectron2",
        "fold": "Detectron2 detector with MABN -> stock Detectron2; prints the config for it",
    }
    for command, help in helps.items():
        sub = commands.add_parser(command, help=help, description=help)
        if command == "fold":
            sub.add_argument(
                "--config-file",
                type=find_config_file,
                metavar="FILE",
                help="the detector's; default: that in the file",
            )
            sub.add_argument("--into", choices=INTO, default=INTO[0], help="default: %(default)s")
        else:
            sub.add_argument(
                "--keep-buffers", action="store_true", help="keep MABN's windows and counters"
            )
            stride = sub.add_mutually_exclusive_group()
            for where in ("1x1", "3x3"):
                stride.add_argument(
                    f"--stride-in-{where}",
                    dest="stride_in_1x1",
                    action="store_const",
                    const=where == "1x1",
                    help="where bottleneck blocks stride in the source (recorded)",
                )
            sub.add_argument("--channel-order", choices=("BGR", "RGB"), help="recorded")
            for name in ("mean", "std"):
                sub.add_argument(
                    f"--pixel-{name}", nargs=3, type=float, metavar="X", help="recorded; 0-255"
                )
        sub.add_argument("--overwrite", action="store_true", help="replace an existing output")
        sub.add_argument("input", type=Path)
        sub.add_argument("output", type=Path, help=".pth or .pkl")
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert; an error is one line and exit status 1."""
    args = parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # stdout has the config that "fold" prints
        setup_logger(name="mabn_d2")
    convert_file(args)
