"""Checks the files that evaluators read themselves, beside the records that the model gets.

They need more than a training does, and an evaluator would fail on them after the training.
"""

import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from PIL import Image

from ..data.coco_parsing import local_path, read_json
from ..data.errors import DataError
from ..data.semantic_labels import LOOKED_AT


def check_truth(cfg: CfgNode) -> None:
    """Check what the evaluators of DATASETS.TEST read.

    Raises:
        DataError: naming the dataset, the file and the remedy.
    """
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        find_problems = CHECKS.get(metadata.get("evaluator_type"))
        try:
            problem = next(find_problems(metadata), None) if find_problems else None
        except (AttributeError, KeyError, TypeError, OSError) as error:
            problem = f"its files or its metadata lack something ({type(error).__name__}: {error})"
        if problem:
            raise DataError(f"DATASETS.TEST names {name!r}, which can't be evaluated: {problem}")


def _pascal_voc(metadata: Metadata) -> Iterator[str]:
    folder, images = Path(metadata.dirname), f"ImageSets/Main/{metadata.split}.txt"
    for image in (folder / images).read_text().split():
        file = folder / "Annotations" / f"{image}.xml"
        try:
            parse_rec(str(file))  # the evaluator uses the result again
        except (AttributeError, ValueError) as error:
            yield (
                f"{file} ({error}): each object needs pose, truncated, difficult and bndbox in whole "
                "pixels"
            )


def _lvis(metadata: Metadata) -> Iterator[str]:
    content = read_json(metadata.json_file)
    if not content.get("annotations"):
        return  # results are written, as for COCO's test sets
    needed = {
        "images": ("neg_category_ids", "not_exhaustive_category_ids"),
        "categories": ("frequency",),
        "annotations": ("area",),
    }
    for key, attributes in needed.items():
        for entry in content[key]:
            for attribute in attributes:
                if attribute not in entry:
                    yield (
                        f"{metadata.json_file} has no {attribute} in {key} {entry.get('id')}: add it, "
                        'or set the evaluator_type "coco" for a file without the keys of LVIS'
                    )
    for category in content["categories"]:
        if category["frequency"] not in ("r", "c", "f"):
            yield (
                f"{metadata.json_file} has the frequency {category['frequency']!r} in category "
                f'{category.get("id")}: use "r", "c" or "f" (rare, common, frequent)'
            )


def _panoptic(metadata: Metadata) -> Iterator[str]:
    mapping = metadata.get("stuff_dataset_id_to_contiguous_id")
    if mapping is None:
        yield (
            "it has no stuff_dataset_id_to_contiguous_id: set it in its metadata, {category id of the "
            "panoptic file: number of the model's class}"
        )
    unmapped = set(range(len(metadata.stuff_classes))) - set(mapping.values())
    if unmapped:
        number = min(unmapped)
        yield (
            f"stuff_dataset_id_to_contiguous_id lacks the class {number} "
            f"({metadata.stuff_classes[number]}): add it"
        )
    file, folder = metadata.panoptic_json, local_path(metadata.panoptic_root)
    content = read_json(file)
    is_thing = {c["id"]: c.get("isthing") for c in content["categories"]}
    counts = {0: 0, 1: 0}
    for annotation in content["annotations"]:
        if not os.path.isfile(os.path.join(folder, annotation["file_name"])):
            yield f"{file} names {annotation['file_name']}, which is not in {folder}: add it"
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            if is_thing.get(category) not in counts:
                yield (
                    f"{file} has segments of category {category}, whose isthing is "
                    f"{is_thing.get(category)!r}: correct the categories, isthing is 0 or 1"
                )
                return
            counts[is_thing[category]] += not segment.get("iscrowd", 0)
    for annotation in content["annotations"][:LOOKED_AT]:
        picture = os.path.join(folder, annotation["file_name"])
        with Image.open(picture) as image:
            if len(image.getbands()) < 3:
                yield (
                    f"{picture} has mode {image.mode}, and the id of a segment is red + 256 green + 65536 "
                    "blue: save it as RGB"
                )
    images = {image["id"] for image in read_json(metadata.json_file)["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images:
            yield (
                f"{file} has image {annotation['image_id']}, which {metadata.json_file} lacks: both "
                "need the same images"
            )
    for value, kind in enumerate(("stuff", "things")):
        if not counts[value]:
            yield f"{file} has no segment of {kind} (isthing {value}), whose mean quality is asked for"


def _cityscapes(metadata: Metadata) -> Iterator[str]:
    folder = metadata.gt_dir
    for kind in ("instanceIds", "labelIds"):
        ending = f"_gtFine_{kind}.png"
        files = glob(os.path.join(local_path(folder), "*", f"*{ending}"))
        if not files:
            yield (
                f"no file {folder}/*/*{ending} exists: cityscapesscripts/preparation writes such files "
                "from *_gtFine_polygons.json"
            )
        for file in files:
            city, stem = Path(file).parent.name, Path(file).name.removesuffix(ending)
            image = os.path.join(metadata.image_dir, city, f"{stem}_leftImg8bit.png")
            if not os.path.isfile(image):
                yield f"{file} is of the image {image}, which does not exist: remove the one, or add the other"


CHECKS = {
    "pascal_voc": _pascal_voc,
    "lvis": _lvis,
    "coco_panoptic_seg": _panoptic,
    "cityscapes_instance": _cityscapes,
    "cityscapes_sem_seg": _cityscapes,
}
