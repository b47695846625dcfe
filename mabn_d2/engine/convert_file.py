"""Converts checkpoint files: classifiers and detectors to Detectron2, MABN to stock norms."""

import sys
import time
from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.config.config import get_cfg  # the stock one, whatever the environment says

from ..checkpoint import (
    CheckpointError,
    convert_detector,
    convert_imagenet,
    read_checkpoint,
    write_checkpoint,
)
from ..checkpoint.description import CLASSES, CONFIG, classes_of, config_of
from ..checkpoint.io import check_output
from ..checkpoint.record import KEY
from ..checkpoint.stock_detector import changed, fold_detector, load_whole
from ..modeling.norm import BUILD_ERRORS, build_model
from .config_reader import read_config


def convert_file(args: Namespace) -> None:
    """Convert `args.input` to `args.output` and print what was done.

    Args:
        args: what `mabn_d2.commands.convert_weights` parses.

    Raises:
        CheckpointError: if a file can't be read, converted or written; then nothing is written.
    """
    start = time.perf_counter()
    check_output(args.output, args.input, args.overwrite)
    checkpoint = read_checkpoint(args.input)
    progress(f"read {args.input}, {args.input.stat().st_size / 1e6:.1f} MB")
    checkpoint = (fold if args.command == "fold" else convert)(args, checkpoint)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(checkpoint, args.output)
    size, seconds = args.output.stat().st_size / 1e6, time.perf_counter() - start
    progress(f"wrote {args.output}, {size:.1f} MB, {seconds:.1f} s after the start")


def progress(text: str) -> None:
    """Print a line to stderr; stdout is for the config."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def convert(args: Namespace, checkpoint: dict) -> dict:
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


def fold(args: Namespace, checkpoint: dict) -> dict:
    """Return the folded checkpoint; print the config that stock Detectron2 loads it with."""
    source = args.config_file or args.input
    try:
        cfg = read_config(args.config_file) if args.config_file else config_of(checkpoint)
        if cfg is None:
            raise CheckpointError(f"{source} holds no config: add --config-file FILE")
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    except CheckpointError:
        raise
    except BUILD_ERRORS as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"no model from {source}: {text}") from error
    model = load_whole(model, checkpoint)
    model, stock = fold_detector(model, cfg, args.into)
    stock.MODEL.WEIGHTS = str(args.output)
    print(CfgNode(changed(stock, get_cfg())).dump(), end="")
    described = {CONFIG: stock.dump(), CLASSES: classes_of(checkpoint)}
    return {
        "model": dict(model.state_dict()),
        "__author__": "mabn_d2",
        **{key: value for key, value in described.items() if value is not None},
    }
