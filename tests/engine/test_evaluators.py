"""Datasets of other types than COCO's train and are evaluated by Detectron2's evaluators."""

import importlib.util

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, BoxMode, Instances

from coco_datasets import CLASSES, SIZE, make_dataset, read_rectangles
from mabn_d2.engine import ConfigError, Trainer, check_data

OBJECT = """<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>
<difficult>0</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
</object>"""
PICTURE = (
    "<annotation><size><width>{size}</width><height>{size}</height></size>{objects}</annotation>"
)


@pytest.fixture
def voc(tmp_path):
    """Register the rectangles in Pascal VOC's form, as own_voc_train and own_voc_val."""
    from PIL import Image

    data = make_dataset(tmp_path)
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / name).mkdir(parents=True)
    for split, content in data.items():
        ids = []
        for image in content["images"]:
            ids.append(f"{split}{image['id']}")
            source = tmp_path / split / image["file_name"]
            Image.open(source).save(tmp_path / "JPEGImages" / f"{ids[-1]}.jpg")
            objects = []
            for a in content["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    name = CLASSES[a["category_id"] - 1]
                    objects.append(OBJECT.format(x + 1, y + 1, x + w, y + h, name=name))
            text = PICTURE.format(size=SIZE, objects="".join(objects))
            (tmp_path / "Annotations" / f"{ids[-1]}.xml").write_text(text)
        (tmp_path / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids))
        register_pascal_voc(f"own_voc_{split}", str(tmp_path), split, 2012, CLASSES)
        MetadataCatalog.get(f"own_voc_{split}").evaluator_type = "pascal_voc"
    yield tmp_path
    for split in data:
        DatasetCatalog.remove(f"own_voc_{split}")
        MetadataCatalog.remove(f"own_voc_{split}")


def test_pascal_voc(digits_cfg, voc):
    cfg = read_rectangles(digits_cfg, masks=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_voc_train",), ("own_voc_val",)
    trainer = Trainer(cfg)
    trainer.train()
    assert 0 <= trainer._last_eval_results["bbox"]["AP"] <= 100
    evaluator = Trainer.build_evaluator(cfg, "own_voc_val")
    evaluator.reset()
    for record in DatasetCatalog.get("own_voc_val"):
        found = Instances((SIZE, SIZE))
        objects = record["annotations"]
        assert all(o["bbox_mode"] == BoxMode.XYXY_ABS for o in objects)
        found.pred_boxes = Boxes(torch.tensor([o["bbox"] for o in objects], dtype=torch.float))
        found.pred_classes = torch.tensor([o["category_id"] for o in objects])
        found.scores = torch.ones(len(objects))
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_pascal_voc_is_checked(digits_cfg, voc):
    cfg = read_rectangles(digits_cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_voc_train",), ("own_voc_val",)
    with pytest.raises(ValueError, match="MODEL.MASK_ON is True, but own_voc_train .*has no masks"):
        check_data(cfg)
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = False, 20
    with pytest.raises(
        ValueError, match="NUM_CLASSES is 20, but own_voc_train .* has 3 categories"
    ):
        check_data(cfg)
    cfg.DATASETS.TRAIN = ("voc_2007_trainval",)
    with pytest.raises(
        ValueError, match="'voc_2007_trainval', which can't be loaded .*download it"
    ):
        check_data(cfg)


def test_pascal_voc_files_that_train_and_do_not_evaluate(digits_cfg, voc):
    cfg = read_rectangles(digits_cfg, masks=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_voc_train",), ("own_voc_val",)
    for split in ("train", "val"):
        for file in (voc / "Annotations").glob(f"{split}*.xml"):
            file.write_text(file.read_text().replace("<pose>Unspecified</pose>", ""))
        if split == "train":
            check_data(cfg)
    parse_rec.cache_clear()
    with pytest.raises(ConfigError, match="val1.xml can't be evaluated.*each object needs pose"):
        check_data(cfg)


def test_lvis(digits_cfg):
    """Its file and its package are asked for before the training."""
    digits_cfg.DATASETS.TEST = ("lvis_v1_val",)
    with pytest.raises(ValueError, match="which needs .*lvis_v1_val.json, .* does not exist"):
        check_data(digits_cfg)
    if importlib.util.find_spec("lvis") is None:
        with pytest.raises(ConfigError, match="needs the package lvis: install it"):
            Trainer.build_evaluator(digits_cfg, "lvis_v1_val")
