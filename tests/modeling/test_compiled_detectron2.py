"""Detectron2's compiled operators, which its official build has: rotated boxes, fast COCO evaluation."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, BoxMode, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from pycocotools.cocoeval import COCOeval

from mabn_d2 import add_mabn_config
from mabn_d2.layers import MABN2d
from mabn_d2.modeling.norm import build_model

COMPILED = find_spec("detectron2._C") is not None


def evaluate(dataset, fast):
    """Evaluate predictions that are the truth with noise, some of the wrong class."""
    records = DatasetCatalog.get(dataset)  # makes the files
    evaluator = COCOEvaluator(dataset, ("bbox",), False, use_fast_impl=fast)
    evaluator.reset()
    rng = np.random.default_rng(0)
    for record in records:
        size = record["height"], record["width"]
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        classes = [a["category_id"] for a in record["annotations"]]
        noise = rng.normal(0, 3, (len(boxes), 4))
        wrong = rng.random(len(boxes)) < 0.2
        found = Instances(
            size,
            pred_boxes=Boxes(torch.as_tensor(np.array(boxes) + noise, dtype=torch.float32)),
            scores=torch.as_tensor(rng.random(len(boxes)), dtype=torch.float32),
            pred_classes=torch.as_tensor((np.array(classes) + wrong) % 10),
        )
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def test_fast_coco_evaluation_gives_the_same(small_scenes):
    """The pure Python copy falls back to pycocotools."""
    assert (coco_evaluation.COCOeval_opt is not COCOeval) == COMPILED
    fast, slow = (evaluate("small_scenes_val", fast) for fast in (True, False))
    assert 5 < slow["AP"] < 95
    assert fast == pytest.approx(slow, nan_ok=True)


@pytest.mark.compiled_detectron2
def test_rotated_boxes_train_and_infer():
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    add_mabn_config(cfg)
    model = cfg.MODEL
    model.DEVICE, model.WEIGHTS, model.BACKBONE.FREEZE_AT = "cpu", "", 0
    model.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    model.ANCHOR_GENERATOR.ANGLES = [[-90, -45, 0, 45]]
    model.PROPOSAL_GENERATOR.NAME, model.ROI_HEADS.NAME = "RRPN", "RROIHeads"
    model.RPN.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0)
    model.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0, 1.0)
    model.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignRotated"
    model.ROI_BOX_HEAD.NUM_CONV, model.ROI_BOX_HEAD.NUM_FC = 2, 1
    model.ROI_BOX_HEAD.CONV_DIM, model.ROI_BOX_HEAD.FC_DIM = 16, 32
    model.FPN.OUT_CHANNELS, model.ROI_HEADS.NUM_CLASSES = 16, 3
    model.RESNETS.STEM_OUT_CHANNELS, model.RESNETS.RES2_OUT_CHANNELS = 8, 16
    model.RESNETS.WIDTH_PER_GROUP = 4
    model.RESNETS.NORM = model.FPN.NORM = model.ROI_BOX_HEAD.NORM = "MABN"
    detector = build_model(cfg)
    boxes = torch.tensor([[40.0, 40, 30, 20, 30], [80, 60, 20, 40, -50]])
    truth = Instances((128, 128), gt_boxes=RotatedBoxes(boxes), gt_classes=torch.tensor([0, 2]))
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    with EventStorage():
        losses = detector([{"image": image, "instances": truth}] * 2)
    sum(losses.values()).backward()
    norms = [module for module in detector.modules() if isinstance(module, MABN2d)]
    assert len(norms) == 53 + 8 + 2
    assert all(norm.iters == 1 and norm.weight.grad.isfinite().all() for norm in norms)
    with torch.no_grad():
        (output,) = detector.eval()([{"image": image}])
    assert isinstance(output["instances"].pred_boxes, RotatedBoxes)
