"""Datasets of other types than COCO's train and are evaluated by Detectron2's evaluators."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.structures.masks import polygons_to_bitmask
from PIL import Image

import other_datasets
from coco_datasets import CLASSES, SIZE, make_dataset, read_rectangles
from commands import lines, run_support
from mabn_d2.data import DataError
from mabn_d2.engine import ConfigError, Trainer, check_data
from mabn_d2.engine.evaluators import EVALUATORS
from mabn_d2.engine.hooks.best_checkpoint import TASKS_OF_MODELS, task_of
from mabn_d2.engine.metric_check import scalars
from mabn_d2.engine.numpy_2 import evaluators_on_numpy_2
from mabn_d2.engine.report import report_run

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
    assert scalars_of(trainer) == known_scalars(cfg)
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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda names, xml: names.write_text("train1"), "train.txt names one image, .*: add one"),
        (
            lambda names, xml: names.write_text("train1  1\ntrain2 -1"),
            "line 'train1 1', as lists of",
        ),
        (
            lambda names, xml: xml.write_text("<annotation>"),
            "train1.xml can't be read .*: repair it",
        ),
        (
            lambda names, xml: xml.write_text(xml.read_text().replace(CLASSES[0], "zebra")),
            "train1.xml has an object of the class 'zebra', which is none of",
        ),
    ],
)
def test_pascal_voc_files_that_cannot_be_loaded(digits_cfg, voc, change, message):
    cfg = read_rectangles(digits_cfg, masks=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_voc_train",), ()
    for xml in (voc / "Annotations").glob("train*.xml"):
        xml.write_text(
            PICTURE.format(size=SIZE, objects=OBJECT.format(1, 1, 9, 9, name=CLASSES[0]))
        )
    change(voc / "ImageSets/Main/train.txt", voc / "Annotations/train1.xml")
    with pytest.raises(DataError, match=f"'own_voc_train', which can't be loaded: .*{message}"):
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
    with pytest.raises(DataError, match="can't be evaluated: .*val1.xml .*each object needs pose"):
        check_data(cfg)


@pytest.fixture
def cfg(digits_cfg):
    cfg = read_rectangles(digits_cfg)
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 1, 0
    cfg.TEST.BEST_METRIC, cfg.TEST.PICTURES = "auto", 1
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 3, 32
    return cfg


def use(cfg, names):
    (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) = [(name,) for name in names]
    return cfg


def train(cfg):
    """Train and evaluate as the command does; return the results and the best metric."""
    trainer = Trainer(cfg)
    trainer.train()
    assert scalars_of(trainer) == known_scalars(cfg)
    assert "predictions.png" in report_run(trainer)
    best = json.loads(Path(cfg.OUTPUT_DIR, "model_best.json").read_text())
    return trainer._last_eval_results, best["metric"]


def scalars_of(trainer):
    results = trainer._last_eval_results
    return {f"{task}/{name}" for task, values in results.items() for name in values}


def known_scalars(cfg):
    """Return what the check of TEST.BEST_METRIC allows for the model."""
    (name,) = cfg.DATASETS.TEST
    evaluators = EVALUATORS[MetadataCatalog.get(name).evaluator_type]
    known = {scalar for evaluator in evaluators for scalar in scalars(evaluator, name)}
    tasks = {*TASKS_OF_MODELS[cfg.MODEL.META_ARCHITECTURE]} - {"keypoints"}
    return {scalar for scalar in known if task_of(scalar) in tasks}


def evaluate(cfg, outputs):
    """Return what the evaluator finds for {file name: output of a model}."""
    (name,) = cfg.DATASETS.TEST
    with evaluators_on_numpy_2():
        evaluator = Trainer.build_evaluator(cfg, name)
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            evaluator.process([record], [outputs(record)])
        return evaluator.evaluate()


def true_instances(record):
    """Return the objects of a record as a model would give them."""
    found = Instances((SIZE, SIZE))
    objects = record["annotations"]
    boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float))
    found.pred_classes = torch.tensor([o["category_id"] for o in objects])
    found.scores = torch.ones(len(objects))
    masks = [polygons_to_bitmask(o["segmentation"], SIZE, SIZE) for o in objects]
    found.pred_masks = torch.from_numpy(np.stack(masks))
    return found


def true_labels(record):
    """Return the scores of a semantic segmentation that is right."""
    labels = torch.from_numpy(np.array(Image.open(record["sem_seg_file_name"])).astype(int))
    return torch.nn.functional.one_hot(labels).permute(2, 0, 1).float()


def test_lvis(cfg, tmp_path):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1203, 0.0
    with other_datasets.lvis(tmp_path) as names:
        results, best = train(use(cfg, names))
        assert {"AP", "APr", "APc", "APf"} <= results["segm"].keys() and best == "segm/AP"
        right = evaluate(cfg, lambda record: {"instances": true_instances(record)})
        assert right["bbox"]["AP"] == right["segm"]["AP"] == pytest.approx(100)


def test_coco_panoptic(cfg, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with other_datasets.panoptic(tmp_path) as names:
        results, best = train(use(cfg, names["separated"]))
        assert results.keys() == {"bbox", "segm", "sem_seg", "panoptic_seg"}
        assert best == "panoptic_seg/PQ"

        def right(record):
            scores = true_labels(record)
            segments, info = torch.zeros(SIZE, SIZE, dtype=torch.int32), []
            masks = [(scores[k] > 0, k, False) for k in (1, 2)]
            instances = true_instances(record)
            masks += [
                (m, int(k), True)
                for m, k in zip(instances.pred_masks, instances.pred_classes, strict=True)
            ]
            for id, (mask, category, is_thing) in enumerate(masks, start=1):
                segments[mask] = id
                info.append({"id": id, "category_id": category, "isthing": is_thing})
            # An object that lies below another one as a whole is no segment.
            info = [entry for entry in info if entry["id"] in segments]
            return {"instances": instances, "sem_seg": scores, "panoptic_seg": (segments, info)}

        found = evaluate(cfg, right)
        assert found["panoptic_seg"]["PQ_th"] == found["panoptic_seg"]["PQ_st"] == 100
        assert found["sem_seg"]["mIoU"] == 100 and found["segm"]["AP"] == pytest.approx(100)


def test_semantic_segmentation(cfg, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with other_datasets.panoptic(tmp_path) as names:
        results, best = train(use(cfg, names["stuffonly"]))
        assert 0 <= results["sem_seg"]["mIoU"] <= 100 and best == "sem_seg/mIoU"
        right = evaluate(cfg, lambda record: {"sem_seg": true_labels(record)})
        assert right["sem_seg"]["mIoU"] == 100


@pytest.mark.cityscapes
def test_cityscapes_instances(cfg, tmp_path):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 8
    with other_datasets.cityscapes(tmp_path) as names:
        results, best = train(use(cfg, names["instance"]))
        assert results["segm"].keys() == {"AP", "AP50"} and best == "segm/AP"
        right = evaluate(cfg, lambda record: {"instances": true_instances(record)})
        assert right["segm"]["AP50"] == pytest.approx(100)


@pytest.mark.cityscapes
def test_cityscapes_labels(cfg, tmp_path):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "SemanticSegmentor", 19
    with other_datasets.cityscapes(tmp_path) as names:
        results, best = train(use(cfg, names["sem_seg"]))
        assert results["sem_seg"].keys() == {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}
        assert best == "sem_seg/IoU"
        right = evaluate(cfg, lambda record: {"sem_seg": true_labels(record)})
        assert right["sem_seg"]["IoU"] == pytest.approx(100)


def test_missing_packages(cfg, tmp_path, monkeypatch):
    """One line with the command that installs it, for the training set too."""
    with other_datasets.lvis(tmp_path) as names:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1203
        monkeypatch.setitem(sys.modules, "lvis", None)  # as Python sees a package that is not there
        remedy = "the package lvis: install it with pip install --no-deps lvis"
        with pytest.raises(ConfigError, match=f"evaluator needs {remedy}, or set DATASETS.TEST"):
            Trainer(use(cfg, names))
        cfg.DATASETS.TEST = ()
        with pytest.raises(DataError, match=f"DATASETS.TRAIN names .*without {remedy}"):
            Trainer(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    (tmp_path / "panoptic").mkdir()
    with other_datasets.panoptic(tmp_path / "panoptic") as names:
        monkeypatch.setitem(sys.modules, "panopticapi", None)
        with pytest.raises(
            ConfigError, match=r"panopticapi: install it with pip install git\+https"
        ):
            Trainer(use(cfg, names["separated"]))
    assert not Path(cfg.OUTPUT_DIR).exists()


@pytest.mark.cityscapes
def test_a_package_that_a_pool_of_processes_misses(cfg, tmp_path, monkeypatch):
    with other_datasets.cityscapes(tmp_path) as names:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 8
        monkeypatch.setitem(sys.modules, "shapely.geometry", None)
        monkeypatch.setitem(sys.modules, "shapely", None)  # used by a pool of processes
        with pytest.raises(
            DataError, match="the package shapely: install it with pip install shap"
        ):
            Trainer(use(cfg, names["instance"]))


def test_a_package_that_only_meta_has(cfg, tmp_path, monkeypatch):
    """Versions of Detectron2 from 2026 import it for Cityscapes."""

    def process(self, inputs, outputs):
        import deeplearning.projects.cityscapesApi  # noqa: F401

    monkeypatch.setattr(CityscapesInstanceEvaluator, "process", process)
    expected = pytest.raises(ConfigError, match="deeplearning: only Meta has it; use a version of")
    with other_datasets.cityscapes(tmp_path) as names, expected:
        check_data(use(cfg, names["instance"]))


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


UNFIT = {
    "frequency": ("lvis", "val.json", lambda c: c["categories"][4].pop("frequency"),
                  "val.json has no frequency in categories 5: add it"),
    "unknown frequency": ("lvis", "val.json", lambda c: c["categories"][4].update(frequency="x"),
                          "the frequency 'x' in category 5: use"),
    "negative classes": ("lvis", "val.json", lambda c: c["images"][1].pop("neg_category_ids"),
                         "val.json has no neg_category_ids in images 2"),
    "no categories": ("lvis", "val.json", lambda c: c.pop("categories"), "loaded .KeyError: 'categories'"),
    "isthing": ("separated", "panoptic_val.json", lambda c: c["categories"][0].pop("isthing"),
                "has segments of category 1, whose isthing is None"),
    "no stuff": ("separated", "panoptic_val.json", lambda c: [
        a.update(segments_info=[s for s in a["segments_info"] if s["category_id"] < 90])
        for a in c["annotations"]], "panoptic_val.json has no segment of stuff .isthing 0"),
    "other images": ("separated", "panoptic_val.json",
                     lambda c: c["annotations"][0].update(image_id=77), "has image 77, which .*val.json"),
    "no picture": ("separated", "panoptic_val.json",
                   lambda c: c["annotations"][0].update(file_name="x.png"), "names x.png, which is not in"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_files_that_an_evaluator_would_fail_on(name, cfg, tmp_path):
    """One line before the training, not a traceback after it."""
    kind, file, change, expected = UNFIT[name]
    written = other_datasets.lvis if kind == "lvis" else other_datasets.panoptic
    with written(tmp_path) as names:
        if kind == "lvis":
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1203
        else:
            cfg.MODEL.META_ARCHITECTURE, names = "PanopticFPN", names[kind]
        change_json(tmp_path / file, change)
        with pytest.raises(DataError, match=f"DATASETS.TEST names .*{expected}") as error:
            Trainer(use(cfg, names))
        assert "\n" not in str(error.value) and not Path(cfg.OUTPUT_DIR).exists()


def test_panoptic_pictures_that_are_not_rgb(cfg, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with other_datasets.panoptic(tmp_path) as names:
        file = tmp_path / "panoptic_val/1.png"
        Image.open(file).quantize().save(file)
        with pytest.raises(DataError, match="panoptic_val/1.png has mode P, .* save it as RGB"):
            check_data(use(cfg, names["separated"]))
        file.write_bytes(b"no picture")
        with pytest.raises(DataError, match="can't be evaluated: .*panoptic_val/1.png"):
            check_data(cfg)


@pytest.mark.cityscapes
@pytest.mark.parametrize("ending", ["instanceIds", "labelIds"])
def test_cityscapes_without_pictures_of_ids(ending, cfg, tmp_path):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 8
    with other_datasets.cityscapes(tmp_path) as names:
        for file in (tmp_path / "gtFine/val").glob(f"*/*{ending}.png"):
            if "000001" in file.name:  # Detectron2 itself looks at the first one
                file.rename(file.with_name(file.name.replace("000001", "000009")))
        with pytest.raises(DataError, match=f"000009_000019_gtFine_{ending}.png is of the image"):
            check_data(use(cfg, names["instance"]))


@pytest.mark.parametrize(
    "architecture, masks, kind, expected",
    [
        ("GeneralizedRCNN", True, "separated", "compares panoptic segmentations: use PanopticFPN"),
        ("SemanticSegmentor", True, "separated", "compares panoptic segmentations"),
        ("RetinaNet", False, "stuffonly", "semantic segmentations: use SemanticSegmentor or PanopticFPN"),
        ("SemanticSegmentor", True, "instance", "compares objects of classes: use GeneralizedRCNN"),
        ("ProposalNetwork", False, "instance", "compares objects of classes: use GeneralizedRCNN"),
        ("GeneralizedRCNN", False, "instance", "MODEL.MASK_ON is False, but .*set MODEL.MASK_ON True"),
    ],
)  # fmt: skip
def test_models_that_do_not_give_what_is_compared(
    architecture, masks, kind, expected, cfg, tmp_path
):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = architecture, masks
    write = other_datasets.cityscapes if kind == "instance" else other_datasets.panoptic
    with write(tmp_path) as names, pytest.raises(ConfigError, match=expected):
        check_data(use(cfg, names[kind]))


def in_mode(mode):
    """Return a change that saves labels in another mode of PIL; those of the test set may have it."""

    def change(cfg, folder):
        for split in ("val", "train"):
            file = folder / f"semantic_{split}/2.png"
            labels = Image.fromarray(np.minimum(np.array(Image.open(file)), 1))
            if mode == "P":
                labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            else:
                labels = labels.point([0, 255] * 128, mode)
            labels.save(file)

    return change


def relabel(folder, value):
    """Write another value into the first pixel of a picture of labels."""
    file = folder / "2.png"
    labels = np.array(Image.open(file))
    labels[0, 0] = value
    Image.fromarray(labels).save(file)


SEMANTIC = {
    "fewer classes": (
        lambda cfg, folder: cfg.MODEL.SEM_SEG_HEAD.merge_from_list(["NUM_CLASSES", 2]),
        r"SEM_SEG_HEAD.NUM_CLASSES is 2, but .* 3 .things, sky, ground.|SEM_SEG_HEAD.NUM_CLASSES is 2, "
        "but .*have the value 2",
    ),
    "more classes": (
        lambda cfg, folder: cfg.MODEL.SEM_SEG_HEAD.merge_from_list(["NUM_CLASSES", 54]),
        "SEM_SEG_HEAD.NUM_CLASSES is 54, but .* has 3 stuff_classes .things, sky, ground.: set",
    ),
    "a label that no class has": (
        lambda cfg, folder: relabel(folder / "semantic_train", 3),
        "NUM_CLASSES is 3, but DATASETS.TRAIN names .*semantic_train/2.png have the value 3: use 0 to 2",
    ),
    "the same in the test set": (
        lambda cfg, folder: relabel(folder / "semantic_val", 9),
        "DATASETS.TEST names .*semantic_val/2.png have the value 9: use 0 to 2, 255 for .*ignore_label",
    ),
    "another label to ignore": (
        lambda cfg, folder: [
            relabel(folder / "semantic_train", 255),
            cfg.MODEL.SEM_SEG_HEAD.merge_from_list(["IGNORE_VALUE", 254]),
        ],
        "have the value 255: use 0 to 2, 254 for .*MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
    ),
    "labels in colours": (
        lambda cfg, folder: Image.new("RGB", (SIZE, SIZE)).save(folder / "semantic_train/2.png"),
        "have 3 channels: write one number for each pixel",
    ),
    "labels with a palette": (
        in_mode("P"),
        "TRAIN names .*semantic_train/2.png have mode P: .*gray values of the picture, 38 where the label is "
        "1: save the labels as 8-bit gray",
    ),
    "labels of 1 bit": (
        in_mode("1"),
        "TRAIN names .*semantic_train/2.png have mode 1: .* 255 where the label is 1",
    ),
    "damaged labels": (
        lambda cfg, folder: (folder / "semantic_train/2.png").write_bytes(b"no picture"),
        "semantic_train/2.png can't be read",
    ),
    "no labels for an image": (
        lambda cfg, folder: (folder / "semantic_train/2.png").unlink(),
        "images and labels .*semantic_train. don't fit .*each image needs a picture of labels",
    ),
    "a training set without labels": (
        lambda cfg, folder: cfg.DATASETS.merge_from_list(["TRAIN", ("small_scenes_train",)]),
        "DATASETS.TRAIN names 'small_scenes_train', which has no semantic labels",
    ),
    "a training set without objects": (
        lambda cfg, folder: cfg.DATASETS.merge_from_list(["TRAIN", ("rectangles_train_stuffonly",)]),
        "'rectangles_train_stuffonly', which has no annotations of objects: there is nothing to learn",
    ),
    "no stuff_classes": (
        lambda cfg, folder: delattr(MetadataCatalog.get(cfg.DATASETS.TEST[0]), "stuff_classes"),
        "which has no stuff_classes: set it with MetadataCatalog",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEMANTIC)
def test_semantic_labels_that_contradict(name, cfg, tmp_path):
    change, expected = SEMANTIC[name]
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with other_datasets.panoptic(tmp_path) as names:
        change(use(cfg, names["separated"]), tmp_path)
        with pytest.raises(DataError, match=expected) as error:
            Trainer(cfg)
        assert "\n" not in str(error.value) and not Path(cfg.OUTPUT_DIR).exists()


@pytest.mark.parametrize("stuff_classes", [3, pytest.param(54, marks=pytest.mark.slow)])
def test_two_processes_and_semantic_labels(stuff_classes, tmp_path):
    """They train and evaluate together; a contradiction is said once."""
    other_datasets.write_panoptic(tmp_path)
    done = run_support("panoptic_ranks.py", tmp_path, stuff_classes)
    if stuff_classes == 54:
        assert done.returncode == 1 and not (tmp_path / "output").exists()
        (line,) = [line for line in lines(done.stderr) if "SEM_SEG_HEAD.NUM_CLASSES is 54" in line]
        assert line.startswith("panoptic_ranks.py: ") and "has 3 stuff_classes" in line
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == {"bbox", "segm", "sem_seg", "panoptic_seg"}
