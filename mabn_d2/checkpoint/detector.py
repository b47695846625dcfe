"""Detectors with MABN that were trained in maskrcnn-benchmark -> Detectron2's names."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg

from ..config import add_mabn_config
from ..modeling.norm import NORM, build_model
from .io import CheckpointError
from .record import checkpoint_of, recorded
from .resnet import detectron2_name, resnet_config, without_data
from .state import check, rename, to_mabn, unwrap

# What the published detector was trained with.
_PUBLISHED = {
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
_BACKBONE = "backbone.bottom_up."
_ANCHORS = re.compile(r"rpn\.anchor_generator\.cell_anchors\.\d")
_RPN = {"conv": "conv", "cls_logits": "objectness_logits", "bbox_pred": "anchor_deltas"}
_MASK = {"conv5_mask": "deconv", "mask_fcn_logits": "predictor"}


def _norm(part: str | None) -> str:
    """A convolution and its norm are entries 0 and 1 of a Sequential there; None without a norm."""
    return ".norm" if part == "1" else ""


def _xconv(index: str, entry: str) -> str:
    layer, part = divmod(int(index), 3)  # convolution, norm, ReLU
    return f"roi_heads.box_head.conv{layer + 1}{_norm(str(part))}.{entry}"


def _body(rest: str) -> str | None:
    name = detectron2_name(rest)
    return name and _BACKBONE + name


# Pattern of a name there, and what makes Detectron2's name of the pattern's groups.
_RULES: dict[str, Callable[..., str | None]] = {
    r"backbone\.body\.(.+)": _body,
    r"backbone\.fpn\.fpn_inner([1-4])(?:\.([01]))?\.(\w+)": lambda i, part, entry: (
        f"backbone.fpn_lateral{int(i) + 1}{_norm(part)}.{entry}"
    ),
    r"backbone\.fpn\.fpn_layer([1-4])(?:\.([01]))?\.(\w+)": lambda i, part, entry: (
        f"backbone.fpn_output{int(i) + 1}{_norm(part)}.{entry}"
    ),
    r"rpn\.head\.(conv|cls_logits|bbox_pred)\.(\w+)": lambda layer, entry: (
        f"proposal_generator.rpn_head.{_RPN[layer]}.{entry}"
    ),
    r"roi_heads\.box\.feature_extractor\.xconvs\.(\d+)\.(\w+)": _xconv,
    r"roi_heads\.box\.feature_extractor\.fc([67])\.(\w+)": lambda i, entry: (
        f"roi_heads.box_head.fc{int(i) - 5}.{entry}"
    ),
    r"roi_heads\.box\.predictor\.(cls_score|bbox_pred)\.(\w+)": lambda layer, entry: (
        f"roi_heads.box_predictor.{layer}.{entry}"
    ),
    r"roi_heads\.mask\.feature_extractor\.mask_fcn(\d)(?:\.([01]))?\.(\w+)": (
        lambda i, part, entry: f"roi_heads.mask_head.mask_fcn{i}{_norm(part)}.{entry}"
    ),
    r"roi_heads\.mask\.predictor\.(conv5_mask|mask_fcn_logits)\.(\w+)": lambda layer, entry: (
        f"roi_heads.mask_head.{_MASK[layer]}.{entry}"
    ),
}


def _name(name: str) -> str | None:
    for pattern, new_name in _RULES.items():
        if found := re.fullmatch(pattern, name):
            return new_name(*found.groups())
    return None


def _background_last(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move class 0, the background, to the end; it has no boxes and no masks in Detectron2."""
    for entry in ("weight", "bias"):
        for name, rows in (("box_predictor.bbox_pred", 4), ("mask_head.predictor", 1)):
            name = f"roi_heads.{name}.{entry}"
            if name in state:
                state[name] = state[name][rows:]
        name = f"roi_heads.box_predictor.cls_score.{entry}"
        if name in state:
            state[name] = state[name].roll(-1, 0)
    return state


def _config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the config of the detector whose entries, in Detectron2's names, `state` has."""

    def shape(name: str) -> torch.Size:
        if name not in state or state[name].dim() < 2 or 0 in state[name].shape:
            raise CheckpointError(f"{name} is missing or empty: this is no Mask R-CNN with FPN")
        return state[name].shape

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in state)

    resnet = {k.removeprefix(_BACKBONE): v for k, v in state.items() if k.startswith(_BACKBONE)}
    fpn_norm = "backbone.fpn_lateral2.norm.weight" in state
    num_conv = count(r"roi_heads\.box_head\.conv\d+\.weight")
    fpn_channels = shape("backbone.fpn_lateral2.weight")[0]
    conv_dim = shape("roi_heads.box_head.conv1.weight")[0] if num_conv else fpn_channels
    fc = shape("roi_heads.box_head.fc1.weight")
    classes = shape("roi_heads.box_predictor.cls_score.weight")[0] - 1
    config = resnet_config(resnet) | {
        # Only the second leaves the norms out of the FPN.
        "MODEL.BACKBONE.NAME": "build_mabn_resnet_fpn_backbone"
        if fpn_norm
        else "build_any_norm_resnet_fpn_backbone",
        "MODEL.RESNETS.NORM": NORM,
        "MODEL.FPN.NORM": NORM if fpn_norm else "",
        "MODEL.FPN.OUT_CHANNELS": fpn_channels,
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": num_conv,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": conv_dim,
        "MODEL.ROI_BOX_HEAD.NORM": NORM if "roi_heads.box_head.conv1.norm.weight" in state else "",
        "MODEL.ROI_BOX_HEAD.NUM_FC": count(r"roi_heads\.box_head\.fc\d\.weight"),
        "MODEL.ROI_BOX_HEAD.FC_DIM": fc[0],
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": round((fc[1] / conv_dim) ** 0.5),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (
            shape("roi_heads.box_predictor.bbox_pred.weight")[0] == 4 != 4 * classes
        ),
        "MODEL.MASK_ON": "roi_heads.mask_head.predictor.weight" in state,
    }
    if config["MODEL.MASK_ON"]:
        config |= {
            "MODEL.ROI_MASK_HEAD.NUM_CONV": count(r"roi_heads\.mask_head\.mask_fcn\d\.weight"),
            "MODEL.ROI_MASK_HEAD.CONV_DIM": shape("roi_heads.mask_head.predictor.weight")[1],
            "MODEL.ROI_MASK_HEAD.NORM": (
                NORM if "roi_heads.mask_head.mask_fcn1.norm.weight" in state else ""
            ),
        }
    return config


def _expected(config: Mapping[str, Any], anchors: int) -> dict[str, torch.Tensor]:
    """Return the state dict, without data, of the detector that {config key: value} builds."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0] * anchors]  # only their number matters
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    for key, value in config.items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.DEVICE = "meta"
    with without_data("detector"):
        return build_model(cfg).state_dict()


def convert_detector(
    checkpoint: Any,
    stride_in_1x1: bool | None = None,
    channel_order: str | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    keep_buffers: bool = False,
) -> dict[str, Any]:
    """Convert a Mask (or Faster) R-CNN with FPN and MABN from maskrcnn-benchmark to Detectron2.

    Besides the names: the background is class 0 there and the last one here, without boxes and
    masks of its own.

    Args:
        checkpoint: a state dict, or what wraps one.
        stride_in_1x1, channel_order, pixel_mean, pixel_std: recorded as config keys; None is what
            the published detector used.
        keep_buffers: keep MABN's windows and counter, which start over otherwise.
    Returns:
        {"model": state dict, "__author__": ..., "mabn_d2": {"source", "config", "dropped"}}.
    Raises:
        CheckpointError: listing entries that no rule knows, that are missing or don't fit.
    """
    state, beside = unwrap(checkpoint)
    anchors = [name for name in state if _ANCHORS.fullmatch(name)]
    for name in anchors:
        del state[name]
    state, dropped, recalibrate = to_mabn(_background_last(rename(state, _name)), keep_buffers)
    config = _config(state)
    logits = state.get("proposal_generator.rpn_head.objectness_logits.weight")
    expected = _expected(config, 1 if logits is None else max(len(logits), 1))
    state = check(state, expected)
    trained = recorded(_PUBLISHED, stride_in_1x1, channel_order, pixel_mean, pixel_std)
    dropped |= {"anchors, which the config makes": anchors, "entries beside the weights": beside}
    return checkpoint_of(
        state, "maskrcnn-benchmark detector", config | trained, dropped, recalibrate
    )
