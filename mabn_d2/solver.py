"""Detectron2's optimizer, with this package's norms treated as norms, and its schedule to the end."""

from typing import Any

import detectron2.solver.build
import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from .modeling.optimizer_params import get_default_optimizer_params

OPTIMIZERS = ("SGD", "ADAMW")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build SOLVER.OPTIMIZER over the parameters of `model` that require grad.

    CLIP_GRADIENTS.CLIP_TYPE may be "full_model" too: by the norm of all gradients together.

    Raises:
        ValueError: for an optimizer that is neither "SGD" nor "ADAMW".
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    # One pass over each parameter, where torch has it: on the CPU a quarter of the time of AdamW.
    on = {param.device.type for group in groups for param in group["params"]}
    kernels: dict[str, Any] = {"fused": True} if on <= {"cpu", "cuda"} else {"foreach": True}
    name = solver.get("OPTIMIZER", "SGD")
    if name == "SGD":
        momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=solver.BASE_LR, **kernels, **momentum
        )
    elif name == "ADAMW":
        optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR, **kernels)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {name!r}: use one of {', '.join(OPTIMIZERS)}")
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED:
        # GradScaler would leave the unscaling to a fused step, after the clipping.
        vars(optimizer)["_step_supports_amp_scaling"] = False
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        params = [param for group in optimizer.param_groups for param in group["params"]]

        def clip_full_model(
            optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            torch.nn.utils.clip_grad_norm_(params, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_full_model)
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


class UntilTheEnd(ParamScheduler):
    """A schedule that keeps its last value at and after the end of the training.

    Detectron2 asks for the rate behind the last iteration too, and at more than 1 where a run has more
    iterations than its new length. fvcore's schedules in steps have no value there.

    Args:
        schedule: of the share of the training that is done.
    """

    LAST = 1 - 2 * ParamScheduler.WHERE_EPSILON

    def __init__(self, schedule: ParamScheduler) -> None:
        self.schedule = schedule

    def __call__(self, where: float) -> float:
        """Return the value of the schedule, where `where` is the share that is done."""
        return self.schedule(min(where, self.LAST))


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """`detectron2.solver.build_lr_scheduler`, with a value `UntilTheEnd`."""
    scheduler = detectron2.solver.build.build_lr_scheduler(cfg, optimizer)
    if isinstance(scheduler, LRMultiplier):
        scheduler._multiplier = UntilTheEnd(scheduler._multiplier)
    return scheduler
