"""From MABN to layers that stock Detectron2 has, without a difference in evaluation.

A centred convolution is a convolution with centred filters, and MABN in evaluation,
y = w x / sqrt(R + eps) + b, is a FrozenBatchNorm2d with the mean 0 and the variance R. Where a head
has statistics of each level (RetinaNet), one FrozenBatchNorm2d can't hold them; Detectron2's list of
BatchNorms does.
"""

from copy import deepcopy

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import CNNBlockBase
from torch import nn

from ..checkpoint.io import CheckpointError
from ..checkpoint.state import WINDOWS, check, unwrap
from ..config import add_mabn_config
from ..layers import MABN2d, PerLevelNorm, center_weight
from ..modeling.norm import CENTRED, NORM, detectron2_build_model
from .fuse_relu import unfuse_relu

INTO = ("frozen_bn", "conv")
_STOCK = {centred: stock for stock, centred in CENTRED.items()}
# What this package registers, and what stock Detectron2 has in its place: the same but for initial
# weights, and widths and depths that it may not have.
_STOCK_NAMES = {
    "build_mabn_resnet_backbone": "build_resnet_backbone",
    "build_mabn_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_any_norm_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "PublishedConvFCHead": "FastRCNNConvFCHead",
}


class FrozenBatchNormReLU2d(FrozenBatchNorm2d):
    """FrozenBatchNorm2d for a norm made with activation="relu"; its state is the same."""

    def forward(self, x):
        return super().forward(x).relu()


def fold_mabn(model, into="frozen_bn"):
    """Return a copy of `model` in which centred convolutions and MABN are stock layers.

    Args:
        model: any module; what is neither CenConv2d, CenNormConv2d nor MABN2d is only copied.
        into: "frozen_bn", a convolution and a FrozenBatchNorm2d with the names of before; or
            "conv", one convolution with bias:

                W' = w / sqrt(R + eps) * (W - mean(W)),  b' = b + w / sqrt(R + eps) * b_conv

            Note that Detectron2's ResNet blocks have no bias under any norm, so that a file for it
            needs "frozen_bn" there (`fold_detector`).
        A PerLevelNorm becomes a CycleBatchNormList either way; it is for evaluation like the rest.

    Raises:
        ValueError: for another `into`, or naming norms that have no convolution to fold into.
    """
    if into not in INTO:
        raise ValueError(f"into is {into!r}: use one of {', '.join(INTO)}")
    return _fold(unfuse_relu(deepcopy(model)), into)


def _fold(model, into):
    """`fold_mabn` in place, but for a model that is a norm itself; returns the model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PerLevelNorm) and isinstance(child[0], MABN2d):
                setattr(parent, name, _per_level(child))
    places = list(_norms(model))
    if isinstance(model, MABN2d):
        places = [(None, None, "the model", model)]
    unpaired = [name for _, conv, name, _ in places if conv is None]
    if into == "conv" and unpaired:
        raise ValueError(
            f"no convolution in front to fold {', '.join(unpaired)} into: use into='frozen_bn'"
        )
    for module in model.modules():
        if type(module) in _STOCK:
            with torch.no_grad():
                module.weight.copy_(center_weight(module.weight))
            module.__class__ = _STOCK[type(module)]
    new = {}  # of each norm, which several modules may share
    for parent, conv, name, norm in places:
        if norm not in new:
            new[norm] = _frozen(norm) if into == "frozen_bn" else _fold_into(conv, norm)
        if parent is None:
            return new[norm]
        # Detectron2's Conv2d has None where it has no norm.
        inside = parent is conv and type(new[norm]) is nn.Identity
        setattr(parent, name.rpartition(".")[2], None if inside else new[norm])
    return model


def _norms(model):
    """Yield (parent, convolution or None, name, norm) of every place of a MABN layer."""
    for prefix, parent in model.named_modules():
        conv = parent if isinstance(parent, nn.Conv2d) else None
        for name, child in parent._modules.items():  # which, unlike named_children, repeats
            if isinstance(child, MABN2d):
                yield parent, conv, f"{prefix}.{name}".lstrip("."), child
            # The norm follows its convolution, as when they were paired.
            if not isinstance(parent, nn.Conv2d):
                conv = child if isinstance(child, nn.Conv2d) else None


def _frozen(norm):
    frozen = FrozenBatchNormReLU2d if norm.activation else FrozenBatchNorm2d
    frozen = frozen(norm.num_features, norm.eps).to(norm.running_var)
    with torch.no_grad():
        for name in ("weight", "bias", "running_var"):
            getattr(frozen, name).copy_(getattr(norm, name))
    return frozen.train(norm.training)


def _per_level(norms):
    """Return Detectron2's list of BatchNorms with the statistics of a PerLevelNorm of MABN."""
    levels = CycleBatchNormList(len(norms), num_features=norms[0].num_features)
    levels = levels.to(norms[0].running_var)
    with torch.no_grad():
        levels.weight.copy_(norms[0].weight)
        levels.bias.copy_(norms[0].bias)
        for level, norm in zip(levels, norms, strict=True):
            # A config has no eps for them.
            level.running_var.copy_((norm.running_var.double() + norm.eps - level.eps).clamp(min=0))
    return levels.train(norms.training)


def _fold_into(conv, norm):
    """Fold `norm` into `conv`, and return what is left of it: its ReLU or nothing."""
    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() + (0 if conv.bias is None else scale * conv.bias)
        conv.weight.copy_(conv.weight * scale[:, None, None, None])
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return nn.ReLU() if norm.activation else nn.Identity()


def load_whole(model, checkpoint):
    """Load a checkpoint of `model` for evaluation: all entries but the windows, which start empty.

    Raises:
        CheckpointError: listing entries that are missing, too many or don't fit.
    """
    state, _ = unwrap(checkpoint)
    state = {k: v for k, v in state.items() if k.rpartition(".")[2] not in WINDOWS}
    model.load_state_dict(check(state, model.state_dict()))
    return model.eval()


def fold_detector(model, cfg, into="frozen_bn"):
    """Return (folded copy of a built model, config that stock Detectron2 builds its like from).

    With `into` "conv" the ResNet blocks, which have no bias in Detectron2, become "frozen_bn".

    Raises:
        CheckpointError: if stock Detectron2 does not build such a model.
    """
    model = unfuse_relu(deepcopy(model))  # stock models have the ReLU in its own place
    for module in list(model.modules()):
        if isinstance(module, CNNBlockBase):
            _fold(module, "frozen_bn")
    model, stock = _fold(model, into), stock_config(cfg, into)

    on_meta = stock.clone()
    on_meta.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            detectron2_build_model(on_meta).load_state_dict(model.state_dict(), strict=True)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"stock Detectron2 has no config for this model: {reason}") from error
    return model, stock


def stock_config(cfg, into="frozen_bn"):
    """Return a copy of `cfg` without MABN, for stock Detectron2 and a model folded `into`."""
    stock, extended = get_cfg(), get_cfg()
    add_mabn_config(extended)
    new = cfg.clone()
    new.defrost()
    _delete(new, extended, stock)
    for node in (new.MODEL, *new.MODEL.values()):
        if hasattr(node, "get") and node.get("NORM") == NORM:
            node.NORM = "FrozenBN" if into == "frozen_bn" else ""
    if cfg.MODEL.RETINANET.NORM == NORM:
        new.MODEL.RETINANET.NORM = "BN"  # the list of a BatchNorm for each level, see `_per_level`
    if cfg.MODEL.BACKBONE.NAME.startswith("build_mabn_"):  # MABN whatever NORM says
        new.MODEL.FPN.NORM = "FrozenBN" if into == "frozen_bn" else ""
    if cfg.MODEL.RESNETS.NORM == NORM:
        new.MODEL.RESNETS.NORM = "FrozenBN"  # either way: the blocks have no bias
    for node in (new.MODEL.BACKBONE, new.MODEL.ROI_BOX_HEAD):
        node.NAME = _STOCK_NAMES.get(node.NAME, node.NAME)
    return new


def _delete(node, extended, stock):
    """Delete the keys that `extended` has beside those of `stock`."""
    for key, value in extended.items():
        if key not in stock:
            node.pop(key, None)
        elif isinstance(value, CfgNode):
            _delete(node[key], value, stock[key])


def changed(node, default):
    """Return the part of a config node that differs from `default`, as nested dicts."""
    result = {}
    for key, value in node.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            value = changed(value, default[key])
            if value:
                result[key] = value
        elif key not in default or value != default[key]:
            result[key] = value
    return result
