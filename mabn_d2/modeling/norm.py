"""The norm types "MABN" and "BRN", everywhere that Detectron2 takes the name of a norm.

The convolution in front of "MABN" is centred; "BRN", Batch Renormalization, needs none.

Why it is done this way. `get_norm` looks names up in a dict inside of the function and modules
import the function by name, so the extended function takes its place, by identity, wherever a loaded
module holds it; modules that are loaded later find it in `detectron2.layers`. The alternatives, own
subclasses of every builder, head and meta-architecture, would leave out the next one that Detectron2
or a user adds. The norm can't centre the convolution by itself: Detectron2 attaches it to one after
it is made, so a registration hook of torch's does it at that moment, by changing the convolution's
class in place. A new module in its place would be missed by the plain lists that FPN and others keep
of the old one, a parametrization renames the checkpoint's keys, and a gradient hook is lost on
deepcopy. A norm that has found no convolution refuses to run, and `build_model` refuses to return it.
The same hook gives the heads that RetinaNet and FCOS run over all levels a norm for each of them,
which Detectron2 does for "BN" and "SyncBN" by their names.
"""

import logging
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn, TypeGuard

import detectron2.layers
import detectron2.modeling
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import retinanet
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..layers import MABN2d, PerLevelNorm
from ..layers.base import ConfigurableNorm
from ..surgery.callers import RUN_IN_TURN
from ..surgery.convolutions import center_conv, check_conv, is_convolution
from ..surgery.first_forward import check_in_first_forward
from ..surgery.fuse_relu import fuse_relu
from .norm_table import NORMS, configure_norms, norm_layers, scale_norm_schedules, set_num_groups
from .optimizer_params import detectron2_optimizer_params, get_default_optimizer_params

NORM = "MABN"


def _stock(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return Detectron2's function, which an earlier import of this package may have replaced."""
    return getattr(function, "_stock", function)


detectron2_get_norm = _stock(detectron2.layers.get_norm)
detectron2_build_model = _stock(detectron2.modeling.build_model)


def get_norm(norm: str | Callable[[int], nn.Module], out_channels: int) -> nn.Module | None:
    """`detectron2.layers.get_norm` that knows the norms of `NORMS`, too.

    Args:
        norm: a name, or a function from `out_channels` to a module.
        out_channels: features that the norm has.
    Returns:
        The norm; None if the name is empty.
    Raises:
        KeyError: for a name that neither Detectron2 nor this package has.
    """
    if isinstance(norm, str) and norm in NORMS:
        return new_norm(norm, out_channels)
    try:
        layer = detectron2_get_norm(norm, out_channels)
    except KeyError as error:
        if not isinstance(norm, str):
            raise
        names = ", ".join(f'"{name}"' for name in NORMS)
        raise KeyError(
            f"unknown norm {norm!r}: use {names}, or one that detectron2.layers.get_norm lists"
        ) from error
    if isinstance(layer, _CENTRED_FOR):  # from the caller's function
        layer.register_forward_pre_hook(_refuse)
    return layer


def new_norm(name: str, num_features: int, split: bool = False, **settings: Any) -> nn.Module:
    """Return a norm of `NORMS`; one that needs a centred convolution waits for it.

    Args:
        split: the form for normalization batches smaller than the batch, if the norm has one.
        settings: arguments of the layer.
    Raises:
        ValueError: if the norm has no such form.
    """
    row = NORMS[name]
    make: Callable[..., nn.Module] | None = row.split_layer if split else row.layer
    if make is None:
        raise ValueError(f"{name} has no form for normalization batches smaller than the batch")
    layer = make(num_features, **settings)
    if row.needs_centring:
        layer.register_forward_pre_hook(_refuse)
    return layer


_CENTRED_FOR = tuple(row.layer for row in NORMS.values() if row.needs_centring)


def _refuse(layer: nn.Module, args: tuple[Any, ...]) -> NoReturn:
    raise RuntimeError(
        f"{layer} has no convolution to centre: it was not attached to a Conv2d, nor put behind "
        "one in the same module"
    )


def is_unpaired(module: nn.Module | None) -> TypeGuard[ConfigurableNorm]:
    """Return True for a norm from `get_norm` that still waits for a convolution to be centred."""
    return isinstance(module, nn.Module) and _refuse in module._forward_pre_hooks.values()


def _pair(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Registration hook: centre the convolution that a new norm `module` is attached to.

    Unless the parent's structure leaves no doubt, the first training forward checks the pair.
    """
    if not is_unpaired(module):
        return
    conv, conv_name = parent, "the convolution"
    if not is_convolution(parent):
        siblings = [(n, child) for n, child in parent.named_children() if child is not module]
        if not siblings:
            return  # a container, which may be attached in turn
        conv_name, conv = siblings[-1]
    check_conv(conv, module.num_features)
    center_conv(conv)
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse]:
        del hooks[key]
    if conv is not parent and type(parent).forward not in RUN_IN_TURN:
        where = type(parent).__qualname__
        names: dict[nn.Module, str] = {
            module: f"{name} in {where}",
            conv: f"{conv_name} in {where}",
        }
        check_in_first_forward(module, (conv,), names)


def _split_levels(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Registration hook: norms of a subnet that is attached to a RetinaNetHead become one a level."""
    if isinstance(parent, retinanet.RetinaNetHead) and isinstance(module, nn.Sequential):
        for i, layer in enumerate(module):
            if isinstance(layer, norm_layers()):
                module[i] = PerLevelNorm(layer, parent._num_features)


# What the constructors of a model raise for a wrong config.
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)


def check_paired(model: nn.Module) -> None:
    """Raise ValueError naming the norms that have no centred convolution in front."""
    modules = dict(model.named_modules())
    problems = []
    for name, module in modules.items():
        if is_unpaired(module):
            parent = modules.get(name.rpartition(".")[0], module)
            problems.append(f"{name} in {type(parent).__module__}.{type(parent).__qualname__}")
    if problems:
        raise ValueError(
            f"MABN without a convolution to centre: {', '.join(problems)}. A norm must be attached "
            "to a convolution of a known class, or be registered just behind one in the same "
            "module: change the order, or use another norm there (BRN and GN need no centring)"
        )


def configure_mabn(model: nn.Module, **settings: Any) -> nn.Module:
    """Set the arguments of every MABN layer of a built model, and return the model.

    Args:
        settings: any of `MABN2d.configure`'s.
    Raises:
        ValueError: naming the MABN layers that have no centred convolution in front.
    """
    check_paired(model)
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.configure(**settings)
    return model


def build_model(cfg: CfgNode) -> nn.Module:
    """`detectron2.modeling.build_model`, its norms set by the nodes MODEL.MABN, MODEL.BRN and MODEL.GN.

    MABN layers apply the ReLU behind them (`fuse_relu`). A model without norms of `NORMS` is left
    as Detectron2 builds it, except for the groups of its "GN".
    """
    model = detectron2_build_model(cfg)
    set_num_groups(model, cfg)
    if any(isinstance(module, norm_layers()) for module in model.modules()):
        check_paired(model)
        configure_norms(model, cfg)
        scale_norm_schedules(model, cfg.get("SOLVER", {}).get("ACCUMULATION_STEPS", 1))
        fuse_relu(model)
    return model


def replace_everywhere(stock: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Let every loaded module that holds Detectron2's function `stock` hold `ours` instead.

    Modules that are loaded later import it from where it is defined.
    """
    # Also the function of an earlier import of this package.
    held = {stock, vars(sys.modules[stock.__module__])[stock.__name__]}
    package = __name__.partition(".")[0]  # whose modules hold the stock function on purpose
    for module in list(sys.modules.values()):
        contents = getattr(module, "__dict__", None)  # not every entry is a module
        if not isinstance(contents, dict) or str(contents.get("__name__")).startswith(package):
            continue
        for name, value in list(contents.items()):
            # type(), because isinstance() asks torch's deprecated objects for their class: they warn.
            if type(value) is FunctionType and value in held:
                setattr(module, name, ours)
    vars(ours)["_stock"] = stock
    # LazyConfig.save writes this name, which a process without this package knows.
    ours.__module__ = stock.__module__


class _NoFalseWarning(logging.Filter):
    """Drops RetinaNet's warning that one norm for all levels may not work: here each has its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        shared = "Shared BatchNorm" in text
        return not (shared and any(str(layer) in text for layer in norm_layers()))


def register() -> None:
    """Let Detectron2 know the norms of `NORMS`; called once, by the import of the package."""
    replace_everywhere(detectron2_get_norm, get_norm)
    replace_everywhere(detectron2_build_model, build_model)
    replace_everywhere(detectron2_optimizer_params, get_default_optimizer_params)
    register_module_module_registration_hook(_pair)
    register_module_module_registration_hook(_split_levels)
    logging.getLogger(retinanet.__name__).addFilter(_NoFalseWarning())
