"""What is timed of gradient accumulation: training steps of a published 2x config."""

from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..config import add_mabn_config
from ..config_files import get_config_file
from ..engine.guarded_trainer import GuardedTrainer
from ..solver import build_optimizer
from .detector_cases import random_image
from .layer_cases import Case, Steps

CONFIG = "mask_rcnn_R50_FPN_mabn_2x.yaml"
OBJECTS, REGIONS = 16, 64  # of an image, that the heads train on


def accumulation_cases(args: Namespace) -> Iterator[Case]:
    """A step of `--batch` images (micro), and of `--accumulation` times as many.

    `accumulated` takes the images as micro-batches, `at_once` in one forward.
    """
    steps, size = args.accumulation, args.size
    shape = (args.batch * steps, 3, size, size)
    made = {
        "micro": lambda: training_step(args, 1, args.batch),
        "accumulated": lambda: training_step(args, steps, args.batch * steps),
        "at_once": lambda: training_step(args, 1, args.batch * steps),
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        functions: Steps = {name: made[name]() for name in args.norms}
        yield {"threads": threads, "dtype": "fp32", "format": "nchw", "shape": shape}, functions


def step_config(accumulation_steps: int, images: int, device: str) -> CfgNode:
    """Return the published 2x config, without weights, for steps that can be compared.

    All proposals and true boxes compete for the heads, whatever an untrained model proposes, so that
    each step trains on equally many regions.
    """
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(get_config_file(CONFIG))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = images, accumulation_steps
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = 1.0, [0.7]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = REGIONS
    return cfg


def training_step(args: Namespace, accumulation_steps: int, images: int) -> Callable[[], None]:
    """Return a function that takes one optimizer step of a model of its own, on noise images."""
    cfg = step_config(accumulation_steps, images, args.device)
    model = build_model(cfg)
    batch = [random_image(args.size, OBJECTS) for _ in range(images)]
    trainer = GuardedTrainer(
        model,
        iter(lambda: batch, None),
        build_optimizer(cfg, model),
        accumulation_steps=accumulation_steps,
        seed=0,
    )
    trainer.iter = 0

    def step() -> None:
        with EventStorage():
            trainer.run_step()

    return step
