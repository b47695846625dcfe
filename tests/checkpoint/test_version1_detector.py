"""A detector's checkpoint of version 1 of MABN2d's state loads and detects the same."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from detectors import scenes
from mabn_d2 import add_mabn_config
from paths import ROOT


def test_detector():
    file = torch.load(ROOT / "tests/golden/version1/detector.pth", weights_only=True)
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"))
    cfg.merge_from_list(file["options"])
    model = build_model(cfg).eval()
    model.load_state_dict(file["model"])
    with torch.no_grad():
        outputs = model(scenes(len(file["instances"])))
    for wanted, output in zip(file["instances"], outputs, strict=True):
        found = output["instances"]
        assert torch.equal(found.pred_classes, wanted["classes"]) and len(found) > 0
        torch.testing.assert_close(found.pred_boxes.tensor, wanted["boxes"], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
