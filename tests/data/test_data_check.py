"""Data that contradicts the config, or other data, is one line; doubtful data is a warning."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image

from coco_datasets import CLASSES, SIZE, annotations_of, make_dataset, read_rectangles, registered
from coco_datasets import rle as rle_of
from mabn_d2.data import DataError
from mabn_d2.data.loader import build_train_loader
from mabn_d2.engine import ConfigError, Trainer, check_data
from mabn_d2.engine.data_check import check_datasets
from mabn_d2.engine.errors import ONE_LINE
from mabn_d2.engine.schedule import training_images


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path)


@pytest.fixture
def cfg(digits_cfg):
    return read_rectangles(digits_cfg)


def check(cfg, folder, data, train=True, **options):
    """Register the data, set the config to it, check it, and return the names."""
    with registered(folder, data, **options) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), (names["val"],)
        check_data(cfg, train=train)


def set_all(name, value, splits=("train", "val")):
    """Return a change that sets, or with KeyError removes, a field of all annotations."""

    def change(data, cfg):
        for split in splits:
            for annotation in data[split]["annotations"]:
                if value is KeyError:
                    annotation.pop(name, None)
                else:
                    annotation[name] = value(annotation) if callable(value) else value

    return change


def drop(name, position, split="train"):
    return lambda data, cfg: data[split]["annotations"][position].pop(name)


def set_config(**values):
    def change(data, cfg):
        for key, value in values.items():
            cfg.merge_from_list([key.replace("__", "."), value])

    return change


def set_classes(split, names):
    """Return a change that gives a split other classes; annotations keep their ids if they can."""

    def change(data, cfg):
        data[split]["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        kept = [a for a in data[split]["annotations"] if a["category_id"] <= len(names)]
        data[split]["annotations"] = kept

    return change


def both(*changes):
    return lambda data, cfg: [change(data, cfg) for change in changes]


def to_corners(annotation):
    x, y, w, h = annotation["bbox"]
    return [x, y, x + w, y + h]


def to_shares(annotation):
    return [v / SIZE for v in annotation["bbox"]]


RLE = set_all("segmentation", lambda a: rle_of(a["bbox"]), ("train",))
KEYPOINTS = both(
    set_config(MODEL__KEYPOINT_ON=True, MODEL__MASK_ON=False),
    set_config(MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=1),
)

# name: change, what the line says. {train}, {val} are names of datasets, {folder} that of the files.
REFUSED = {
    "too few classes": (
        set_config(MODEL__ROI_HEADS__NUM_CLASSES=2),
        r"^MODEL.ROI_HEADS.NUM_CLASSES is 2, but {folder}/train.json \(DATASETS.TRAIN '{train}'\) has 3 "
        r"categories \(bolt, nut, washer\): set MODEL.ROI_HEADS.NUM_CLASSES 3$",
    ),
    "one class": (set_config(MODEL__ROI_HEADS__NUM_CLASSES=1), "NUM_CLASSES is 1, but .* has 3"),
    "COCO's 80 classes": (
        set_config(MODEL__ROI_HEADS__NUM_CLASSES=80),
        r"NUM_CLASSES is 80, but .* has 3 categories \(bolt, nut, washer\)",
    ),
    "RetinaNet": (
        set_config(MODEL__META_ARCHITECTURE="RetinaNet", MODEL__RETINANET__NUM_CLASSES=10),
        r"MODEL.RETINANET.NUM_CLASSES is 10, .*: set MODEL.RETINANET.NUM_CLASSES 3",
    ),
    "Cascade R-CNN": (
        set_config(MODEL__ROI_HEADS__NAME="CascadeROIHeads", MODEL__ROI_HEADS__NUM_CLASSES=4),
        "MODEL.ROI_HEADS.NUM_CLASSES is 4",
    ),
    "test set with fewer classes": (
        set_classes("val", CLASSES[:2]),
        "DATASETS.TEST '{val}' has other classes than DATASETS.TRAIN '{train}': they differ in washer, "
        "only in '{train}'",
    ),
    "test set in another order": (
        set_classes("val", ["nut", "bolt", "washer"]),
        r"their order, from class 0 on \(bolt, nut, washer in '{train}', nut, bolt, washer in '{val}'\)",
    ),
    "test set with another name": (
        set_classes("val", ["bolt", "nut", "Washer"]),
        "washer, only in '{train}'; Washer, only in '{val}'",
    ),
    "no masks": (
        set_all("segmentation", KeyError),
        r"MODEL.MASK_ON is True, but {folder}/train.json .* has no masks: set MODEL.MASK_ON False",
    ),
    "empty masks": (set_all("segmentation", []), "MODEL.MASK_ON is True, but .* has no masks"),
    "one annotation without mask": (
        drop("segmentation", 3),
        "1 of 12 annotations of .*train.json .* have no mask, the first: annotation 4: set MODEL.MASK",
    ),
    "one image without masks": (
        both(drop("segmentation", 2), drop("segmentation", 3)),
        "2 of 12 annotations .* have no mask, the first: annotation 3",
    ),
    "no masks in the test set": (
        set_all("segmentation", KeyError, ("val",)),
        "MODEL.MASK_ON is True, but {folder}/val.json .*has no masks",
    ),
    "RLE and polygon": (
        RLE,
        r"^INPUT.MASK_FORMAT is 'polygon', but 12 of 12 objects of .*train.json .* have RLE masks, the "
        r"first: annotation 1: set INPUT.MASK_FORMAT bitmask$",
    ),
    "RLE and polygon, BAD_INPUT skip": (
        both(RLE, set_config(DATALOADER__BAD_INPUT="skip")),
        "set INPUT.MASK_FORMAT bitmask",
    ),
    "all objects iscrowd": (
        both(RLE, set_all("iscrowd", 1, ("train",))),
        r"which has no objects \(all 12 annotations are iscrowd\): there is nothing to learn",
    ),
    "all objects of the test set iscrowd": (
        both(
            set_all("segmentation", lambda a: rle_of(a["bbox"]), ("val",)),
            set_all("iscrowd", 1, ("val",)),
        ),
        "'{val}', which has no objects .* nothing to evaluate",
    ),
    "no objects": (
        lambda data, cfg: data["train"].update(annotations=[]),
        "'{train}', which has no objects: there is nothing to learn; correct .*train.json",
    ),
    "no objects to evaluate": (
        lambda data, cfg: data["val"].update(annotations=[]),
        "'{val}', which has no objects: there is nothing to evaluate",
    ),
    "no images": (
        lambda data, cfg: data["train"].update(images=[], annotations=[]),
        "train.json .* has no image",
    ),
    "no images to evaluate": (
        lambda data, cfg: data["val"].update(images=[], annotations=[]),
        "val.json .* has no image",
    ),
    "keypoints that are not there": (
        KEYPOINTS,
        "MODEL.KEYPOINT_ON is True, but 12 of 12 objects .* have no keypoints, the first: annotation 1",
    ),
    "another number of keypoints": (
        both(KEYPOINTS, set_all("keypoints", [5, 5, 2, 6, 6, 2])),
        "NUM_KEYPOINTS is 1, but .* have 2 keypoints: set MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 2",
    ),
    "keypoints without sigmas": (
        both(KEYPOINTS, set_all("keypoints", [5, 5, 2])),
        "TEST.KEYPOINT_OKS_SIGMAS has 17 numbers, but .* have 1 keypoints",
    ),
    "keypoints without names": (
        both(KEYPOINTS, set_all("keypoints", [5, 5, 2]), set_config(TEST__KEYPOINT_OKS_SIGMAS=[0.1])),
        r"'{train}' \(DATASETS.TRAIN\) has no keypoint_names: set it with MetadataCatalog",
    ),
    "width and height swapped": (
        lambda data, cfg: [i.update(width=SIZE // 2) for i in data["train"]["images"]],
        "image 1 has width 48 and height 96, but .*0.png is 96 wide and 96 high",
    ),
    "ids of two types": (
        lambda data, cfg: data["train"]["images"][0].update(id="1"),
        "images '1' has id '1', which is no integer, as the others are",
    ),
    "annotations with ids of another type": (
        set_all("image_id", lambda a: str(a["image_id"])),
        "annotation 1 belongs to image '1', which is not there",
    ),
    "sampler": (
        set_config(DATALOADER__SAMPLER_TRAIN="WeightedSampler"),
        "SAMPLER_TRAIN is 'WeightedSampler': use one of TrainingSampler, .*WeightedTrainingSampler",
    ),
    "weights of another dataset": (
        set_config(
            DATALOADER__SAMPLER_TRAIN="WeightedTrainingSampler",
            DATASETS__TRAIN_REPEAT_FACTOR=[["other", 2.0]],
        ),
        "TRAIN_REPEAT_FACTOR is .*other.*such as .*{train}",
    ),
    "proposals": (
        set_config(MODEL__LOAD_PROPOSALS=True),
        r"DATASETS.PROPOSAL_FILES_TRAIN is \(\), 0 files for the 1 datasets",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, cfg, data, tmp_path):
    """One line with key, value and remedy; nothing is trained or written."""
    change, expected = REFUSED[name]
    change(data, cfg)
    before = sorted(tmp_path.rglob("*.pth"))
    with pytest.raises(ONE_LINE) as error:
        check(cfg, tmp_path, data)
    names = {split: f"{tmp_path.name}_{split}" for split in data}
    for key, value in {**names, "folder": str(tmp_path)}.items():
        expected = expected.replace(f"{{{key}}}", value)
    assert error.match(expected) and "\n" not in str(error.value)
    assert not os.path.exists(cfg.OUTPUT_DIR) and before == sorted(tmp_path.rglob("*.pth"))


WARNED = {
    "classes of the test set alone": (
        lambda data, cfg: data["val"]["categories"].append({"id": 4, "name": "rivet"}),
        "1 classes are only in DATASETS.TEST '{val}', and are not learned: rivet",
    ),
    "mask with a part of two points": (
        lambda data, cfg: data["train"]["annotations"][0]["segmentation"].append([1, 1, 2, 2]),
        "1 masks have a part of less than three points, which is left out .the first: annotation 1",
    ),
    "mask of two points alone": (
        lambda data, cfg: data["train"]["annotations"][0].update(segmentation=[[1, 1, 2, 2]]),
        "1 objects have a mask of less than three points, and are left out",
    ),
    "no area to evaluate": (
        set_all("area", KeyError, ("val",)),
        "filled in for the evaluation: area of 6 annotations",
    ),
    "no iscrowd to evaluate": (
        set_all("iscrowd", KeyError, ("val",)),
        "filled in for the evaluation: iscrowd of 6 annotations",
    ),
    "boxes as corners": (
        set_all("bbox", to_corners, ("train",)),
        r"of 12 boxes end outside of the image: are they corners\? COCO has x, y, width, height",
    ),
    "boxes as shares": (
        set_all("bbox", to_shares, ("train",)),
        r"12 of 12 boxes lie within 0..1: are they shares of the image\?",
    ),
    "boxes without area": (
        lambda data, cfg: data["train"]["annotations"][0]["bbox"].__setitem__(2, 0),
        "1 of 12 boxes have no area inside the image, and are not trained on",
    ),
    "a class name twice": (
        both(
            set_classes("train", ["bolt", "nut", "nut"]), set_classes("val", ["bolt", "nut", "nut"])
        ),
        "1 class names are there more than once: nut",
    ),
    "a class _background_": (
        both(
            set_classes("train", ["bolt", "nut", "washer", "_background_"]),
            set_classes("val", ["bolt", "nut", "washer", "_background_"]),
            set_config(MODEL__ROI_HEADS__NUM_CLASSES=4),
        ),
        "class '_background_' has 0 annotations and is trained as any other",
    ),
    "a test set without annotations": (
        lambda data, cfg: data["val"].pop("annotations"),
        "val.json. has no annotations: results are written, but no AP",
    ),
    "masks of the wrong size that are not used": (
        both(
            set_config(MODEL__MASK_ON=False),
            set_all("segmentation", {"size": [1, 1], "counts": [1]}, ("train",)),
        ),
        "12 masks can't be used, and are left out; their boxes are used",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned(name, cfg, data, tmp_path, caplog):
    """It is used; a warning for each set that it is in has the count."""
    change, expected = WARNED[name]
    change(data, cfg)
    check(cfg, tmp_path, data)
    warnings = {r.message for r in caplog.records if r.name.startswith("mabn_d2")}
    expected = expected.replace("{val}", f"{tmp_path.name}_val")
    assert warnings and all(re.search(expected, text) for text in warnings)
    assert len(warnings) <= 2


ACCEPTED = {
    "sound": lambda data, cfg: None,
    "no segmentation, boxes only": both(
        set_config(MODEL__MASK_ON=False), set_all("segmentation", KeyError)
    ),
    "segmentation [] and boxes only": both(
        set_config(MODEL__MASK_ON=False), set_all("segmentation", [])
    ),
    "RetinaNet": set_config(MODEL__META_ARCHITECTURE="RetinaNet", MODEL__MASK_ON=False),
    "ids with gaps": both(
        set_all("category_id", lambda a: {1: 3, 2: 7, 3: 90}[a["category_id"]]),
        lambda data, cfg: [
            c.update(id={1: 3, 2: 7, 3: 90}[c["id"]])
            for content in data.values()
            for c in content["categories"]
        ],
    ),
    "RLE and bitmask": both(RLE, set_config(INPUT__MASK_FORMAT="bitmask")),
    "polygons and bitmask": set_config(INPUT__MASK_FORMAT="bitmask"),
    "no area and no iscrowd to train": both(
        set_all("area", KeyError, ("train",)), set_all("iscrowd", KeyError, ("train",))
    ),
    "a box that ends on the border": lambda data, cfg: data["train"]["annotations"][0].update(
        bbox=[SIZE - 10, 0, 10, SIZE]
    ),
    "sizes 96.0": lambda data, cfg: [
        i.update(width=float(SIZE), height=float(SIZE)) for i in data["val"]["images"]
    ],
    "images without objects": lambda data, cfg: data["train"].update(
        annotations=data["train"]["annotations"][2:]
    ),
    "one crowd region": both(
        lambda data, cfg: data["train"]["annotations"][0].update(
            iscrowd=1, segmentation=rle_of(data["train"]["annotations"][0]["bbox"])
        ),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, cfg, data, tmp_path, caplog):
    ACCEPTED[name](data, cfg)
    check(cfg, tmp_path, data)
    assert not [r for r in caplog.records if r.name.startswith("mabn_d2")]


def test_counts_over_the_shared_cases(cfg, tmp_path, caplog):
    """The files in which labelling tools' faults were reported, each as it is, with masks or boxes."""
    outcomes = {}
    for file in sorted((Path(__file__).parent / "cases").glob("*.json")):
        content = json.loads(file.read_text())
        for masks in (True, False):
            for image in content["images"]:
                for split in ("train", "val"):
                    path = tmp_path / split / image["file_name"]
                    path.parent.mkdir(exist_ok=True)
                    Image.new("RGB", (96, 64)).save(path)
            cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = masks, 2
            caplog.clear()
            try:
                check(cfg, tmp_path, {"train": content, "val": content})
                found = [r for r in caplog.records if r.name.startswith("mabn_d2")]
                outcomes[file.stem, masks] = "warned" if found else "accepted"
            except ONE_LINE as error:
                outcomes[file.stem, masks] = str(error).replace(str(tmp_path), "")
    print(*(f"{k[0]} {'masks' if k[1] else 'boxes'}: {v}" for k, v in outcomes.items()), sep="\n")
    refused = {key for key, text in outcomes.items() if text not in ("accepted", "warned")}
    assert refused == {
        ("boxes_no_segmentation", True), ("boxes_segmentation_empty", True), ("rle", True),
        ("rle_all_crowd", True), ("rle_all_crowd", False), ("size_swapped", True),
        ("size_swapped", False),
    }  # fmt: skip
    warned = {key for key, text in outcomes.items() if text == "warned"}
    assert {name for name, _ in warned} == {"no_area", "no_iscrowd", "polygon_and_two_points"}


def test_swapped_sizes_blame_the_json(cfg, data, tmp_path):
    for content, split in zip(data.values(), data, strict=True):
        for image in content["images"]:
            path = tmp_path / split / image["file_name"]
            Image.open(path).resize((120, SIZE)).save(path)
            image.update(width=SIZE, height=120)
    with pytest.raises(
        DataError, match="width and height are swapped in 3 of 3 .*correct width and"
    ):
        check(cfg, tmp_path, data)
    cfg.DATALOADER.BAD_INPUT = "skip"  # it would leave out everything
    data["val"]["images"] = []
    data["val"]["annotations"] = []
    for image in data["train"]["images"][:4]:
        image.update(width=120, height=SIZE)
    cfg.DATASETS.TEST = ()
    with registered(tmp_path, data) as names:
        cfg.DATASETS.TRAIN = (names["train"],)
        check_data(cfg)
        assert len(DatasetCatalog.get(names["train"])) == 4


def test_size_after_the_turn_by_exif(cfg, data, tmp_path):
    """A phone's photo: what is stored lies on its side; Detectron2 turns it."""
    path = tmp_path / "train" / "photo.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path, exif=exif)
    image = {"id": 50, "file_name": "photo.jpg", "width": 60, "height": 80}
    data["train"]["images"].append(image)
    check(cfg, tmp_path, data)
    image.update(width=80, height=60)
    with pytest.raises(DataError, match="60 wide and 80 high, turned by its EXIF tag"):
        check(cfg, tmp_path, data)


@pytest.mark.parametrize(
    "orientation, noted", [(1, False), (2, True), (3, True), (4, True), (8, True)]
)
def test_turn_by_exif_that_the_size_does_not_show(orientation, noted, cfg, data, tmp_path, caplog):
    """It may be right: a note."""
    path = tmp_path / "train" / data["train"]["images"][1]["file_name"]
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(path).save(path, exif=exif)
    check(cfg, tmp_path, data)
    notes = [r.message for r in caplog.records if "EXIF" in r.message]
    assert len(notes) == noted
    assert not noted or re.search("1 of 6 image files .*/1.png: if they were labelled as", notes[0])


def test_two_training_sets(cfg, data, tmp_path):
    data["more"] = make_dataset(tmp_path / "more")["train"]
    os.rename(tmp_path / "more" / "train", tmp_path / "more" / "images")
    for image in data["more"]["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    with registered(tmp_path, data) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"], names["more"]), ()
        check_data(cfg)
        data["more"]["categories"][1]["name"] = "screw"
        (tmp_path / "more.json").write_text(json.dumps(data["more"]))
        MetadataCatalog.remove(names["more"])
        MetadataCatalog.get(names["more"]).set(
            json_file=str(tmp_path / "more.json"),
            image_root=str(tmp_path / "more"),
            evaluator_type="coco",
        )
        with pytest.raises(
            DataError, match="whose classes differ in nut, only in .*; screw, only in"
        ):
            check_data(cfg)


def test_registered_by_a_function(cfg, data, tmp_path):
    """Without a COCO file: the same lines for classes, masks and objects."""
    with registered(tmp_path, data) as names:
        records = {split: DatasetCatalog.get(name) for split, name in names.items()}
    calls = []
    for split, found in records.items():
        DatasetCatalog.register(f"by_hand_{split}", lambda f=found: calls.append(1) or f)
        MetadataCatalog.get(f"by_hand_{split}").set(thing_classes=CLASSES, evaluator_type="coco")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_hand_train",), ("by_hand_val",)
    try:
        for key, value, expected in (
            ("MODEL.ROI_HEADS.NUM_CLASSES", 2, r"is 2, but by_hand_train .* has 3 categories"),
            ("MODEL.ROI_HEADS.NUM_CLASSES", 80, r"is 80, but by_hand_train .*bolt, nut, washer"),
            ("MODEL.KEYPOINT_ON", True, "have no keypoints"),
        ):
            changed = cfg.clone()
            changed.merge_from_list([key, value])
            with pytest.raises(DataError, match=expected):
                check_data(changed)
        calls.clear()
        trainer = Trainer(cfg)
        assert len(calls) == 2  # each is loaded once; what the check has loaded is trained on
        assert len(trainer.data_loader.dataset) == 6
        records["train"][0]["annotations"][0]["category_id"] = 7
        with pytest.raises(DataError, match="category_id 7, but 3 thing_classes"):
            DatasetCatalog.remove("by_hand_train")
            DatasetCatalog.register("by_hand_train", lambda: records["train"])
            check_data(cfg)
        records["train"][0]["annotations"][0]["category_id"] = 0
        del records["train"][0]["annotations"][0]["segmentation"]
        DatasetCatalog.remove("by_hand_train")
        DatasetCatalog.register("by_hand_train", lambda: records["train"])
        with pytest.raises(DataError, match="1 of 12 annotations of by_hand_train .* no mask"):
            check_data(cfg)
        DatasetCatalog.remove("by_hand_train")
        DatasetCatalog.register("by_hand_train", lambda: open("/nowhere/labels.txt"))
        with pytest.raises(DataError, match="can't be loaded .FileNotFoundError.*labels.txt"):
            check_data(cfg)
    finally:
        for split in records:
            DatasetCatalog.remove(f"by_hand_{split}")
            MetadataCatalog.remove(f"by_hand_{split}")


@pytest.fixture
def by_hand(cfg, data, tmp_path):
    """Register the records of both splits by functions; yield {split: records}."""
    with registered(tmp_path, data) as names:
        records = {split: DatasetCatalog.get(name) for split, name in names.items()}
    for split, found in records.items():
        DatasetCatalog.register(f"by_hand_{split}", lambda f=found: f)
        MetadataCatalog.get(f"by_hand_{split}").set(thing_classes=CLASSES, evaluator_type="coco")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_hand_train",), ("by_hand_val",)
    yield records
    for split in records:
        DatasetCatalog.remove(f"by_hand_{split}")
        MetadataCatalog.remove(f"by_hand_{split}")


def boxes_of(records):
    return [annotation for record in records for annotation in record["annotations"]]


def set_boxes(bbox, mode=BoxMode.XYWH_ABS, count=None):
    """Return a change of the first `count` objects; `bbox` is a box, or makes one of the true one."""

    def change(records):
        for annotation in boxes_of(records)[:count]:
            box = bbox(annotation) if callable(bbox) else bbox
            annotation.update(bbox=box, bbox_mode=mode)

    return change


def set_numbers(bbox):
    return set_boxes(bbox, BoxMode.XYXY_ABS, 1)


# name: change, what is said of training and of test sets; a note has "of", an error has "annotation 0".
BOXES = {
    "NaN": (set_numbers([5, 5, math.nan, 20]), r"annotation 0 of .*0.png \(XYXY_ABS \[5, 5, nan, 20\]\) has "
            r"bbox .*, not four numbers within 1e9\. Correct bbox or bbox_mode, "),
    "three numbers": (set_numbers([5, 5, 20]), r"annotation 0 of .* has bbox \[5, 5, 20\], not four numbers\."),
    "sizes as corners": (set_boxes(lambda a: [60, 50, 20, 30], BoxMode.XYXY_ABS),
                         r"annotation 0 of .*XYXY_ABS .*bbox \[60.0, 50.0, -40.0, -20.0\] with a negative width"),
    "outside": (set_numbers([100, 5, 120, 30]), "annotation 0 of .* outside of the image, 96 wide and 96 high"),
    "no bbox_mode": (lambda r: boxes_of(r)[0].pop("bbox_mode"), "annotation 0 of .*/0.png lacks bbox_mode. Cor"),
    "shares": (set_boxes(to_shares), r" of \d+ boxes lie within 0..1: are they shares of the image\? bbox_mode says"),
    "corners": (set_boxes(to_corners), " of .* end outside of the image: are they corners.*mode is XYXY_ABS"),
    "no area": (set_numbers([5, 5, 5, 20]), " of .* no area inside the image, and (are not trained|count as objects)"),
    "none": (lambda r: None, None),
    "tuples": (set_boxes(lambda a: tuple(to_corners(a)), BoxMode.XYXY_ABS), None),
    "arrays": (set_boxes(lambda a: np.array(a["bbox"], np.float32)), None),
    "rotated": (set_boxes(lambda a: [*a["bbox"], 30.0], BoxMode.XYWHA_ABS), None),
    "relative": (set_boxes([0.2, 0.2, 0.5, 0.5], BoxMode.XYXY_REL), None),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", BOXES)
def test_boxes_of_a_function(name, split, cfg, by_hand, caplog):
    """As for a COCO file: an error, or a warning with the count."""
    change, expected = BOXES[name]
    change(by_hand[split])
    if expected and expected.startswith("annotation 0"):
        with pytest.raises(DataError, match=f"'by_hand_{split}': {expected}") as error:
            check_data(cfg)
        assert "\n" not in str(error.value)
        return
    check_data(cfg)
    notes = [r.message for r in caplog.records if " boxes " in r.message]
    assert len(notes) == (expected is not None)
    assert not notes or re.search(f"^by_hand_{split}: .*{expected}", notes[0])


def test_bad_boxes_of_a_function_are_left_out(cfg, by_hand, caplog):
    """Of what is trained on, not of what the function has; their images stay."""
    set_numbers([60, 50, 20, 30])(by_hand["train"])
    del by_hand["train"][1]["annotations"][1]["bbox"]
    cfg.DATALOADER.BAD_INPUT = "skip"
    loaded = list(Trainer(cfg).data_loader.dataset.records)
    for records in (loaded, DatasetCatalog.get("by_hand_train")):
        assert [len(record["annotations"]) for record in records] == [1, 1, 2, 2, 2, 2]
    assert [len(record["annotations"]) for record in by_hand["train"]] == [2] * 6
    assert "by_hand_train: 2 annotations are left out: annotation 0 of" in caplog.text


def test_boxes_of_a_function_without_area_everywhere(cfg, by_hand):
    set_boxes(lambda a: [5, 5, 5, 20], BoxMode.XYXY_ABS)(by_hand["train"])
    with pytest.raises(DataError, match="no objects but 12 whose box has no area"):
        check_data(cfg)


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize(
    "split, missing",
    [("train", "annotations"), ("val", "image_id"), ("val", "file_name"), ("val", "height")],
)
def test_records_that_lack_a_key(split, missing, position, cfg, by_hand):
    """One line names the first one, where Detectron2 would fail with a KeyError."""
    del by_hand[split][position][missing]
    number = range(len(by_hand[split]))[position]
    with pytest.raises(
        DataError, match=f"by_hand_{split}', whose record {number} .* has no {missing}: add "
    ):
        check_data(cfg)


def test_records_without_what_is_not_needed(cfg, by_hand):
    """A training reads the size from the image; an evaluation takes no annotations for no objects."""
    for record in by_hand["train"]:
        del record["image_id"], record["height"], record["width"]
    del by_hand["val"][0]["annotations"]
    cfg.TEST.VALIDATION_LOSS, cfg.TEST.EVAL_PERIOD = True, 2
    trainer = Trainer(cfg)
    trainer.train()
    assert 0 <= trainer._last_eval_results["bbox"]["AP"] <= 100


def test_training_set_without_annotations_beside_another(cfg, by_hand):
    for record in by_hand["val"]:
        del record["annotations"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_hand_train", "by_hand_val"), ()
    with pytest.raises(DataError, match="'by_hand_val', which has no annotations of objects"):
        check_data(cfg)


def test_metadata_that_contradicts_the_file(cfg, data, tmp_path):
    with pytest.raises(DataError, match=r"thing_classes are \(a, b, c\), but .*val.json has the"):
        check(cfg, tmp_path, data, metadata={"thing_classes": ["a", "b", "c"]})


def test_evaluators(cfg, data, tmp_path):
    with registered(tmp_path, data) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), (names["val"],)
        for kind, expected in (
            (None, "has no evaluator_type: set it with"),
            ("imagenet", "evaluator_type is 'imagenet': use one of coco, .*, lvis, pascal_voc"),
            ("cityscapes_sem_seg", "whose evaluator .cityscapes_sem_seg. compares semantic"),
        ):
            metadata = MetadataCatalog.get(names["val"])
            if kind is None:
                del metadata.evaluator_type
            else:
                metadata.__dict__["evaluator_type"] = kind
            with pytest.raises(ConfigError, match=expected):
                Trainer(cfg)

        class Own(Trainer):
            @classmethod
            def build_evaluator(cls, cfg, dataset_name):
                return super().build_evaluator(cfg, dataset_name)

        metadata.__dict__.pop("evaluator_type")
        Own(cfg)  # its evaluator is its own affair


@pytest.mark.parametrize("train, value", [(True, "()"), (False, "()"), (True, "('nowhere',)")])
def test_no_datasets(cfg, train, value):
    key = "DATASETS.TRAIN" if train else "DATASETS.TEST"
    cfg.merge_from_list([key, value])
    with pytest.raises((ConfigError, DataError), match=f"{key} (is|names)"):
        check_data(cfg, train=train)


def test_missing_builtin_datasets(cfg):
    """The README's own command where COCO is not there."""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    for train in (True, False):
        # The first is what a launcher does before it starts processes.
        for check in (check_datasets, check_data):
            with pytest.raises(
                DataError, match="instances_val2017.json.*set DETECTRON2_DATASETS to"
            ):
                check(cfg, train=train)


def test_an_evaluation_ignores_the_training_sets(cfg, data, tmp_path):
    data["train"]["annotations"] = []
    set_classes("train", ["other"])(data, cfg)
    check(cfg, tmp_path, data, train=False)


def test_number_of_classes_in_an_evaluation(cfg, data, tmp_path, caplog):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(DataError, match="NUM_CLASSES is 4, but .*DATASETS.TEST"):
        check(cfg, tmp_path, data, train=False)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check(cfg, tmp_path, data, train=False)
    assert "the model can't find washer" in caplog.text


def test_duplicate_annotation_ids_of_minival(cfg, data, tmp_path):
    """Detectron2 exempts this name, because COCO's own file repeats ids."""
    for content in data.values():
        content["annotations"][1]["id"] = content["annotations"][0]["id"]
    with pytest.raises(DataError, match="with the same id"):
        check(cfg, tmp_path, data)
    folder = tmp_path / "minival"
    folder.mkdir()
    for split in data:
        os.rename(tmp_path / split, folder / split)
    check(cfg, folder, data)


def test_corrections_reach_training_and_evaluation(cfg, data, tmp_path):
    """What is left out and filled in is what Detectron2 reads, and the files stay as they are."""
    data["train"]["annotations"][0]["segmentation"].append([1, 1, 2, 2])
    data["train"]["annotations"][1]["bbox"] = [500, 0, 5, 5]
    data["train"]["images"][5]["file_name"] = "missing.png"
    set_all("area", KeyError, ("val",))(data, cfg)
    set_all("iscrowd", KeyError, ("val",))(data, cfg)
    cfg.DATALOADER.BAD_INPUT = "skip"
    with registered(tmp_path, data) as names:
        written = {split: (tmp_path / f"{split}.json").read_bytes() for split in data}
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), (names["val"],)
        trainer = Trainer(cfg)
        for records in (
            list(trainer.data_loader.dataset.records),
            DatasetCatalog.get(names["train"]),
        ):
            assert [len(r["annotations"]) for r in records] == [1, 2, 2, 2, 2]
            assert len(records[0]["annotations"][0]["segmentation"]) == 1
        trainer.train()
        assert not math.isnan(trainer._last_eval_results["segm"]["AP"])
        for split in data:
            assert (tmp_path / f"{split}.json").read_bytes() == written[split]


def test_file_is_parsed_once(cfg, data, tmp_path, monkeypatch):
    parsed = []
    load = json.load
    monkeypatch.setattr(json, "load", lambda file: parsed.append(file.name) or load(file))
    with registered(tmp_path, data) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), (names["val"],)
        check_data(cfg)
        trainer = Trainer(cfg)
        assert parsed.count(str(tmp_path / "train.json")) == 1
        assert parsed.count(str(tmp_path / "val.json")) == 1
        records = list(trainer.data_loader.dataset.records)
        monkeypatch.undo()
        file = str(tmp_path / "train.json")
        assert records == load_coco_json(file, str(tmp_path / "train"), names["train"])


def test_images_are_counted(cfg, data, tmp_path):
    """The number that the length of the training follows from is what the loader has."""
    data["train"]["annotations"][0]["bbox"] = [500, 0, 5, 5]
    data["train"]["annotations"][1]["iscrowd"] = 1  # image 1 has no object left
    data["train"]["annotations"][1]["segmentation"] = rle_of(
        data["train"]["annotations"][1]["bbox"]
    )
    data["train"]["images"][1]["file_name"] = "missing.png"
    cfg.DATALOADER.BAD_INPUT = "skip"
    with registered(tmp_path, data) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), ()
        assert training_images(cfg) == 4 == len(build_train_loader(cfg).dataset)
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        assert training_images(cfg) == 5 == len(build_train_loader(cfg).dataset)


def test_a_changed_file_is_checked_again(cfg, data, tmp_path):
    with registered(tmp_path, data) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), ()
        check_data(cfg)
        annotations_of(data)[0]["bbox"] = None
        (tmp_path / "train.json").write_text(json.dumps(data["train"]))
        with pytest.raises(DataError, match="annotation 1 .*bbox None"):
            check_data(cfg)


def test_images_that_are_in_both_sets(cfg, data, tmp_path, caplog):
    data["val"]["images"][0]["file_name"] = f"../train/{data['train']['images'][0]['file_name']}"
    check(cfg, tmp_path, data)
    (text,) = {r.message for r in caplog.records if r.name.startswith("mabn_d2")}
    assert re.search(r"1 of 3 images of DATASETS.TEST .* are also in DATASETS.TRAIN", text)


def test_more_objects_than_are_found(cfg, data, tmp_path, caplog):
    cfg.TEST.DETECTIONS_PER_IMAGE = 2
    (image, *_), (annotation, *_) = data["val"]["images"], data["val"]["annotations"]
    data["val"]["annotations"] += [
        {**annotation, "image_id": image["id"], "id": 900 + i, "bbox": [i, 2, 20, 20]}
        for i in range(5)
    ]
    check(cfg, tmp_path, data)
    (text,) = {r.message for r in caplog.records if "DETECTIONS_PER_IMAGE" in r.message}
    assert re.search(r"is 2, but 1 of 3 images of DATASETS.TEST .* up to (\d+).* \1 or more", text)


def test_boxes_without_area_everywhere(cfg, data, tmp_path):
    for annotation in data["train"]["annotations"]:
        annotation["bbox"][2] = 0
    with pytest.raises(DataError, match=r"no objects but \d+ whose box has no area"):
        check(cfg, tmp_path, data)


def test_boxes_without_area_to_evaluate(cfg, data, tmp_path, caplog):
    """One is left out; if all are, there is nothing to evaluate."""
    data["val"]["annotations"][0]["bbox"][2] = 0
    check(cfg, tmp_path, data)
    assert "1 of 6 boxes have no area inside the image, and are left out" in caplog.text
    for annotation in data["val"]["annotations"]:
        annotation["bbox"][2] = 0
    with pytest.raises(DataError, match="no objects but 6 whose box .*nothing to evaluate"):
        check(cfg, tmp_path, data)


def test_labels_that_ignore_the_exif_tag(cfg, data, tmp_path):
    """Width and height in the JSON are right for the boxes: the tag has to go."""
    for content, split in zip(data.values(), data, strict=True):
        for image in content["images"]:
            exif = Image.Exif()
            exif[274] = 6
            path = tmp_path / split / image["file_name"]
            Image.open(path).resize((120, SIZE)).save(path, exif=exif)
            image.update(width=120, height=SIZE)
    with pytest.raises(DataError, match="labelled as they are stored.*remove the tag"):
        check(cfg, tmp_path, data)
    # One of several.
    for image in data["train"]["images"][1:]:
        Image.new("RGB", (120, SIZE)).save(tmp_path / "train" / image["file_name"])
    with pytest.raises(DataError, match="it was labelled as it is stored: remove the tag"):
        check(cfg, tmp_path, data)
