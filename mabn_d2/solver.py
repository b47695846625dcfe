"""Detectron2's optimizer, with this package's norms treated as norms."""

import torch
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)

from .layers import BatchRenorm2d, MABN2d


def get_optimizer_params(model, weight_decay_norm=None, weight_decay_bias=None, **settings):
    """`detectron2.solver.get_default_optimizer_params` that knows this package's norms.

    Detectron2 applies `weight_decay_norm` to a fixed tuple of norm types, which "MABN" and "BRN" are
    none of. As there, `weight_decay_bias`, if set, comes before it for a norm's bias.
    """
    groups = get_default_optimizer_params(
        model,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
        **settings,
    )
    if weight_decay_norm is None:
        return groups
    norm_params = {
        param
        for module in model.modules()
        if isinstance(module, (BatchRenorm2d, MABN2d))
        for name, param in module.named_parameters(recurse=False)
        if name == "weight" or weight_decay_bias is None
    }
    each = [{**group, "params": [param]} for group in groups for param in group["params"]]
    for group in each:
        if group["params"][0] in norm_params:
            group["weight_decay"] = weight_decay_norm
    return reduce_param_groups(each)


OPTIMIZERS = ("SGD", "ADAMW")


def build_optimizer(cfg, model):
    """Build SOLVER.OPTIMIZER over the parameters of `model` that require grad.

    CLIP_GRADIENTS.CLIP_TYPE may be "full_model" too: by the norm of all gradients together.

    Raises:
        ValueError: for an optimizer that is neither "SGD" nor "ADAMW".
    """
    solver = cfg.SOLVER
    groups = get_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    name = solver.get("OPTIMIZER", "SGD")
    if name == "SGD":
        momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer = torch.optim.SGD(groups, lr=solver.BASE_LR, foreach=True, **momentum)
    elif name == "ADAMW":
        optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR, foreach=True)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {name!r}: use one of {', '.join(OPTIMIZERS)}")
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        # Before every step, GradScaler's too, which has unscaled the gradients by then.
        params = [param for group in optimizer.param_groups for param in group["params"]]

        def clip_full_model(optimizer, args, kwargs):
            torch.nn.utils.clip_grad_norm_(params, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_full_model)
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)
