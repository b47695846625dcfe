"""BatchNorm to MABN, in any model that is already built, in place."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..layers import MABN2d, PerLevelNorm
from .batch_norms import BATCH_NORM_LISTS, is_batch_norm, mabn_like
from .convolutions import center_conv, check_conv, is_centred
from .first_forward import check_in_first_forward
from .in_place import become
from .pairs import Pair, find_pairs

_logger = logging.getLogger(__name__)


def convert_mabn(model: nn.Module, example_inputs: Any = None, **settings: Any) -> nn.Module:
    """Replace every BatchNorm of `model` by MABN and centre the convolution in front; return it.

    Takes any torch module: torchvision's, timm's, Detectron2's, one's own. SyncBatchNorm, timm's
    BatchNormAct2d with its activation, and Detectron2's CycleBatchNormList are converted too;
    FrozenBatchNorm2d, no batch norm, is not. Parameters, eps, what is frozen, device and dtype stay. A
    convolution's bias, which BatchNorm cancels and MABN would not, becomes zero. `running_var` is
    taken over although it belongs to filters that were not centred: train the model, or re-estimate it
    from data (`update_mabn_stats`), before it is evaluated.

    Where a MABN layer is there already, as in `torchvision.models.resnet18(norm_layer=MABN2d)`, and the
    convolution in front is not centred, that is done, and the layer gets the settings. One whose
    convolution is not found is left as it is, with a warning.

    With `example_inputs` a forward shows which convolution's output each norm gets, in any order of
    registration. Without them it is the convolution that the norm is an attribute of (Detectron2's
    Conv2d), the one that a symbolic trace of the forward shows, or else the module registered just
    before the norm. What only a trace or the order says, the first training forward checks: it
    raises ValueError, naming both, if the norm's input is not the output of that convolution.

    Note that `torch.optim.swa_utils.update_bn` and fvcore's `update_bn_stats` look for BatchNorm and
    do nothing to a converted model. Use `update_mabn_stats(model, data_loader, num_iters)` instead.

    Args:
        example_inputs: the arguments of the model, a tuple, or its only argument. The model runs on
            them once in evaluation mode, without gradients.
        settings: any of `MABN2d.configure`'s.
    Returns:
        The model.
    Raises:
        ValueError: naming each norm that can't be converted and why, or for a setting out of range;
            the model is then as it was.
        TypeError: for an unknown setting.
    """
    MABN2d(1).configure(**settings)
    norms = dict(_batch_norms(model))
    layers = dict(_mabn_layers(model))
    pairs = find_pairs(model, [*norms, *layers], example_inputs)
    new: dict[nn.Module, nn.Module] = {}
    good: dict[nn.Module, Pair] = {}
    problems = []
    for norm, path in norms.items():
        try:
            new[norm] = mabn_like(norm, settings)
            pair = pairs[norm]
            if isinstance(pair, str):
                raise ValueError(pair)
            for conv in pair.convs:
                check_conv(conv, norm.get_parameter("weight").numel())
            good[norm] = pair
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
    left = []
    for layer, path in layers.items():
        pair = pairs[layer]
        try:
            if isinstance(pair, str):
                raise ValueError(pair)
            if all(is_centred(conv) for conv in pair.convs):
                continue
            for conv in pair.convs:
                check_conv(conv, layer.num_features)
            copy.deepcopy(layer).configure(**settings)
            good[layer] = pair
        except (TypeError, ValueError) as error:
            left.append(f"{path}: {error}")
    if not good and not problems:
        problems += [f"{type(model).__name__} has no BatchNorm among its parts", *left]
    if len(problems) > 20:
        problems[20:] = [f"... and {len(problems) - 20} more norms"]
    if problems:
        raise ValueError("can't convert to MABN:\n" + "\n".join(problems))
    names = {module: name for name, module in model.named_modules()}
    for norm, pair in good.items():
        for conv in pair.convs:
            center_conv(conv)
            if norm in norms and conv.bias is not None:
                nn.init.zeros_(conv.bias)
        if isinstance(norm, MABN2d):
            norm.configure(**settings)
        else:
            become(norm, new[norm])
        if not pair.certain:
            check_in_first_forward(norm, pair.convs, names)
    if norms:
        _logger.warning(
            f"{len(norms)} norms are MABN now, their statistics those of BatchNorm: train the model, "
            "or re-estimate them from data, before evaluating it"
        )
    if left:
        _logger.warning("MABN layers that are left as they are:\n" + "\n".join(left))
    return model


def _mabn_layers(model: nn.Module) -> Iterator[tuple[MABN2d, str]]:
    """Yield (layer, path) of every MABN layer that is not one of several levels."""
    inside = {norm for m in model.modules() if isinstance(m, PerLevelNorm) for norm in m}
    for path, module in model.named_modules():
        if isinstance(module, MABN2d) and module not in inside:
            yield module, path or "the model"


def _batch_norms(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield (norm, path) of every BatchNorm or list of them."""
    lists = tuple(BATCH_NORM_LISTS)
    inside = {norm for m in model.modules() if isinstance(m, lists) for norm in m}
    for path, module in model.named_modules():
        if is_batch_norm(module) and module not in inside:
            yield module, path or "the model"
