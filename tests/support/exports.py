"""Folders of digit scenes as labelling tools export them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from mabn_d2.data.digit_scenes import SceneParams, load_sources, render_scene

LAYOUTS = ("roboflow", "coco", "cvat", "label_studio", "json")
MASKS = ("boxes", "polygons", "rle")
# One of them would be wrong mathematics for matplotlib.
NAMES = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "$sieben_{$", "acht", "neun"]
# Without a part to validate on.
UNDIVIDED = ("cvat", "label_studio", "json")
# Folder and file name of image i of a part, and how the JSON file spells it.
_PLACES = {
    "roboflow": lambda part, i: (f"{_VALID.get(part, part)}", f"{i}_jpg.rf.0a1b.jpg", None),
    "coco": lambda part, i: (f"{part}2017", f"{i:012d}.jpg", None),
    "cvat": lambda part, i: ("images", f"site {i % 2}/photo {i}.png", None),
    "label_studio": lambda part, i: (
        "images",
        f"{i:08x}-Größe.jpg",
        f"images\\1\\{i:08x}-Größe.jpg",
    ),
    "json": lambda part, i: (".", f"{i}.jpg", f"C:\\Users\\me\\photos\\{i}.jpg"),
}
_VALID = {"val": "valid"}
_FILES = {
    "roboflow": lambda part: f"{_VALID.get(part, part)}/_annotations.coco.json",
    "coco": lambda part: f"annotations/instances_{part}2017.json",
    "cvat": lambda part: "annotations/instances_default.json",
    "label_studio": lambda part: "result.json",
    "json": lambda part: "labels.json",
}


def write_export(folder, layout, masks="polygons", sizes=(12, 4), image_size=96) -> Path:
    """Write digit scenes to `folder` as a labelling tool would, and return it.

    Args:
        layout: one of LAYOUTS.
        masks: one of MASKS.
        sizes: images of "train" and "val"; all go into one file if the layout has no parts.
    """
    folder = Path(folder)
    params = SceneParams(image_size=image_size, digit_size=(24.0, 40.0), num_digits=(1, 3))
    parts = dict(zip(("train", "val"), sizes, strict=True))
    if layout in UNDIVIDED:
        parts = {"train": sum(sizes)}
    for part, count in parts.items():
        sources, images, annotations = load_sources(part), [], []
        for i in range(count):
            scene = render_scene(np.random.default_rng([7, len(part), i]), sources, params)
            where, name, spelling = _PLACES[layout](part, i)
            path = folder / where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(path)
            height, width = scene.image.shape[:2]
            image_id = i + (layout != "roboflow")  # which counts from 0
            images.append(
                {"id": image_id, "file_name": spelling or name, "height": height, "width": width}
            )
            for mask, index in zip(scene.masks, scene.chosen, strict=True):
                annotation = _annotation(mask, masks)
                label = int(sources.labels[index])
                annotations.append(
                    annotation
                    | {"id": len(annotations), "image_id": image_id}
                    | {"category_id": label + (layout != "label_studio"), "iscrowd": 0}
                )
        content = {
            "info": {"description": layout},
            "categories": _categories(layout),
            "images": images,
            "annotations": annotations,
        }
        file = folder / _FILES[layout](part)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def _categories(layout):
    if layout == "roboflow":  # id 0 is the project
        group = [{"id": 0, "name": "ziffern", "supercategory": "none"}]
        return group + [
            {"id": i + 1, "name": n, "supercategory": "ziffern"} for i, n in enumerate(NAMES)
        ]
    return [{"id": i + (layout != "label_studio"), "name": n} for i, n in enumerate(NAMES)]


def _annotation(mask, kind):
    """Return box, area and segmentation of a mask; small loose parts belong to no polygon."""
    mask = mask.astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [c.reshape(-1).astype(float).tolist() for c in contours if len(c) >= 3]
    rle = mask_util.encode(np.asfortranarray(mask))
    segmentation = {
        "boxes": [],
        "polygons": polygons,
        "rle": {"size": rle["size"], "counts": rle["counts"].decode()},
    }[kind]
    return {
        "bbox": mask_util.toBbox(rle).tolist(),
        "area": float(mask_util.area(rle)),
        "segmentation": segmentation,
    }


def edit(file, change):
    """Apply `change` to the content of a JSON file."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    change(content)
    Path(file).write_text(json.dumps(content), encoding="utf-8")
