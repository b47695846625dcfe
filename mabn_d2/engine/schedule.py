"""Settings that follow from the number of training images and from the length of the training.

Keys that a config leaves to this module have the value AUTO (-1):

| key | value |
|---|---|
| SOLVER.MAX_ITER | EPOCHS * training images / IMS_PER_BATCH |
| SOLVER.BASE_LR | LR_FOR_16_IMAGES * IMS_PER_BATCH / 16 (linear scaling) |
| SOLVER.WARMUP_ITERS | a tenth of MAX_ITER, at most 500 as in the published schedule |
| SOLVER.CHECKPOINT_PERIOD, TEST.EVAL_PERIOD | a twentieth of MAX_ITER |
| MODEL.MABN.WARMUP_ITERS | 15 % of MAX_ITER, at most 600 |
| MODEL.MABN.CLIP_START | 30 % of MAX_ITER, at most 1200 |

If MAX_ITER is AUTO, STEPS that are left empty are 2/3 and 8/9 of it, as in the published schedule, where
LR_SCHEDULER_NAME uses them; with a number there the rate is not decayed.

The shares and bounds of MABN are those of the demo (2,800 iterations) and of the comparison (docs/comparison.md).
The published 100 and 1,000 are for 90,000 iterations and more; in a short training the weights still move fast at
that time, and the windows lag behind them.
"""

import logging
import math
import os

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer

from ..checkpoint import weights_file
from ..config import AUTO
from ..data.data_check import check_requirements
from ..data.requirements import DataRequirements
from ..modeling.norm_table import NORMS
from .errors import ConfigError
from .value_check import check_reference_world_size, norm_schedule, used_norms


def finalize_schedule(cfg: CfgNode, num_images: int | None = None, train: bool = True) -> None:
    """Replace the AUTO values of a config, in place, and choose WEIGHTS_IF_PRESENT if the file is there.

    A config that is final already stays as it is, so the config.yaml of a run repeats the run.

    Args:
        cfg: may be frozen, and is then frozen again.
        num_images: training images; None: they are counted (`training_images`) if they are needed.
        train: False for an evaluation, where the length has no meaning and no images are counted.
    Raises:
        ConfigError: if a key needs another one that is not given, or there are no images.
        DataError: as `training_images`, where images are counted.
    """
    frozen = cfg.is_frozen()
    cfg.defrost()
    try:
        _choose_weights(cfg)
        if not train and cfg.SOLVER.MAX_ITER == AUTO:
            cfg.SOLVER.MAX_ITER = 1
        _choose_schedule(cfg, num_images)
    finally:
        if frozen:
            cfg.freeze()


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Detectron2's `auto_scale_workers` (SOLVER.REFERENCE_WORLD_SIZE), for the keys of this package too.

    The schedules of the norms are scaled as the warm-up of the rate is. No period becomes 0.

    Args:
        cfg: after `finalize_schedule`, as AUTO can't be scaled.
        processes: that train.
    Returns:
        `cfg` itself where nothing is to be scaled.
    Raises:
        ConfigError: if SOLVER.REFERENCE_WORLD_SIZE does not divide the images.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    check_reference_world_size(cfg)
    scaled: CfgNode = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is cfg:
        return cfg
    frozen = scaled.is_frozen()
    scaled.defrost()
    for name, row in NORMS.items():
        node = scaled.MODEL[name]
        for key in map(str.upper, row.schedule):
            node[key] = round(node[key] * reference / processes)
    for node, before, key in (
        (scaled.SOLVER, cfg.SOLVER, "CHECKPOINT_PERIOD"),
        (scaled.TEST, cfg.TEST, "EVAL_PERIOD"),
    ):
        node[key] = max(node[key], min(before[key], 1))
    if frozen:
        scaled.freeze()
    return scaled


def training_images(cfg: CfgNode) -> int:
    """Return the number of images that DATASETS.TRAIN trains on.

    Raises:
        ConfigError: if DATASETS.TRAIN is empty.
        DataError: if a dataset is not registered, can't be used or contradicts the config.
    """
    names = cfg.DATASETS.TRAIN
    if not names:
        raise ConfigError(
            "DATASETS.TRAIN is empty: name a registered dataset, or give your images by --data FOLDER"
        )
    counts = check_requirements(DataRequirements.from_cfg(cfg))
    if all(name in counts for name in names):
        return sum(counts[name] for name in names)
    records = get_detection_dataset_dicts(
        names,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        check_consistency=False,
    )
    return len(records)


def _choose_weights(cfg: CfgNode) -> None:
    """Set MODEL.WEIGHTS to MODEL.WEIGHTS_IF_PRESENT if that file exists and no other is named."""
    optional = cfg.MODEL.WEIGHTS_IF_PRESENT
    if not optional:
        return
    cfg.MODEL.WEIGHTS_IF_PRESENT = ""
    if cfg.MODEL.WEIGHTS:
        return
    if os.path.isfile(weights_file(optional)):
        cfg.MODEL.WEIGHTS = optional


def _choose_schedule(cfg: CfgNode, num_images: int | None) -> None:
    solver, mabn = cfg.SOLVER, cfg.MODEL.MABN
    if solver.IMS_PER_BATCH < 1:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}: give a whole number above 0"
        )
    automatic = solver.MAX_ITER == AUTO
    if automatic:
        if solver.EPOCHS < 1:
            raise ConfigError(
                f"SOLVER.MAX_ITER is {AUTO} (automatic) and SOLVER.EPOCHS is {solver.EPOCHS}: give one"
            )
        if num_images is None:
            num_images = training_images(cfg)
        if num_images < 1:
            raise ConfigError(
                f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} has no image with annotations: nothing to train on"
            )
        solver.MAX_ITER = math.ceil(solver.EPOCHS * num_images / solver.IMS_PER_BATCH)
    length = solver.MAX_ITER
    if solver.BASE_LR == AUTO:
        if solver.LR_FOR_16_IMAGES <= 0:
            raise ConfigError(
                f"SOLVER.BASE_LR is {AUTO} (automatic) and SOLVER.LR_FOR_16_IMAGES is "
                f"{solver.LR_FOR_16_IMAGES}: give one"
            )
        solver.BASE_LR = solver.LR_FOR_16_IMAGES * solver.IMS_PER_BATCH / 16
    if automatic and not solver.STEPS and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        # Rising and above 0 in the shortest training too.
        solver.STEPS = tuple(sorted({length * 2 // 3, length * 8 // 9} - {0}))
    for node, key, value in (
        (solver, "WARMUP_ITERS", min(length // 10, 500)),
        (solver, "CHECKPOINT_PERIOD", max(length // 20, 1)),
        (cfg.TEST, "EVAL_PERIOD", max(length // 20, 1)),
        (mabn, "WARMUP_ITERS", min(length * 15 // 100, 600)),
        (mabn, "CLIP_START", min(length * 30 // 100, 1200)),
    ):
        if node[key] == AUTO:
            node[key] = value


def log_schedule(cfg: CfgNode) -> None:
    """Log in one line what will be trained for how long; on the main process."""
    solver = cfg.SOLVER
    micro = (
        "" if solver.ACCUMULATION_STEPS == 1 else f" ({solver.ACCUMULATION_STEPS} micro-batches)"
    )
    decay = ""
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = ", ".join(str(step) for step in solver.STEPS if step < solver.MAX_ITER)
        decay = f" and times {solver.GAMMA:g} after {steps}" if steps else " and no decay"
    norms = "".join(
        f", {key} {value}"
        for name in used_norms(cfg)
        for key, value in norm_schedule(cfg, name).items()
    )
    logging.getLogger(__name__).info(
        f"Training for {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images{micro}, learning "
        f"rate {solver.BASE_LR:g} after {solver.WARMUP_ITERS} iterations{decay}{norms}, starting from "
        f"{cfg.MODEL.WEIGHTS or 'random weights'}"
    )
