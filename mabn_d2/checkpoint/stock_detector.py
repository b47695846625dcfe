"""Whole detectors with MABN, folded to models that stock Detectron2 builds from a config."""

from copy import deepcopy
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.config.config import get_cfg  # the stock one, whatever the environment says
from detectron2.modeling.backbone.resnet import CNNBlockBase
from torch import nn

from ..config import add_mabn_config
from ..modeling.norm import BUILD_ERRORS, NORM, detectron2_build_model
from ..surgery.fold import fold_in_place
from ..surgery.fuse_relu import unfuse_relu
from .io import CheckpointError
from .record import KEY, check_recalibrated
from .state import WINDOWS, check, unwrap

# What this package registers, and what stock Detectron2 has in its place: the same but for initial
# weights, and widths and depths that it may not have.
_STOCK_NAMES = {
    "build_mabn_resnet_backbone": "build_resnet_backbone",
    "build_mabn_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_any_norm_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "PublishedConvFCHead": "FastRCNNConvFCHead",
}


def load_whole(model: nn.Module, checkpoint: Any) -> nn.Module:
    """Load a checkpoint of `model` for evaluation: all entries but the windows, which start empty.

    Raises:
        CheckpointError: listing entries that are missing, too many or don't fit, or if the file was
            converted from BatchNorm and not trained since.
    """
    if isinstance(checkpoint, dict):
        check_recalibrated(checkpoint.get(KEY), "the checkpoint")
    state, _ = unwrap(checkpoint)
    state = {k: v for k, v in state.items() if k.rpartition(".")[2] not in WINDOWS}
    model.load_state_dict(check(state, model.state_dict()))
    return model.eval()


def fold_detector(
    model: nn.Module, cfg: CfgNode, into: str = "frozen_bn"
) -> tuple[nn.Module, CfgNode]:
    """Return a folded copy of a built model, and the config for stock Detectron2 to build it from.

    With `into` "conv" the ResNet blocks, which have no bias in Detectron2, become "frozen_bn".

    Raises:
        CheckpointError: if stock Detectron2 does not build such a model.
    """
    model = unfuse_relu(deepcopy(model))  # stock models have the ReLU in its own place
    for module in list(model.modules()):
        if isinstance(module, CNNBlockBase):
            fold_in_place(module, "frozen_bn")
    model, stock = fold_in_place(model, into), stock_config(cfg, into)

    on_meta = stock.clone()
    on_meta.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            detectron2_build_model(on_meta).load_state_dict(model.state_dict(), strict=True)
    except BUILD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"stock Detectron2 has no config for this model: {reason}") from error
    return model, stock


def stock_config(cfg: CfgNode, into: str = "frozen_bn") -> CfgNode:
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
        new.MODEL.RETINANET.NORM = "BN"  # a list with a BatchNorm for each level
    if cfg.MODEL.BACKBONE.NAME.startswith("build_mabn_"):  # MABN whatever NORM says
        new.MODEL.FPN.NORM = "FrozenBN" if into == "frozen_bn" else ""
    if cfg.MODEL.RESNETS.NORM == NORM:
        new.MODEL.RESNETS.NORM = "FrozenBN"  # either way: the blocks have no bias
    for node in (new.MODEL.BACKBONE, new.MODEL.ROI_BOX_HEAD):
        node.NAME = _STOCK_NAMES.get(node.NAME, node.NAME)
    return new


def _delete(node: CfgNode, extended: CfgNode, stock: CfgNode) -> None:
    """Delete the keys that `extended` has beside those of `stock`."""
    for key, value in extended.items():
        if key not in stock:
            node.pop(key, None)
        elif isinstance(value, CfgNode):
            _delete(node[key], value, stock[key])


def changed(node: CfgNode, default: CfgNode) -> dict[str, Any]:
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
