"""What DETECTRON2_ENV_MODULE=mabn_d2 adds to Detectron2, for scripts that do not know this package."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.config.config import get_cfg as stock_get_cfg
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase
from detectron2.solver import build_optimizer as stock_build_optimizer

from ..checkpoint import SafeCheckpointer
from ..config import add_mabn_config
from ..config_keys import differences
from ..layers import rescale_mabn_windows
from ..safe_yaml import check_yaml
from ..solver import build_optimizer
from ..surgery.recalibrate import layers_to_recalibrate
from .hooks import RecalibrateMABN

# Keys that only this package's Trainer and loaders read.
UNREAD = (
    "SOLVER.ACCUMULATION_STEPS",
    "SOLVER.EPOCHS",
    "SOLVER.LR_FOR_16_IMAGES",
    "SOLVER.EARLY_STOPPING_PATIENCE",
    "SOLVER.CHECKPOINTS_TO_KEEP",
    "MODEL.WEIGHTS_IF_PRESENT",
    "MODEL.MABN.CONVERT_WEIGHTS",
    "MODEL.MABN.SYNC_BEFORE_EVAL",
    "MODEL.MABN.LOG_PERIOD",
    "MODEL.MABN.LOG_LAYERS",
    "TEST.VALIDATION_LOSS",
    "TEST.BEST_METRIC",
    "TEST.PICTURES",
    "DATALOADER.BAD_INPUT",
    "DATASETS.FOLDER",
    "DATASETS.VAL_SHARE",
)
_AFTER = 2  # DefaultTrainer's hooks that measure time and set the rate come before


@functools.wraps(stock_get_cfg)
def get_cfg() -> CfgNode:
    """`detectron2.config.get_cfg` with the keys of this package, so that its config.yaml loads."""
    cfg = stock_get_cfg()
    add_mabn_config(cfg)
    return cfg


def extend_detectron2() -> None:
    """Extend Detectron2 in this process.

    - `get_cfg` has the keys of this package.
    - YAML configs are read safely.
    - `DetectionCheckpointer` is `SafeCheckpointer`: files are read without running code, weights of
      another norm are refused, the schedules of the norms start with the run, and checkpoints are
      written whole.
    - SOLVER.OPTIMIZER and CLIP_TYPE "full_model" take effect.
    - TEST.PRECISE_BN recalibrates MABN in DefaultTrainer too.
    - MABN's gradient windows follow the loss scale of AMPTrainer.
    """
    _replace_in_detectron2(stock_get_cfg, get_cfg)
    _replace_in_detectron2(stock_build_optimizer, build_optimizer)
    _replace_in_detectron2(DetectionCheckpointer, SafeCheckpointer)
    CfgNode.merge_from_file = _read_safely(CfgNode.merge_from_file)
    DefaultTrainer.build_hooks = _with_recalibration(DefaultTrainer.build_hooks)
    AMPTrainer.run_step = with_rescaled_windows(AMPTrainer.run_step)


def _replace_in_detectron2(stock: Any, ours: Any) -> None:
    """Let Detectron2's modules hold `ours`, but for the one that defines `stock`."""
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and name != stock.__module__:
            for attribute, value in list(vars(module).items()):
                if value is stock:
                    setattr(module, attribute, ours)


def _read_safely(merge_from_file: Callable) -> Callable:
    @functools.wraps(merge_from_file)
    def merge(self: CfgNode, cfg_filename: str, *args: Any, **kwargs: Any) -> None:
        check_yaml(cfg_filename)
        return merge_from_file(self, cfg_filename, *args, **kwargs)

    return merge


def _warn_of_unread(cfg: CfgNode) -> None:
    """Warn of keys of this package that are set, but that DefaultTrainer does not read."""
    default = get_cfg()
    changed = {key for key, _, _ in differences(default, cfg)}
    if unread := [key for key in UNREAD if key in changed]:
        logging.getLogger(__name__).warning(
            f"Detectron2's DefaultTrainer does not read {', '.join(unread)}: use mabn_d2.engine.Trainer"
        )


def _with_recalibration(build_hooks: Callable) -> Callable:
    @functools.wraps(build_hooks)
    def build(self: DefaultTrainer) -> list[HookBase]:
        _warn_of_unread(self.cfg)  # Trainer, which reads them, has hooks of its own
        hooks = build_hooks(self)
        test = self.cfg.TEST
        if test.PRECISE_BN.ENABLED and layers_to_recalibrate(self.model):
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.DATALOADER.NUM_WORKERS = 0
            loader = self.build_train_loader(cfg)
            hook = RecalibrateMABN(test.EVAL_PERIOD, self.model, loader, test.PRECISE_BN.NUM_ITER)
            hooks.insert(_AFTER, hook)
        return hooks

    return build


def with_rescaled_windows(run_step: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return AMPTrainer's `run_step`, which ends with an update of the loss scale, and what follows it."""

    @functools.wraps(run_step)
    def run(self: AMPTrainer) -> None:
        run_step(self)
        rescale_mabn_windows(self.model, self.grad_scaler)

    return run
