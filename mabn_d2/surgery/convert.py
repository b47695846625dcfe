"""BatchNorm to MABN, in any model that is already built, in place."""

import logging
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import MABN2d, PerLevelNorm, SplitBatchNorm2d
from .convolutions import center_conv, check_conv, is_convolution
from .in_place import become

_logger = logging.getLogger(__name__)

# Norms whose forward is BatchNorm and nothing else.
PLAIN_BATCH_NORMS: set[type[nn.Module]] = {nn.BatchNorm2d, nn.SyncBatchNorm, SplitBatchNorm2d}
# Lists of BatchNorms, one for each feature level, that share `weight` and `bias`.
BATCH_NORM_LISTS: set[type[nn.Module]] = set()


def convert_mabn(model: nn.Module, **settings: object) -> nn.Module:
    """Replace every BatchNorm of `model` by MABN and centre the convolution in front; return it.

    Takes any torch module: torchvision's, Detectron2's, one's own. SyncBatchNorm and Detectron2's
    CycleBatchNormList are converted too; FrozenBatchNorm2d, no batch norm, is not. Weights, eps,
    what is frozen, device and dtype stay. A convolution's bias, which BatchNorm cancels and
    MABN would not, becomes zero. `running_var` is taken over although it belongs to filters that
    were not centred: train the model, or re-estimate it from data, before it is evaluated.

    The convolution in front is the one that the norm is an attribute of (Detectron2's Conv2d), or
    the module registered just before it in the same parent, as torchvision and Detectron2 do it.
    Where a model registers its modules in another order, something else stands there: an error.

    Args:
        settings: any of `MABN2d.configure`'s.
    Raises:
        ValueError: naming each norm that can't be converted and why, or for a setting out of range;
            the model is then as it was.
        TypeError: for an unknown setting.
    """
    MABN2d(1).configure(**settings)
    found = list(_batch_norms(model))
    converted, problems = [], []
    for path, parent, norm in found:
        try:
            new = _mabn_like(norm, settings)
            conv = _conv_in_front(parent, norm)
            check_conv(conv, norm.weight.numel())
            converted.append((norm, conv, new))
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
    if not found:
        problems.append(f"{type(model).__name__} has no BatchNorm among its parts")
    if problems:
        raise ValueError("can't convert to MABN:\n" + "\n".join(problems))
    for norm, conv, new in converted:
        center_conv(conv)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        become(norm, new)
    _logger.warning(
        f"{len(found)} norms are MABN now, their statistics those of BatchNorm: train the model, "
        "or re-estimate them from data, before evaluating it"
    )
    return model


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield (path, parent, norm) of every BatchNorm or list of them."""
    lists = tuple(BATCH_NORM_LISTS)
    for prefix, parent in model.named_modules():
        if not isinstance(parent, lists):
            for name, norm in parent.named_children():
                if isinstance(norm, (_BatchNorm, *lists)):
                    yield f"{prefix}.{name}".lstrip("."), parent, norm


def _conv_in_front(parent, norm):
    if is_convolution(parent):
        return parent
    siblings = list(parent.children())
    position = siblings.index(norm)
    if position == 0:
        raise ValueError(f"nothing stands in front of it in {type(parent).__name__}")
    return siblings[position - 1]


def _mabn_like(norm, settings):
    """Return a MABN2d, or a PerLevelNorm of them, with the parameters and statistics of `norm`."""
    levels = norm if isinstance(norm, tuple(BATCH_NORM_LISTS)) else [norm]
    if not isinstance(levels[0], (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise ValueError(f"MABN is for 2d features, which {type(norm).__name__} is not")
    if norm.weight is None:
        raise ValueError("it has no weight (affine=False), which MABN always has")
    new = MABN2d(norm.weight.numel(), device=norm.weight.device, dtype=norm.weight.dtype)
    new.configure(**{"eps": levels[0].eps} | settings)
    # The same parameters: an optimizer may hold them already.
    new.weight, new.bias = norm.weight, norm.bias
    if levels is norm:
        new = PerLevelNorm(new, len(levels))
    for level, old in zip((m for m in new.modules() if isinstance(m, MABN2d)), levels, strict=True):
        if old.running_var is not None:
            level.running_var.copy_(old.running_var)
    return new.train(norm.training)
