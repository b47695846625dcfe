"""checkpoint/detector.py: maskrcnn-benchmark's names, made from a model with known outputs."""

import pytest
import torch

from detectors import assert_same_instances, narrow_cfg, randomized, scenes
from mabn_d2 import CheckpointError, convert_detector
from mabn_d2.modeling.norm import build_model
from maskrcnn_benchmark import published_state


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
