"""Detectron2's parameter groups, with this package's norms treated as norms."""

from typing import Any

import detectron2.solver.build
from detectron2.solver.build import reduce_param_groups
from torch import nn

from .norm_table import norm_layers

_found = detectron2.solver.build.get_default_optimizer_params
# An earlier import of this package may have replaced it.
detectron2_optimizer_params = getattr(_found, "_stock", _found)


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Any = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """`detectron2.solver.get_default_optimizer_params` that knows this package's norms.

    Detectron2 applies `weight_decay_norm` to a fixed tuple of norm types, to which those of
    `NORMS` do not belong. As there, `weight_decay_bias` and `overrides` come before it.

    Args:
        model, base_lr, weight_decay, weight_decay_norm, bias_lr_factor, weight_decay_bias,
            lr_factor_func, overrides: as in Detectron2.
    Returns:
        Parameter groups for an optimizer of torch.
    """
    groups = detectron2_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
        lr_factor_func=lr_factor_func,
        overrides=overrides,
    )
    if weight_decay_norm is None:
        return groups
    decided = {name for name, values in (overrides or {}).items() if "weight_decay" in values}
    if weight_decay_bias is not None:
        decided.add("bias")
    norm_params = {
        param
        for module in model.modules()
        if isinstance(module, norm_layers())
        for name, param in module.named_parameters(recurse=False)
        if name not in decided
    }
    each = [{**group, "params": [param]} for group in groups for param in group["params"]]
    for group in each:
        if group["params"][0] in norm_params:
            group["weight_decay"] = weight_decay_norm
    return reduce_param_groups(each)
