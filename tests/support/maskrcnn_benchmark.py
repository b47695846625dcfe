"""A detector's state in the names of maskrcnn-benchmark."""

import re

import torch

NAMES = [  # Detectron2 -> maskrcnn-benchmark
    (r"backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.stem.bn1"),
    (r"backbone\.bottom_up\.stem", "backbone.body.stem"),
    (
        r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm",
        r"backbone.body.layer\1.\2.downsample.1",
    ),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut", r"backbone.body.layer\1.\2.downsample.0"),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm", r"backbone.body.layer\1.\2.bn\3"),
    (r"backbone\.bottom_up\.res(\d)", r"backbone.body.layer\1"),
    (r"backbone\.fpn_lateral(\d)\.norm", r"backbone.fpn.fpn_inner\1.1"),
    (r"backbone\.fpn_lateral(\d)", r"backbone.fpn.fpn_inner\1.0"),
    (r"backbone\.fpn_output(\d)\.norm", r"backbone.fpn.fpn_layer\1.1"),
    (r"backbone\.fpn_output(\d)", r"backbone.fpn.fpn_layer\1.0"),
    (r"proposal_generator\.rpn_head\.objectness_logits", "rpn.head.cls_logits"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.bbox_pred"),
    (r"proposal_generator\.rpn_head", "rpn.head"),
    (r"roi_heads\.box_head\.fc1", "roi_heads.box.feature_extractor.fc6"),
    (r"roi_heads\.box_predictor", "roi_heads.box.predictor"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.norm", r"roi_heads.mask.feature_extractor.mask_fcn\1.1"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)", r"roi_heads.mask.feature_extractor.mask_fcn\1.0"),
    (r"roi_heads\.mask_head\.deconv", "roi_heads.mask.predictor.conv5_mask"),
    (r"roi_heads\.mask_head\.predictor", "roi_heads.mask.predictor.mask_fcn_logits"),
]


def published_name(name):
    if found := re.match(r"roi_heads\.box_head\.conv(\d)(\.norm)?\.(\w+)", name):
        index = 3 * (int(found[1]) - 1) + bool(found[2])
        return f"roi_heads.box.feature_extractor.xconvs.{index}.{found[3]}"
    for pattern, new in NAMES:
        renamed, count = re.subn(pattern, new, name)
        if count:
            # Stages and levels count from 1 there, and from 2 here.
            return re.sub(r"(layer|fpn_inner)(\d)", lambda m: f"{m[1]}{int(m[2]) - 1}", renamed)
    raise AssertionError(name)


def published_state(model):
    """The model's state in maskrcnn-benchmark's names, with the background as class 0."""
    state = {}
    for name, value in model.state_dict().items():
        if "bbox_pred" in name and "rpn" not in name:
            value = torch.cat([torch.randn(4, *value.shape[1:]), value])
        elif "mask_head.predictor" in name:
            value = torch.cat([torch.randn(1, *value.shape[1:]), value])
        elif "cls_score" in name:
            value = torch.cat([value[-1:], value[:-1]])
        state[f"module.{published_name(name)}"] = value
    for level in range(5):
        state[f"module.rpn.anchor_generator.cell_anchors.{level}"] = torch.randn(3, 4)
    return state
