#!/usr/bin/env python
"""Converts checkpoints: classifiers and detectors to Detectron2, MABN to FrozenBN."""

import argparse
import sys
import time
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import setup_logger

from mabn_d2.checkpoint import (
    CheckpointError,
    convert_detector,
    convert_imagenet,
    read_checkpoint,
    write_checkpoint,
)
from mabn_d2.checkpoint.io import check_output
from mabn_d2.checkpoint.record import KEY
from mabn_d2.checkpoint.stock_detector import changed, fold_detector, load_whole
from mabn_d2.engine import read_config
from mabn_d2.modeling.norm import build_model
from mabn_d2.surgery.fold import INTO


def progress(text):
    print(f"convert_weights.py: {text}", file=sys.stderr, flush=True)


def parse_args():
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
            sub.add_argument("--config-file", required=True, metavar="FILE", help="the detector's")
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
    return parser.parse_args()


def convert(args, checkpoint):
    """Return the converted checkpoint of "imagenet" or "detector"."""
    function = {"imagenet": convert_imagenet, "detector": convert_detector}[args.command]
    checkpoint = function(
        checkpoint,
        args.stride_in_1x1,
        args.channel_order,
        args.pixel_mean,
        args.pixel_std,
        args.keep_buffers,
    )
    record = checkpoint[KEY]
    print(f"{record['source']}: {len(checkpoint['model'])} entries converted")
    for rule, names in record["dropped"].items():
        print(f"left out: {len(names)} entries, {rule}")
    print("recorded, to be the same in the config:")
    for key, value in record["config"].items():
        print(f"  {key} {value}")
    return checkpoint


def fold(args, checkpoint):
    """Return the folded checkpoint; print the config that stock Detectron2 loads it with."""
    try:
        cfg = read_config(str(args.config_file))
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    except (KeyError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"no model from {args.config_file}: {text}") from error
    model = load_whole(model, checkpoint)
    model, stock = fold_detector(model, cfg, args.into)
    stock.MODEL.WEIGHTS = str(args.output)
    print(CfgNode(changed(stock, get_cfg())).dump(), end="")
    return {"model": dict(model.state_dict()), "__author__": "mabn_d2"}


def main():
    args = parse_args()
    setup_logger(name="mabn_d2")
    start = time.perf_counter()
    try:
        check_output(args.output, args.input, args.overwrite)
        checkpoint = read_checkpoint(args.input)
        progress(f"read {args.input}, {args.input.stat().st_size / 1e6:.1f} MB")
        checkpoint = (fold if args.command == "fold" else convert)(args, checkpoint)
        write_checkpoint(checkpoint, args.output)
    except CheckpointError as error:
        sys.exit(f"convert_weights.py: {error}")
    size, seconds = args.output.stat().st_size / 1e6, time.perf_counter() - start
    progress(f"wrote {args.output}, {size:.1f} MB, {seconds:.1f} s after the start")


if __name__ == "__main__":
    main()
