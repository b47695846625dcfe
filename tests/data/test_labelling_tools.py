"""Exports of labelling tools are accepted, train and evaluate as they are."""

import math

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances

from coco_datasets import make_dataset, read_rectangles, registered
from labelling_tools import TOOLS
from mabn_d2.engine import Trainer, check_data


def prepare(tool, cfg, folder):
    """Return the datasets of a tool, and set the config as its user would."""
    data = make_dataset(folder)
    masks = [tool(content) for content in data.values()]
    read_rectangles(cfg, all(masks))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(data["train"]["categories"])
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if any(isinstance(a["segmentation"], dict) for a in data["train"]["annotations"]):
        cfg.INPUT.MASK_FORMAT = "bitmask"
    return data


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_export_is_accepted(tool, digits_cfg, tmp_path, caplog):
    """The check accepts it; at most one warning for each set says what is doubtful."""
    data = prepare(tool, digits_cfg, tmp_path)
    with registered(tmp_path, data) as names:
        digits_cfg.DATASETS.TRAIN, digits_cfg.DATASETS.TEST = (names["train"],), (names["val"],)
        check_data(digits_cfg)
    warnings = {r.message for r in caplog.records if r.name.startswith("mabn_d2")}
    assert len(warnings) <= 2, warnings


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_perfect_predictions_have_an_ap_of_100(tool, digits_cfg, tmp_path):
    """Also where ids are text or begin with 0, which pycocotools takes for "not found"."""
    results = evaluate_perfect(digits_cfg, tmp_path, prepare(tool, digits_cfg, tmp_path))
    assert results["bbox"]["AP"] == pytest.approx(100)
    if digits_cfg.MODEL.MASK_ON:
        assert results["segm"]["AP"] > 95  # polygons of floats are not quite their bitmaps


def change_to_many(annotations):
    """150 objects in the first image; COCO's own evaluation counts 100."""
    annotations[0].update(bbox=[0, 0, 5, 5])
    for i in range(1, 150):
        box = [i % 15 * 6, i // 15 * 6, 5, 5]
        annotations.append({**annotations[0], "id": 900 + i, "bbox": box})


def change_to_outside(annotations):
    for annotation in annotations[:3]:
        annotation.update(bbox=[-20, 4, 40, 15])


def change_to_no_area(annotations):
    for position, side in ((0, 2), (3, 3)):
        annotations[position]["bbox"][side] = 0


@pytest.mark.parametrize(
    "change, detections",
    [
        (change_to_many, 150),
        (change_to_many, 100),
        (change_to_outside, 100),
        (change_to_no_area, 100),
    ],
)
def test_perfect_predictions_of_unusual_objects(change, detections, digits_cfg, tmp_path):
    data = make_dataset(tmp_path)
    read_rectangles(digits_cfg, masks=False)
    digits_cfg.TEST.DETECTIONS_PER_IMAGE = detections
    change(data["val"]["annotations"])
    ap = evaluate_perfect(digits_cfg, tmp_path, data)["bbox"]["AP"]
    assert (ap < 90) if change is change_to_many and detections == 100 else ap == pytest.approx(100)


def evaluate_perfect(cfg, folder, data):
    """Return the results of a model that predicts what the data says, clipped to the images."""
    with registered(folder, data) as names:
        cfg.DATASETS.TEST = (names["val"],)
        check_data(cfg, train=False)
        evaluator = Trainer.build_evaluator(cfg, names["val"])
        evaluator.reset()
        for record in DatasetCatalog.get(names["val"]):
            evaluator.process([record], [{"instances": perfect_predictions(record)}])
        return evaluator.evaluate()


def perfect_predictions(record):
    """Return what a perfect model predicts for a record."""
    size = int(record["height"]), int(record["width"])
    target = annotations_to_instances(record["annotations"], size, "bitmask")
    target.gt_boxes.clip(size)
    found = Instances(size, pred_boxes=target.gt_boxes, pred_classes=target.gt_classes)
    found.scores = torch.linspace(1, 0.5, len(target))
    if target.has("gt_masks"):
        found.pred_masks = target.gt_masks.tensor
    return found


TRAINED = ("roboflow", "cvat_masks", "sahi_masks", "via", "supervisely", "fiftyone")


@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(tool, marks=() if tool.__name__ in TRAINED else pytest.mark.slow)
        for tool in TOOLS
    ],
    ids=lambda tool: tool.__name__,
)
def test_export_trains_and_evaluates(tool, digits_cfg, tmp_path):
    data = prepare(tool, digits_cfg, tmp_path)
    with registered(tmp_path, data) as names:
        digits_cfg.DATASETS.TRAIN, digits_cfg.DATASETS.TEST = (names["train"],), (names["val"],)
        trainer = Trainer(digits_cfg)
        assert len(trainer.data_loader.dataset) == 6
        assert sum(len(r["annotations"]) for r in trainer.data_loader.dataset.records) == 12
        trainer.train()
    for task in ("bbox", "segm") if digits_cfg.MODEL.MASK_ON else ("bbox",):
        assert not math.isnan(trainer._last_eval_results[task]["AP"])
