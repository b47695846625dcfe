"""MABN to stock layers, without a difference in evaluation.

A centred convolution is a convolution with centred filters, and MABN in evaluation,
y = w x / sqrt(R + eps) + b, is a BatchNorm with the mean 0 and the variance R.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..layers import MABN2d, PerLevelNorm
from ..layers.norm_act import MABNAct2d
from .convolutions import (
    Convolution,
    check_bias,
    check_weights,
    is_convolution,
    per_filter,
    to_stock,
)
from .first_forward import remove_check
from .fuse_relu import unfuse_relu
from .in_place import become
from .pairs import Pair, find_pairs

INTO = ("frozen_bn", "conv", "batch_norm")

# Stock layers of a library, which `modeling` sets to Detectron2's:
# "frozen_bn": two classes, FrozenBatchNorm2d(num_features, eps) and one with (..., drop, act);
# "per_level": a function that returns the stock list of BatchNorms for a PerLevelNorm of MABN.
STOCK: dict[str, Any] = {}


def fold_mabn(model: nn.Module, into: str = "frozen_bn", example_inputs: Any = None) -> nn.Module:
    """Return a copy of `model` in which centred convolutions and MABN are stock layers.

    Args:
        model: any module; what is neither a centred convolution nor MABN is only copied.
        into: What MABN becomes.

            - "frozen_bn": a FrozenBatchNorm2d in its place (Detectron2's class, or one derived from
              torchvision's if Detectron2 is not installed). Outputs stay the same bit for bit if
              the eps of MABN is that of the stock layer, otherwise up to rounding.
            - "batch_norm": a BatchNorm2d with the mean 0, or timm's BatchNormAct2d if it was
              converted from one. A stock model of torchvision, timm or
              segmentation_models_pytorch loads the state dict strictly:
              `stock.load_state_dict(fold_mabn(model, "batch_norm").state_dict())`.
            - "conv": nothing; the convolution in front gets a bias:

                W' = w / sqrt(R + eps) * (W - mean(W)),  b' = b + w / sqrt(R + eps) * b_conv

              It must be certain that each norm gets its convolution's output, and that nothing else
              does. Note that Detectron2's ResNet blocks have no bias under any norm, so that a file
              for it needs "frozen_bn" there (`fold_detector`).

            A PerLevelNorm becomes a CycleBatchNormList each time; it is for evaluation like the rest.
            Stock layers have the eps of the BatchNorm that `convert_mabn` found, otherwise 1e-5,
            because a state dict does not hold it; `running_var` makes up for another eps of MABN.
        example_inputs: for "conv", the arguments of the model, a tuple, or its only argument. A
            forward on them shows who uses the outputs of the convolutions, where neither the
            structure of the model nor a symbolic trace does.
    Returns:
        The folded copy. It can be scripted, traced and exported if its stock layers can.
    Raises:
        ValueError: for another `into`, naming norms that can't be folded into a convolution, or naming
            weights that a hook or parametrization computes (weight_norm, spectral_norm, prune); for
            "batch_norm" in half precision also if a running_var is too large for it.
    """
    if into not in INTO:
        raise ValueError(f"into is {into!r}: use one of {', '.join(INTO)}")
    check_weights(model)  # first, because such weights can't be copied either
    return fold_in_place(unfuse_relu(copy.deepcopy(model)), into, example_inputs)


def fold_in_place(model: nn.Module, into: str, example_inputs: Any = None) -> nn.Module:
    """Do what `fold_mabn` does in place, in a model without fused ReLU; return the model."""
    for module in list(model.modules()):
        if isinstance(module, PerLevelNorm) and isinstance(module[0], MABN2d):
            if "per_level" not in STOCK:
                raise ValueError(
                    "statistics for each level fold to Detectron2's CycleBatchNormList only, and "
                    "Detectron2 is not installed"
                )
            become(module, STOCK["per_level"](module))
    names = {module: name or "the model" for name, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, MABN2d)]
    pairs = _foldable(find_pairs(model, norms, example_inputs), names) if into == "conv" else {}
    for module in names:
        to_stock(module)
    for norm in norms:
        if into == "conv":
            new = _fold_into(pairs[norm].convs, norm)
        else:
            new = _frozen(norm) if into == "frozen_bn" else _batch_norm(norm)
        become(norm, new)
    for module in names:
        remove_check(module)
        # Detectron2's Conv2d has None where it has no norm.
        if is_convolution(module) and type(getattr(module, "norm", None)) is nn.Identity:
            module.register_module("norm", None)
    return model


def _foldable(
    pairs: dict[nn.Module, Pair | str], names: dict[nn.Module, str]
) -> dict[nn.Module, Pair]:
    """Return the pairs if each norm can be folded into its convolutions.

    Raises:
        ValueError: naming the norms that can't, and their convolutions.
    """
    norms_of = Counter(
        conv for pair in pairs.values() if isinstance(pair, Pair) for conv in pair.convs
    )
    problems, good = [], {}
    for norm, pair in pairs.items():
        if isinstance(pair, str):
            problems.append(f"{names[norm]}: {pair}")
            continue
        convs = ", ".join(names[conv] for conv in pair.convs)
        if pair.exclusive is None:
            problems.append(
                f"{names[norm]}: it is not certain that it gets the output of {convs} and that nothing "
                "else does: give example_inputs"
            )
        elif not pair.exclusive or any(norms_of[conv] > 1 for conv in pair.convs):
            problems.append(f"{names[norm]}: something else uses the output of {convs}, too")
        else:
            try:
                for conv in pair.convs:
                    check_bias(conv)
                good[norm] = pair
            except ValueError as error:
                problems.append(f"{names[norm]}: {error}")
    if problems:
        raise ValueError(
            "no convolution in front to fold these norms into (use into='frozen_bn' instead):\n"
            + "\n".join(problems)
        )
    return good


def _behind(norm: MABN2d) -> tuple[nn.Module, nn.Module] | None:
    """Return the dropout and the activation that a norm applies to its output, or None."""
    if isinstance(norm, MABNAct2d):
        return norm.drop, norm.act
    return (nn.Identity(), nn.ReLU()) if norm.activation else None


def stock_values(norm: MABN2d) -> dict[str, torch.Tensor]:
    """Return what a stock norm with the eps `norm.stock_eps` needs to compute the same.

    Returns:
        "weight", "bias" and "running_var", each (C,). They are those of `norm` if it has this eps,
        otherwise running_var is R + eps - stock_eps; where that is negative, it is 0 and the weight
        has the rest of the factor.
    """
    values = {name: getattr(norm, name).detach() for name in ("weight", "bias", "running_var")}
    if norm.eps != norm.stock_eps:
        total = values["running_var"].double() + norm.eps
        values["running_var"] = (total - norm.stock_eps).clamp(min=0)
        factor = (values["running_var"] + norm.stock_eps) / total
        values["weight"] = values["weight"].double() * factor.sqrt()
    return values


def _frozen(norm: MABN2d) -> nn.Module:
    if "frozen_bn" not in STOCK:
        from .frozen_batch_norm import KINDS

        STOCK["frozen_bn"] = KINDS
    plain, with_act = STOCK["frozen_bn"]
    behind = _behind(norm)
    new = (
        with_act(norm.num_features, norm.stock_eps, *behind)
        if behind
        else plain(norm.num_features, norm.stock_eps)
    )
    for name, value in stock_values(norm).items():
        setattr(new, name, value.to(norm.running_var.dtype, copy=True))
    new.running_mean = torch.zeros_like(new.running_var)
    return new.train(norm.training)


def _batch_norm(norm: MABN2d) -> nn.Module:
    like: dict[str, Any] = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    behind = _behind(norm)
    new: nn.Module
    new = stock = nn.BatchNorm2d(norm.num_features, norm.stock_eps, **like)
    if isinstance(norm, MABNAct2d):
        new = copy.copy(norm.stock)
        vars(new).update(
            eps=norm.stock_eps,
            num_features=norm.num_features,
            affine=True,
            track_running_stats=True,
            _parameters=stock._parameters,
            _buffers=stock._buffers,
            _modules={"drop": norm.drop, "act": norm.act},
        )
    elif behind:
        raise ValueError(
            "nn.BatchNorm2d can't apply the ReLU of MABN2d(activation=\"relu\"): use into='frozen_bn'"
        )
    with torch.no_grad():
        for name, value in stock_values(norm).items():
            getattr(new, name).copy_(value)
            if value.isfinite().all() and not getattr(new, name).isfinite().all():
                raise ValueError(
                    f"a {name} of {value.max().item():.3g} is more than {norm.weight.dtype} holds: fold "
                    "before .half(), or use into='frozen_bn'"
                )
    for name in ("weight", "bias"):
        getattr(new, name).requires_grad_(getattr(norm, name).requires_grad)
    return new.train(norm.training)


def _fold_into(convs: tuple[Convolution, ...], norm: MABN2d) -> nn.Module:
    """Fold `norm` into the convolutions in front, and return what is left of it."""
    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        for conv in convs:
            bias = norm.bias.double() + (0 if conv.bias is None else scale * conv.bias)
            weight = (conv.weight * per_filter(conv, scale)).to(conv.weight.dtype)
            grads = conv.weight.requires_grad
            conv.weight = nn.Parameter(weight, requires_grad=grads)
            conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=grads)
    behind = _behind(norm)
    if behind is None:
        return nn.Identity()
    if isinstance(norm, MABNAct2d):  # the names of their parameters stay
        rest = nn.Sequential()
        rest.add_module("drop", behind[0])
        rest.add_module("act", behind[1])
        return rest.train(norm.training)
    return behind[1]
