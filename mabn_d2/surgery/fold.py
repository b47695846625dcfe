"""MABN to stock layers, without a difference in evaluation.

A centred convolution is a convolution with centred filters, and MABN in evaluation,
y = w x / sqrt(R + eps) + b, is a frozen BatchNorm with the mean 0 and the variance R.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ..layers import MABN2d, PerLevelNorm
from .convolutions import is_convolution, per_filter, to_stock
from .fuse_relu import unfuse_relu
from .in_place import become

INTO = ("frozen_bn", "conv")


# Stock layers of a library, which `modeling` sets to Detectron2's:
# "frozen_bn": classes (plain, followed by ReLU) that are made like FrozenBatchNorm2d;
# "per_level": a function that returns the stock list of BatchNorms for a PerLevelNorm of MABN.
STOCK: dict[str, Any] = {}


def fold_mabn(model: nn.Module, into: str = "frozen_bn") -> nn.Module:
    """Return a copy of `model` in which centred convolutions and MABN are stock layers.

    Args:
        model: any module; what is neither a centred convolution nor MABN is only copied.
        into: "frozen_bn", a convolution and a FrozenBatchNorm2d with the names of before
            (Detectron2's class, or torchvision's if Detectron2 is not installed); or "conv", one
            convolution with bias:

                W' = w / sqrt(R + eps) * (W - mean(W)),  b' = b + w / sqrt(R + eps) * b_conv

            Note that Detectron2's ResNet blocks have no bias under any norm, so that a file for it
            needs "frozen_bn" there (`fold_detector`).
        A PerLevelNorm becomes a CycleBatchNormList either way; it is for evaluation like the rest.

    Raises:
        ValueError: for another `into`, or naming norms that have no convolution to fold into.
    """
    if into not in INTO:
        raise ValueError(f"into is {into!r}: use one of {', '.join(INTO)}")
    return fold_in_place(unfuse_relu(deepcopy(model)), into)


def fold_in_place(model: nn.Module, into: str) -> nn.Module:
    """Do what `fold_mabn` does in place, in a model without fused ReLU; return the model."""
    for module in list(model.modules()):
        if isinstance(module, PerLevelNorm) and isinstance(module[0], MABN2d):
            if "per_level" not in STOCK:
                raise ValueError(
                    "statistics for each level fold to Detectron2's CycleBatchNormList only, and "
                    "Detectron2 is not installed"
                )
            become(module, STOCK["per_level"](module))
    pairs = list(_pairs(model))
    if isinstance(model, MABN2d):
        pairs = [("the model", model, None)]
    unpaired = [name for name, _, conv in pairs if conv is None]
    if into == "conv" and unpaired:
        raise ValueError(
            f"no convolution in front to fold {', '.join(unpaired)} into: use into='frozen_bn'"
        )
    for module in model.modules():
        to_stock(module)
    folded = set()
    for _, norm, conv in pairs:
        if norm not in folded:
            folded.add(norm)
            become(norm, _frozen(norm) if into == "frozen_bn" else _fold_into(conv, norm))
    # Detectron2's Conv2d has None where it has no norm.
    for module in model.modules():
        if is_convolution(module) and type(getattr(module, "norm", None)) is nn.Identity:
            module.norm = None
    return model


def _pairs(model: nn.Module) -> Iterator[tuple[str, MABN2d, nn.Module | None]]:
    """Yield (name, norm, convolution in front or None) of every place of a MABN layer."""
    for prefix, parent in model.named_modules():
        conv = parent if is_convolution(parent) else None
        for name, child in parent._modules.items():  # which, unlike named_children, repeats
            if isinstance(child, MABN2d):
                yield f"{prefix}.{name}".lstrip("."), child, conv
            # The norm follows its convolution, as when they were paired.
            if not is_convolution(parent):
                conv = child if child is not None and is_convolution(child) else None


def _frozen(norm: MABN2d) -> nn.Module:
    if "frozen_bn" not in STOCK:
        from .frozen_batch_norm import KINDS

        STOCK["frozen_bn"] = KINDS
    kinds = STOCK["frozen_bn"]
    frozen = kinds[norm.activation is not None](norm.num_features, norm.eps).to(norm.running_var)
    with torch.no_grad():
        for name in ("weight", "bias", "running_var"):
            getattr(frozen, name).copy_(getattr(norm, name))
    return frozen.train(norm.training)


def _fold_into(conv: nn.Module, norm: MABN2d) -> nn.Module:
    """Fold `norm` into `conv`, and return what is left of it: its ReLU or nothing."""
    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() + (0 if conv.bias is None else scale * conv.bias)
        conv.weight = nn.Parameter((conv.weight * per_filter(conv, scale)).to(conv.weight.dtype))
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return nn.ReLU() if norm.activation else nn.Identity()
