"""Trains Mask R-CNN with MABN on the digit scenes, evaluates it and draws what it learned."""

import argparse
import time
from collections.abc import Sequence

import torch
from detectron2.engine import default_argument_parser, default_setup

from ..command_names import name_commands
from ..config_files import get_config_file
from ..engine import Trainer, check_data, one_line_errors, setup_config
from ..engine.report import report_run

CONFIG = "digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line: Detectron2's flags, with the demo's config."""
    parser = default_argument_parser()
    parser.set_defaults(config_file=get_config_file(CONFIG))
    parser.set_defaults(resume=True)  # a second call goes on with the first, or draws it again
    args = parser.parse_args(arguments)
    if args.eval_only or args.num_gpus > 1 or args.num_machines > 1:
        parser.error(
            name_commands(
                "the demo trains in one process: use tools/train_net.py for --eval-only, several GPUs "
                "or machines"
            )
        )
    return args


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train in this process, and print the report."""
    args = parse_args(arguments)
    start = time.monotonic()
    cfg = setup_config(args)
    check_data(cfg)  # before default_setup writes to OUTPUT_DIR
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    print(f"\n{report_run(trainer)}")
    minutes = (time.monotonic() - start) / 60
    print(f"{minutes:.1f} minutes on {cfg.MODEL.DEVICE}, torch {torch.__version__}")
