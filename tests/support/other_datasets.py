"""The rectangles of coco_datasets as files of LVIS, COCO panoptic and Cityscapes."""

import json
from contextlib import contextmanager

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated, register_lvis_instances
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from PIL import Image

from coco_datasets import CLASSES, SIZE, make_dataset

STUFF = {92: "sky", 93: "ground"}  # ids of the panoptic categories; half of the image each
STUFF_NUMBERS = {id: number for number, id in enumerate(STUFF, start=1)}  # of the model's classes
VEHICLES = ["car", "person", "bicycle"]  # of Cityscapes, for the classes of the rectangles
CITY = "town"


@contextmanager
def _until_the_end(names):
    """Remove the datasets afterwards."""
    try:
        yield names
    finally:
        for name in names:
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)


def _boxes(content, image):
    """Yield (category, x, y, w, h) of the rectangles of an image, the upper one last."""
    for annotation in content["annotations"]:
        if annotation["image_id"] == image["id"]:
            yield (annotation["category_id"], *annotation["bbox"])


@contextmanager
def lvis(folder):
    """Write files of LVIS v1, all of its categories; yield the names of the two datasets."""
    categories = [
        {k: c[k] for k in ("id", "synonyms", "frequency")} | {"name": c["synonyms"][0]}
        for c in LVIS_CATEGORIES
    ]
    names = [f"lvis_v1_rectangles_{split}" for split in ("train", "val")]
    for name, (split, content) in zip(names, make_dataset(folder).items(), strict=True):
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{split}/{image.pop('file_name')}"
            image |= {"neg_category_ids": [9], "not_exhaustive_category_ids": []}
        content["categories"] = categories
        (folder / f"{split}.json").write_text(json.dumps(content))
        register_lvis_instances(name, {}, str(folder / f"{split}.json"), f"{folder}/")
    with _until_the_end(names):
        yield names


def write_panoptic(folder):
    """Write COCO panoptic files."""
    categories = [{"id": i + 1, "name": name, "isthing": 1} for i, name in enumerate(CLASSES)] + [
        {"id": id, "name": name, "isthing": 0} for id, name in STUFF.items()
    ]
    for split, content in make_dataset(folder).items():
        for kind in ("panoptic", "semantic"):
            (folder / f"{kind}_{split}").mkdir()
        annotations = []
        for image in content["images"]:
            stem = image["file_name"].removesuffix(".png")
            Image.open(folder / split / f"{stem}.png").save(folder / split / f"{stem}.jpg")
            image["file_name"] = f"{stem}.jpg"
            segments = np.empty((SIZE, SIZE), np.uint32)
            segments[: SIZE // 2], segments[SIZE // 2 :] = STUFF
            semantic = np.vectorize(STUFF_NUMBERS.get)(segments).astype(np.uint8)
            category_of = {id: id for id in STUFF}
            for number, (category, x, y, w, h) in enumerate(_boxes(content, image)):
                segments[y : y + h, x : x + w] = 1000 + number
                semantic[y : y + h, x : x + w] = 0
                category_of[1000 + number] = category
            rgb = np.stack([segments // 256**k % 256 for k in range(3)], -1).astype(np.uint8)
            Image.fromarray(rgb).save(folder / f"panoptic_{split}" / f"{stem}.png")
            Image.fromarray(semantic).save(folder / f"semantic_{split}" / f"{stem}.png")
            infos = [
                {"id": int(id), "category_id": category_of[id], "iscrowd": 0, "area": int(area)}
                for id, area in zip(*np.unique(segments, return_counts=True), strict=True)
            ]
            annotations.append(
                {"image_id": image["id"], "file_name": f"{stem}.png", "segments_info": infos}
            )
        (folder / f"{split}.json").write_text(json.dumps(content))
        panoptic_file = {
            "images": content["images"], "annotations": annotations, "categories": categories,
        }  # fmt: skip
        (folder / f"panoptic_{split}.json").write_text(json.dumps(panoptic_file))


@contextmanager
def panoptic(folder, write=True):
    """Write COCO panoptic files, or use those that are there.

    Yields:
        {task: names}, of the tasks "separated" and "stuffonly".
    """
    if write:
        write_panoptic(folder)
    metadata = {
        "thing_classes": CLASSES,
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(CLASSES))},
        "stuff_classes": ["things", *STUFF.values()],
        "stuff_dataset_id_to_contiguous_id": {0: 0, **STUFF_NUMBERS},
    }
    for split in ("train", "val"):
        register_coco_panoptic_separated(
            f"rectangles_{split}", metadata, f"{folder}/{split}", f"{folder}/panoptic_{split}",
            f"{folder}/panoptic_{split}.json", f"{folder}/semantic_{split}", f"{folder}/{split}.json",
        )  # fmt: skip
    names = {
        task: [f"rectangles_{split}_{task}" for split in ("train", "val")]
        for task in ("separated", "stuffonly")
    }
    with _until_the_end(sum(names.values(), [])):
        yield names


@contextmanager
def cityscapes(folder):
    """Write a Cityscapes folder; yield {task: names}, of the tasks "instance" and "sem_seg"."""
    from cityscapesscripts.helpers.labels import name2label

    road, metadata = name2label["road"], _get_builtin_metadata("cityscapes")
    names = {"instance": [], "sem_seg": []}
    for split, content in make_dataset(folder / "rectangles").items():
        images, truth = (folder / kind / split for kind in ("leftImg8bit", "gtFine"))
        for part in (images, truth):
            (part / CITY).mkdir(parents=True)
        for number, image in enumerate(content["images"]):
            stem = f"{CITY}_{number:06d}_000019"
            source = folder / "rectangles" / split / image["file_name"]
            Image.open(source).save(images / CITY / f"{stem}_leftImg8bit.png")
            ids = {
                kind: np.full((SIZE, SIZE), first, np.int32)
                for kind, first in (
                    ("instanceIds", road.id), ("labelIds", road.id), ("labelTrainIds", road.trainId),
                )
            }  # fmt: skip
            whole = [[0, 0], [SIZE - 1, 0], [SIZE - 1, SIZE - 1], [0, SIZE - 1]]
            objects = [{"label": "road", "polygon": whole}]
            for k, (category, x, y, w, h) in enumerate(_boxes(content, image)):
                label = name2label[VEHICLES[category - 1]]
                values = label.id * 1000 + k, label.id, label.trainId
                for plane, value in zip(ids.values(), values, strict=True):
                    plane[y : y + h, x : x + w] = value
                right, low = x + w - 1, y + h - 1
                corners = [[x, y], [right, y], [right, low], [x, low]]
                objects.append({"label": label.name, "polygon": corners})
            for kind, plane in ids.items():
                dtype = np.uint16 if kind == "instanceIds" else np.uint8
                file = truth / CITY / f"{stem}_gtFine_{kind}.png"
                Image.fromarray(plane.astype(dtype)).save(file)
            polygons = {"imgHeight": SIZE, "imgWidth": SIZE, "objects": objects}
            (truth / CITY / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
        for task, load in (
            ("instance", load_cityscapes_instances), ("sem_seg", load_cityscapes_semantic),
        ):  # fmt: skip
            name = f"rectangles_{task}_{split}"
            DatasetCatalog.register(name, lambda f=load, x=str(images), y=str(truth): f(x, y))
            MetadataCatalog.get(name).set(
                image_dir=str(images), gt_dir=str(truth), ignore_label=255,
                evaluator_type=f"cityscapes_{task}", **metadata,
            )  # fmt: skip
            names[task].append(name)
    with _until_the_end(sum(names.values(), [])):
        yield names
