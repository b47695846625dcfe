#!/usr/bin/env python
"""Trains Mask R-CNN with MABN on the digit scenes, evaluates it and draws what it learned."""

import logging
import time
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser, default_setup
from tabulate import tabulate

from mabn_d2.engine import Trainer, check_data, one_line_errors, setup_config
from mabn_d2.visualization import draw_predictions, plot_run

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


@one_line_errors()
def main():
    parser = default_argument_parser()
    parser.set_defaults(config_file=str(Path(__file__).parents[1] / CONFIG))
    parser.set_defaults(resume=True)  # a second call goes on with the first, or draws it again
    args = parser.parse_args()
    start = time.monotonic()
    cfg = setup_config(args)
    check_data(cfg)  # before default_setup writes to OUTPUT_DIR
    default_setup(cfg, args)
    logging.getLogger("detectron2").info(
        f"Training on {cfg.MODEL.DEVICE}, torch {torch.__version__}"
    )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()

    results = trainer._last_eval_results
    output = Path(cfg.OUTPUT_DIR)
    draw_predictions(cfg, trainer.model, output / "predictions.png")
    plot_run(output, output / "curves.png")
    rows = [
        [task, *(f"{results[key][name]:.1f}" for name in ("AP", "AP50", "AP75"))]
        for task, key in (("box", "bbox"), ("mask", "segm"))
    ]
    print(
        f"\n{cfg.DATASETS.TEST[0]} after {cfg.SOLVER.MAX_ITER} iterations, "
        f"{(time.monotonic() - start) / 60:.1f} minutes on {cfg.MODEL.DEVICE}:"
    )
    print(tabulate(rows, headers=["", "AP", "AP50", "AP75"], tablefmt="github"))
    print(f"pictures: {output / 'predictions.png'}, {output / 'curves.png'}")
    print(f"weights:  {output / 'model_final.pth'}")


if __name__ == "__main__":
    main()
