"""Which convolutions can have zero-centred filters, and how they are centred in place.

A centred convolution is a subclass of the stock one whose forward centres the filters. The class of
the module is exchanged, so that the module itself, its parameters and the keys of its state dict
stay. What a class of another library needs is registered by the module that imports this library.
"""

from importlib import import_module
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn

from ..layers import CenConv2d, CenConvTranspose2d, MABN2d, center_transposed_weight, center_weight

# For annotations. Those of other libraries that don't derive from it have the same attributes.
Convolution: TypeAlias = nn.modules.conv._ConvNd

# {stock class: class with centred filters}. Subclasses have forwards of their own, which an exchange
# of the class would lose, so classes are looked up by their exact type.
CENTRED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: CenConv2d,
    nn.ConvTranspose2d: CenConvTranspose2d,
}
# Classes that standardize their filters in the forward: the mean of a filter is zero already.
STANDARDIZED: set[type[nn.Module]] = set()
# Classes with centred filters whose forward knows no bias.
WITHOUT_BIAS: set[type[nn.Module]] = set()
# Classes of optional libraries, and the module that registers them when a model has one.
_REGISTERED_BY = {
    "torchvision.ops.deform_conv.DeformConv2d": ".torchvision_convolutions",
    "timm.layers.conv2d_same.Conv2dSame": ".timm_convolutions",
    "timm.layers.std_conv.StdConv2d": ".timm_convolutions",
    "timm.layers.std_conv.StdConv2dSame": ".timm_convolutions",
}


def register_centred(stock: type[nn.Module], centred: type[nn.Module]) -> None:
    """Make `centred`, a subclass of `stock`, the class that `center_conv` gives a `stock` module."""
    CENTRED[stock] = centred


def register_when_used(stock: str, module: str) -> None:
    """Import `module`, which registers, when a model has a class of the name `stock`."""
    _REGISTERED_BY[stock] = module


def register_standardized(*classes: type[nn.Module]) -> None:
    """Let MABN follow convolutions whose own forward gives each filter a mean of zero."""
    STANDARDIZED.update(classes)


def _known(cls: type) -> bool:
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name in _REGISTERED_BY:
        import_module(_REGISTERED_BY.pop(name), __package__)
    return cls in CENTRED or cls in CENTRED.values() or cls in STANDARDIZED


def _can_be_centred(module: nn.Module) -> TypeGuard[Convolution]:
    return _known(type(module))


def is_centred(module: nn.Module) -> TypeGuard[Convolution]:
    """Return True if the filters of `module` are centred in its forward."""
    return _known(type(module)) and type(module) not in CENTRED


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Return True for every convolution, whether it can be centred or not."""
    return isinstance(module, nn.modules.conv._ConvNd) or _known(type(module))


def check_conv(conv: nn.Module, num_features: int) -> None:
    """Raise an error if the convolution in front of a MABN over `num_features` can't be centred.

    Raises:
        TypeError: if it is not a convolution that can be centred.
        ValueError: if its outputs are not the norm's `num_features`, its filters have one element,
            or its weight is computed by something else (weight_norm, spectral_norm, prune).
    """
    cls = type(conv)
    if nn.utils.parametrize.is_parametrized(conv):
        raise ValueError(_recomputed(conv, "a parametrization"))
    if not _can_be_centred(conv):
        known = [*CENTRED, *STANDARDIZED]
        raise TypeError(
            f"MABN needs a zero-centred convolution in front, which {cls.__module__}."
            f"{cls.__qualname__} can't be: use one of "
            + ", ".join(f"{c.__module__}.{c.__qualname__}" for c in known)
            + ", or another norm there"
        )
    if conv.out_channels != num_features:
        raise ValueError(
            f"MABN over {num_features} channels stands behind a convolution with "
            f"{conv.out_channels} output channels: {conv}"
        )
    if torch.Size(conv.kernel_size).numel() * (conv.in_channels // conv.groups) == 1:
        raise ValueError(f"filters of one element are zero when centred: {conv}")
    check_plain_weight(conv)


def check_plain_weight(conv: nn.Module) -> None:
    """Raise ValueError if the weight of `conv` is not a parameter of its own.

    `torch.nn.utils.weight_norm`, `spectral_norm` and `prune` compute it in a hook from other
    parameters, and would overwrite what folding writes.
    """
    # Some constructors attach the norm before they create the weight.
    if hasattr(conv, "weight") and "weight" not in conv._parameters:
        raise ValueError(_recomputed(conv, f"a hook from {', '.join(conv._parameters)}"))


def check_weights(model: nn.Module) -> None:
    """Raise ValueError naming a centred convolution or a norm whose weight something else computes."""
    kinds: tuple[type[nn.Module], ...] = (*CENTRED.values(), MABN2d)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            if nn.utils.parametrize.is_parametrized(module):
                raise ValueError(f"{name}: {_recomputed(module, 'a parametrization')}")
            try:
                check_plain_weight(module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _recomputed(conv: nn.Module, by: str) -> str:
    return (
        f"the weight of {type(conv).__name__} is computed by {by}: remove it first "
        "(remove_weight_norm, remove_spectral_norm, prune.remove, remove_parametrizations)"
    )


def check_bias(conv: nn.Module) -> None:
    """Raise ValueError if a norm behind `conv` can't be folded into its weight and a bias."""
    if type(conv) in STANDARDIZED:
        raise ValueError(
            f"{type(conv).__name__} standardizes its weight, which undoes a folded scale"
        )
    if type(conv) in WITHOUT_BIAS:
        raise ValueError(f"{type(conv).__name__} has no bias")
    check_plain_weight(conv)


def center_conv(conv: nn.Module) -> None:
    """Centre a convolution that `check_conv` accepts, in place; its keys stay as they are."""
    if _known(type(conv)):
        conv.__class__ = CENTRED.get(type(conv), type(conv))


def effective_filters(conv: Convolution) -> torch.Tensor:
    """Return the stock weight that gives the outputs of a centred convolution."""
    if type(conv) in STANDARDIZED:
        return conv.weight  # its stock class standardizes, too
    if isinstance(conv, nn.ConvTranspose2d):
        return center_transposed_weight(conv.weight, conv.groups)
    return center_weight(conv.weight)


def per_filter(conv: Convolution, vector: torch.Tensor) -> torch.Tensor:
    """Return a vector (out_channels,) in the shape that multiplies the filters of `conv`."""
    if isinstance(conv, nn.ConvTranspose2d):  # weight (in, out / groups, kH, kW)
        each = vector.reshape(conv.groups, -1)
        return each.repeat_interleave(conv.in_channels // conv.groups, 0)[:, :, None, None]
    return vector[:, None, None, None]


def to_stock(conv: nn.Module) -> None:
    """Undo `center_conv`, in place: stock class, centred weight. Others are left alone."""
    if type(conv) in STANDARDIZED or not is_centred(conv):
        return
    check_plain_weight(conv)
    with torch.no_grad():
        weight = effective_filters(conv)
    # A new parameter: other modules may share the old one.
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    stock: dict[type, type[Any]] = {centred: stock for stock, centred in CENTRED.items()}
    conv.__class__ = stock[type(conv)]
