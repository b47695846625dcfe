"""Tiny COCO datasets of coloured rectangles, in the forms in which labelling tools write them."""

import json
from contextlib import contextmanager

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

CLASSES = ["bolt", "nut", "washer"]
SIZE = 96  # pixels, as wide as high


def make_split(folder, count, seed):
    """Write `count` images of two rectangles each; return the content of their COCO file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        image = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
        for k in range(2):
            w, h = rng.integers(20, 45, 2).tolist()
            x, y = int(rng.integers(0, SIZE - w)), int(rng.integers(0, SIZE - h))
            category = (2 * i + k) % 3
            image[y : y + h, x : x + w] = 0
            image[y : y + h, x : x + w, category] = 230
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": i + 1, "category_id": category + 1,
                    "iscrowd": 0, "bbox": [x, y, w, h], "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )  # fmt: skip
        Image.fromarray(image).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": SIZE, "width": SIZE})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_dataset(folder):
    """Return {"train": content, "val": content} of 6 and 3 images in folder/train and folder/val."""
    return {
        "train": make_split(folder / "train", 6, 0),
        "val": make_split(folder / "val", 3, 1),
    }


def rle(box, counts_as_text=False):
    """Return the RLE of a box in an image of SIZE."""
    import pycocotools.mask as mask_util

    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    if counts_as_text:
        encoded = mask_util.encode(mask)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=2)).tolist()
    return {"size": [SIZE, SIZE], "counts": np.diff([0, *changes]).tolist()}


def annotations_of(data):
    return [a for content in data.values() for a in content["annotations"]]


@contextmanager
def registered(folder, data, names=None, metadata=None):
    """Register {split: content} as datasets of COCO files; yield {split: name}."""
    names = names or {split: f"{folder.name}_{split}" for split in data}
    for split, content in data.items():
        file = folder / f"{split}.json"
        file.write_text(json.dumps(content))
        root = folder / split
        register_coco_instances(names[split], metadata or {}, str(file), str(root))
    try:
        yield names
    finally:
        for name in names.values():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def read_rectangles(cfg, masks=True):
    """Set a config of the digits to the datasets of this module."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.MASK_ON = masks
    cfg.INPUT.MASK_FORMAT = "polygon"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (SIZE,), SIZE
    cfg.SOLVER.MAX_ITER = 2
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return cfg
