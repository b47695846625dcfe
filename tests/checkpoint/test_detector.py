"""checkpoint/detector.py: maskrcnn-benchmark's names, made from a model with known outputs."""

import re

import pytest
import torch

from detectors import assert_same_instances, narrow_cfg, randomized, scenes
from mabn_d2 import CheckpointError, convert_detector
from mabn_d2.modeling.norm import build_model

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


@pytest.mark.parametrize("keep_buffers", [False, True])
def test_round_trip(keep_buffers):
    cfg = narrow_cfg()
    model = randomized(build_model(cfg))
    wrapped = {"model": published_state(model), "iteration": 180000, "optimizer": {"state": {}}}
    checkpoint = convert_detector(wrapped, keep_buffers=keep_buffers)

    record = checkpoint["mabn_d2"]
    assert sum(map(len, record["dropped"].values())) == 5 + 2 + (0 if keep_buffers else 3 * 69)
    for key, value in record["config"].items():  # the config is read off the shapes
        node = cfg
        for name in key.split("."):
            node = node[name]
        if key not in ("MODEL.PIXEL_MEAN", "MODEL.RESNETS.STRIDE_IN_1X1"):
            assert node == value, key

    found = build_model(cfg)
    assert found.load_state_dict(checkpoint["model"], strict=True)
    assert_same_instances(model(scenes()), found.eval()(scenes()), rtol=0)


def test_what_does_not_fit_is_refused():
    state = published_state(build_model(narrow_cfg()))
    for name, value, message in (
        ("module.roi_heads.keypoint.predictor.weight", torch.ones(1), "keypoint.predictor.weight"),
        ("module.rpn.head.conv.bias", None, "1 missing: proposal_generator.rpn_head.conv.bias"),
        ("module.roi_heads.box.predictor.cls_score.bias", torch.ones(9), r"cls_score.bias \(9,\)"),
        ("module.backbone.fpn.fpn_inner1.0.weight", None, "fpn_lateral2.weight is missing"),
        ("module.rpn.head.cls_logits.weight", torch.full((3, 16, 1, 1), torch.inf), "objectness"),
    ):
        changed = {k: v for k, v in (state | {name: value}).items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            convert_detector(changed)
